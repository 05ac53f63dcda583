"""The settings of glibc's malloc with which XLA computes on a CPU."""

import glob
import os
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec

# XLA's CPU backend takes its scratch memory from malloc and gives it back at every step: without these glibc
# faults it in page by page each time, a third of a step of width 128. Huge pages, and freed memory is kept.
SETTINGS = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1073741824"
# What an accelerator needs to be used: a plugin of JAX, and the driver's device file. A plugin alone is there to plan.
ACCELERATORS = (
    (("jax_cuda13_plugin", "jax_cuda12_plugin"), ("/dev/nvidia[0-9]*", "/dev/dxg")),
    (("libtpu",), ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")),
)


def start_again() -> None:
    """Start this process once more under SETTINGS, which glibc reads at start, where it will compute on a CPU."""
    if matters(os.environ):
        os.environ["GLIBC_TUNABLES"] = SETTINGS
        os.execv(sys.executable, sys.orig_argv)


def _installed(module: str) -> bool:
    return find_spec(module) is not None


def _exists(pattern: str) -> bool:
    return bool(glob.glob(pattern))


def matters(
    environment: Mapping[str, str],
    installed: Callable[[str], bool] = _installed,
    exists: Callable[[str], bool] = _exists,
) -> bool:
    """Whether the computation will run on a Linux CPU with glibc's defaults."""
    if sys.platform != "linux" or "GLIBC_TUNABLES" in environment:
        return False
    if platforms := environment.get("JAX_PLATFORMS"):
        return platforms.split(",")[0] == "cpu"
    return not any(any(map(installed, plugins)) and any(map(exists, files)) for plugins, files in ACCELERATORS)
