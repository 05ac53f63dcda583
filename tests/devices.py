"""Virtual CPU devices, and programs that compile fast. Imports no JAX, which reads the flags when it starts."""

import os
from importlib.metadata import version

# Compilation is most of a test's time, and for tiny shapes LLVM's optimisations are most of compilation: without them
# it takes about 0.6 of the time. Of the rest, half is the newer of the two ways in which XLA writes a fusion for a CPU,
# which jaxlib 0.11 knows alone. Nor is a program cut into 32 modules for as many threads, where two processes share two
# cores. A flag that jaxlib does not know ends it at its start, so that what was tried on 0.10 alone is given to that.
# XLA's own passes, collectives and fusions are those of a user.
FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if version("jaxlib").startswith("0.10."):
    FAST += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"


def environment(devices: int = 1, flags: str = FAST, **more: str) -> dict[str, str]:
    """What a process of its own is started with."""
    flags = f"--xla_force_host_platform_device_count={devices} {flags}"
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"} | more
