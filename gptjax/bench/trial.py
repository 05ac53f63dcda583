"""One measurement in a process of its own: out of memory, a crash or a hang is an answer like any other.

`python -m gptjax.bench.trial` reads a job from standard input and prints one line of JSON. Whoever starts it must leave
the devices alone: an accelerator serves one process at a time.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gptjax.bench.measure import limits, provenance
from gptjax.bench.work import WARMUP, Work, num_bytes, peak
from gptjax.children import end_with_parent
from gptjax.config import Config, from_json, to_json
from gptjax.errors import UserError
from gptjax.files import json_text
from gptjax.hardware import require_float8
from gptjax.model.gpt import compute_dtype
from gptjax.model.kernels import BACKENDS
from gptjax.parallel.network import Network
from gptjax.train.processes import is_first
from gptjax.train.step import init_state

COMMAND = (sys.executable, "-m", "gptjax.bench.trial")
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory", "bad_alloc", "MemoryError")
JAX_NOTE = ("----", "For simplicity, JAX has removed")  # what it puts behind an error
LINE = 300  # characters of an error that a table and a JSON row keep


@dataclass(frozen=True)
class Extras:
    """What `bench single` wants to know beside the times of the steps."""

    options: dict[str, str] = field(default_factory=dict)
    """Compiler options beside the platform's own."""
    parts: bool = False
    """Also seconds of a step by part, from a profiler's trace."""
    stream: bool = False
    """Also the times of steps that are fed by the config's own data, and of as many that are not."""


def facts_of_devices(config: Config, timeout: float, distributed: bool = False) -> dict[str, Any]:
    """What `_facts` finds, from a process of its own, which joins those of the other hosts if `distributed`.

    Raises UserError where it finds nothing.
    """
    answer = in_process({"what": "facts", "config": to_json(config), "distributed": distributed}, timeout)
    if answer["status"] != "ok":
        raise UserError(f"bench: the devices could not be measured: {answer['reason']}")
    return answer


def measure(config: Config, steps: int, timeout: float, distributed: bool = False) -> dict[str, Any]:
    """What `_steps` finds, with status ok; else status out of memory, timeout or failed, with the reason."""
    job = {"what": "steps", "config": to_json(config), "steps": steps, "distributed": distributed}
    return in_process(job, timeout)


def measure_single(config: Config, steps: int, timeout: float, **extras: Any) -> dict[str, Any]:
    """`measure` on the first device alone, with the Extras that are named."""
    job = {"what": "steps", "config": to_json(config), "steps": steps, "extras": asdict(Extras(**extras))}
    return in_process(job, timeout)


def measure_peer(script: Path, config: Config, steps: int, timeout: float) -> dict[str, Any]:
    """The same work by another program: it reads the job and answers in the same form."""
    job = {"config": json.loads(to_json(config)), "micro_batch_size": config.micro_batch_size, "steps": steps}
    return in_process(job, timeout, (sys.executable, str(script)))


def in_process(job: dict[str, Any], timeout: float, command: tuple[str, ...] | None = None) -> dict[str, Any]:
    try:  # subprocess.run kills the child at a timeout and at Ctrl-C alike
        done = subprocess.run(
            command or COMMAND, input=json.dumps(job), capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return {"status": "timeout", "reason": f"not done within {timeout:g} s; give more with --timeout"}
    if done.returncode == 0 and done.stdout.strip():
        return json.loads(done.stdout.strip().splitlines()[-1])
    return _died(done.returncode, done.stderr)


def _died(status: int, errors: str) -> dict[str, Any]:
    """The answer for a child that gave none. Linux ends whatever has taken too much memory by SIGKILL."""
    said = [line for line in errors.splitlines() if line.strip() and not line.startswith(JAX_NOTE)]
    lines = said or ["no message"]
    by = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    telling = [line for line in lines if any(word in line for word in OUT_OF_MEMORY)]
    if telling or status == -signal.SIGKILL:
        return {"status": "out of memory", "reason": f"{by}: {(telling or lines)[-1]}"[:LINE]}
    return {"status": "failed", "reason": f"{by}: {lines[-1]}"[:LINE]}


def _child() -> None:
    end_with_parent()
    job = json.loads(sys.stdin.read())
    config = from_json(job["config"])
    try:
        if job.get("distributed"):
            from gptjax.train.join import join

            join(os.environ)
        extras = Extras(**job["extras"]) if "extras" in job else None
        answer = _facts(config) if job["what"] == "facts" else _steps(config, job["steps"], extras)
    except UserError as error:
        answer = {"status": "failed", "reason": str(error)}
    except Exception as error:  # whatever it is, the other settings go on
        text = f"{type(error).__name__}: {error}"
        status = "out of memory" if any(word in text for word in OUT_OF_MEMORY) else "failed"
        answer = {"status": status, "reason": text.splitlines()[0][:LINE]}
    print(json_text(answer))


def _facts(config: Config) -> dict[str, Any]:
    """The devices: how many of what, what they reach, and which attention backends serve the model there. Raises
    UserError for products in float8 that they do not have."""
    if config.model.fp8:
        require_float8(jax.devices()[0])
    platform, count = jax.default_backend(), jax.device_count()
    dtype = compute_dtype(config.model, platform)
    served, refused = _backends(config, platform)
    return {
        "status": "ok",
        **provenance(),
        "count": count,
        "local_count": jax.local_device_count(),
        "first": is_first(),
        "dtype": str(dtype),
        "limits": limits(dtype) | ({"gather": _gather_rate(platform)} if count > 1 else {}),
        "memory_bytes": _memory(platform),
        "attention": served,
        "attention_refused": refused,
    }


def _memory(platform: str) -> int:
    """Bytes that a program may have: of one device, or of all virtual ones together, which share the machine's."""
    if platform == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)


def _gather_rate(platform: str) -> float:
    """Bytes per second into each device when all gather an array from all, at once."""
    mesh = jax.make_mesh((jax.device_count(),), ("all",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = NamedSharding(mesh, PartitionSpec("all")), NamedSharding(mesh, PartitionSpec())
    words = jax.device_count() * ((1 << 19) if platform == "cpu" else (1 << 23))
    line = jax.jit(lambda: jnp.ones((words,), jnp.float32), out_shardings=split)()
    gather = jax.jit(lambda x: x, out_shardings=whole)
    seconds = []
    for _ in range(WARMUP + 10):  # a fixed number: every host takes part in each
        started = time.perf_counter()
        jax.block_until_ready(gather(line))
        seconds.append(time.perf_counter() - started)
    return line.nbytes * (1 - 1 / jax.device_count()) / median(seconds[WARMUP:])


def _backends(config: Config, platform: str) -> tuple[list[str], dict[str, str]]:
    """(those that serve, the config's choice first; why the others do not)."""
    chosen = Network(config, platform).attention[0]
    served, refused = [chosen], {}
    for name in BACKENDS:
        try:
            named: Any = {"attention": name}
            backend = Network(replace(config, model=replace(config.model, **named)), platform).attention[0]
            served += [backend] if backend != chosen else []
        except UserError as error:
            refused[name] = str(error)
    return served, refused


def _steps(config: Config, steps: int, extras: Extras | None) -> dict[str, Any]:
    """Seconds of each of `steps` optimizer steps on random tokens, of the compilation, and peak bytes per device.

    With `extras` on the first device alone, and what they ask for.
    """
    work = Work.prepare(config, jax.devices() if extras is None else jax.devices()[:1])
    state = init_state(config, work.stage, work.shardings)
    started = time.perf_counter()
    step = work.compile(state, extras.options if extras else {})
    compile_s = time.perf_counter() - started
    state, seconds, loss = work.timed(step, state, [work.random_rows] * (WARMUP + steps))
    if not np.isfinite(loss):
        return {"status": "failed", "reason": f"the loss is {loss} after {WARMUP + steps} steps"}
    answer = {
        "status": "ok",
        "times_s": seconds,
        "compile_s": compile_s,
        "loss": loss,
        "attention": work.stage.network.attention[0],
        "compute_width": work.stage.network.plain_model.dtype.itemsize,
        "state_bytes": {name: num_bytes(getattr(state, name)) for name in ("params", "opt_state")},
        **peak(step),
    }
    if extras is not None and extras.stream:
        with work.stream(WARMUP + steps) as batches:
            state, answer["stream_s"], _ = work.timed(step, state, batches)
        # Once more right after, for a machine whose speed drifts.
        state, answer["again_s"], _ = work.timed(step, state, [work.random_rows] * (WARMUP + steps))
    if extras is not None and extras.parts:
        answer["parts_s"] = work.parts(state, extras.options)
    return answer


if __name__ == "__main__":
    _child()
