"""The real compiler, without the hardware: the train step of a config, compiled ahead of time for a topology.

Every compile is a process of its own (`python -m gptjax.planner.compile`), so that one which dies or hangs takes
nothing with it. Results are kept by the lowered program: a change that does not reach the program costs no compile.
"""

import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gptjax.children import Children, end_with_parent
from gptjax.config import Config, from_json, to_json
from gptjax.errors import UserError
from gptjax.files import write_whole
from gptjax.hardware import compiler_options
from gptjax.planner import chips
from gptjax.planner.bill import Collective, read

COMPILERS = {"tpu": "libtpu", "gpu": "jax_cuda13_plugin"}
"""The module that brings the compiler of a platform."""
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # Of this machine, not of the topology: without them libtpu complains that it could not find them out.
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of one step, per device; bytes."""

    peak: float
    """Everything at its highest moment; for a program that does not fit, what it would need at least."""
    arguments: float = 0.0
    temporaries: float = 0.0
    fits: bool = True
    error: str = ""
    """Why there is no program, in one line; empty if there is one."""
    seconds: float = 0.0
    collectives: tuple[Collective, ...] = ()

    @property
    def allocated(self) -> float:
        """What a device sets aside: more than the peak, since memory falls into pieces."""
        return max(self.peak, self.arguments + self.temporaries)


# What the CUDA compiler must know of a GPU that is not there; figures of the H100 SXM from its data sheet.
GPU_TARGETS = {
    "h100": """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 }
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84942979072
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 minor: 0 }
}
"""
}


def available(platform: str) -> bool:
    """Whether this installation has the compiler for a platform."""
    return find_spec(COMPILERS[platform]) is not None


def compile_all(
    configs: dict[str, Config], topology: chips.Topology, cache: Path, timeout: float, processes: int
) -> Iterator[tuple[str, Compiled]]:
    """(name, result) of each config as it comes, so many at once."""
    with ThreadPoolExecutor(processes) as pool, Children() as children:
        started = {
            pool.submit(_in_process, config, topology, cache, timeout, children): name
            for name, config in configs.items()
        }
        for done in as_completed(started):
            yield started[done], done.result()


def _in_process(config: Config, topology: chips.Topology, cache: Path, timeout: float, children: Children) -> Compiled:
    """One compile, or what is known of it from before."""
    request = (
        cache / f"{_digest(to_json(config), topology.name, str(topology.num_slices), versions(), _sources())}.json"
    )
    if not request.exists():
        cache.mkdir(parents=True, exist_ok=True)
        slices = topology.num_slices if topology.chip.platform == "tpu" else 1  # GPU nodes are in the name
        job = {"config": to_json(config), "topology": topology.name, "num_slices": slices}
        command = [sys.executable, "-m", "gptjax.planner.compile", str(cache)]
        started = time.perf_counter()
        try:
            done = children.run(command, json.dumps(job), timeout, env=os.environ | ENVIRONMENT)
        except subprocess.TimeoutExpired:
            return Compiled(0, fits=False, error=f"not compiled within {timeout:.0f} s", seconds=timeout)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
            return Compiled(0, fits=False, error=last[0][:300], seconds=time.perf_counter() - started)
        write_whole(request, done.stdout.strip().splitlines()[-1].encode())
    program = cache / json.loads(request.read_text())["program"]
    facts = json.loads(program.with_suffix(".json").read_text())
    mesh, text = facts.pop("mesh"), program.with_suffix(".hlo.gz")
    collectives: tuple[Collective, ...] = ()
    if facts["fits"]:
        collectives = tuple(read(gzip.decompress(text.read_bytes()).decode(), mesh, config.max_accumulation))
    return Compiled(**facts, collectives=collectives)


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:24]


def versions() -> str:
    """Of everything that turns a config into a program."""
    found = []
    for name in ("jax", "jaxlib", "flax", "optax", "libtpu", "jax-cuda13-plugin"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def _sources() -> str:
    """This package's own source, which also turns a config into a program."""
    root = Path(__file__).parents[1]
    parts = (
        "*.py",
        "config/*.py",
        "model/**/*.py",
        "parallel/*.py",
        "sharding/*.py",
        "data/rows.py",
        "stages/*.py",
        "train/parts.py",
        "train/step.py",
        "planner/compile.py",
    )
    return _digest(*(path.read_text() for part in parts for path in sorted(root.glob(part))))


def devices_of(topology: chips.Topology) -> list[Any]:
    """Stand-ins for the devices, which programs can be compiled for and not run on; a CPU's are there."""
    import jax
    from jax.experimental import topologies

    if topology.chip.platform == "cpu":
        return jax.devices()[: topology.num_devices]
    if topology.chip.platform == "gpu":
        shape = f"1x{topology.num_slices}x{topology.slice_devices}"
        target = GPU_TARGETS.get(topology.family)
        if target is None:
            known = ", ".join(GPU_TARGETS)
            raise UserError(f"--topology {topology.name}: the compiler is described {known} only; nearest h100-8x1")
        return list(topologies.get_topology_desc("topology", "cuda", topology=shape, target_config=target).devices)
    options: dict[str, Any] = {"chip_config_name": "megacore"} if topology.family == "v4" else {}
    if topology.slice_devices == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if topology.num_slices > 1:
        options["num_slices"] = topology.num_slices
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology.compiler_name, **options)
    return list(described.devices)


def lower(config: Config, topology: chips.Topology, rules: Any = None) -> tuple[Any, dict[str, int]]:
    """The train step, lowered for devices that are not there, and the sizes of its mesh; `rules` tries another
    table."""
    import numpy as np

    from gptjax.sharding.mesh import make_mesh
    from gptjax.sharding.rules import Layout, rule_table
    from gptjax.stages import stage_class
    from gptjax.train.step import abstract_rows, abstract_state, make_step, placed

    layout = Layout(make_mesh(config, devices_of(topology)), rules or rule_table(config.layout))
    stage = stage_class(config)(config, topology.chip.platform, layout)
    boxed = abstract_state(config, stage)
    shardings = layout.shardings(boxed)
    rows = abstract_rows(config, stage.row, layout)
    scalars = np.float32(0), np.int32(1), np.int32(0)
    step = make_step(config, stage, shardings, layout)
    return step.lower(placed(boxed, shardings), rows, *scalars), dict(layout.mesh.shape)


def _child(cache: Path, job: dict[str, Any]) -> str:
    """Compile one job into the cache, unless the program is there; returns JSON that names it."""
    topology, config = chips.topology(job["topology"], job["num_slices"]), from_json(job["config"])
    lowered, mesh = lower(config, topology)
    options = compiler_options(devices_of(topology)[0], config.train.deterministic)
    name = _digest(lowered.as_text(), topology.name, str(topology.num_slices), versions(), str(options))
    program = cache / name
    if not program.with_suffix(".json").exists():
        facts = _compile(lowered, topology.chip.platform, program.with_suffix(".hlo.gz")) | {"mesh": mesh}
        write_whole(program.with_suffix(".json"), json.dumps(facts).encode())
    return json.dumps({"program": name})


def _compile(lowered: Any, platform: str, text: Path) -> dict[str, Any]:
    import jax

    started = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        message = str(error).splitlines()[0]
        return _plain(Compiled(needed(message), fits=False, error=message, seconds=time.perf_counter() - started))
    seconds = time.perf_counter() - started
    memory = compiled.memory_analysis()
    write_whole(text, gzip.compress(compiled.as_text().encode()))
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    # The CPU's own figure of the peak leaves temporaries out.
    peak = 0 if platform == "cpu" else memory.peak_memory_in_bytes
    return _plain(Compiled(peak or arguments + outputs + temporaries, arguments, temporaries, seconds=seconds))


def _plain(compiled: Compiled) -> dict[str, Any]:
    """As JSON keeps it: the collectives are read from the program's text."""
    return {name: value for name, value in asdict(compiled).items() if name != "collectives"}


def needed(message: str) -> float:
    """Bytes that a compiler says a program would need: 'memory required for ... (24.51G)', 'Used X of'; 0 where it is
    not the device's main memory that is too small."""
    match = re.search(r"(?:required for [^(]*\(|Used |requires? )([\d.]+)\s*([KMGT])", message)
    if match is None or "vmem" in message:
        return 0.0
    return float(match[1]) * 1024.0 ** ("KMGT".index(match[2]) + 1)


if __name__ == "__main__":
    end_with_parent()
    print(_child(Path(sys.argv[1]), json.loads(sys.stdin.read())))
