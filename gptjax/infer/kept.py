"""Compiled programs, kept beside the compilation cache: a start of the same engine traces, lowers and compiles nothing.

The cache of JAX spares the compiler alone, for its key is the lowered program: to trace and lower the two programs of
an engine is a quarter of what the first answer of a small model takes on a CPU, and to lower a program of jax.export
imports scipy.linalg, a tenth.
"""

import hashlib
import json
import math
import os
import pickle
import platform
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
from jax.experimental.serialize_executable import deserialize_and_load, serialize

from gptjax.files import code_digest, write_whole

FOLDER = "programs"
FLAGS = ("XLA_FLAGS", "JAX_DEFAULT_MATMUL_PRECISION")  # of the environment, that change a program


class Kept:
    """A jit of (params, slots, *arrays, *statics) -> (slots, a named tuple or None), on a single device; slots are
    donated. Each of its programs is a file in the folder of the compilation cache, if there is one."""

    def __init__(self, jitted: Any, about: Sequence[Any], statics: int, rest: Callable[..., Any]) -> None:
        """about: what the programs depend on, in JSON, beside code, versions, device and shapes; statics: how many of
        the arguments, the last ones, are numbers that make another program; rest: makes the named tuple."""
        self._jitted, self._about, self._statics, self._rest = jitted, about, statics, rest
        self._programs: dict[Any, Any] = {}
        self._reading: dict[Any, Future[Any]] = {}

    def read_ahead(self, *args: Any) -> None:
        """Begin to read the program that a call with such arguments runs, beside what goes on until then: what takes
        the time, linking it, keeps no other thread waiting."""
        folder = jax.config.values["jax_compilation_cache_dir"]
        key, leaves = self._key(args)
        if folder and key not in self._programs:
            pool = ThreadPoolExecutor(1)
            self._reading[key] = pool.submit(_read, self._path(folder, key, leaves), leaves[0].device)
            pool.shutdown(wait=False)

    def make(self, params: Any, slots: Any, *rest: Any) -> bool:
        """Have the program of such a call and do not run it; False where there is no folder to keep it in."""
        return bool(jax.config.values["jax_compilation_cache_dir"]) and bool(self._program(params, slots, *rest))

    def __call__(self, params: Any, slots: Any, *rest: Any) -> tuple[Any, Any]:
        if not jax.config.values["jax_compilation_cache_dir"]:
            made: tuple[Any, Any] = self._jitted(params, slots, *rest)
            return made
        program, leaves = self._program(params, slots, *rest)
        kept, form = jax.tree.flatten(slots)
        out = program(*leaves)
        more = out[len(kept) :]
        return jax.tree.unflatten(form, out[: len(kept)]), self._rest(*more) if more else None

    def _program(self, params: Any, slots: Any, *rest: Any) -> tuple[Any, list[Any]]:
        """What a call runs, and the arrays that it runs on."""
        key, leaves = self._key((params, slots, *rest))
        if key not in self._programs:
            (tree, statics, _), first = key, len(jax.tree.leaves(params))

            def program(*every: Any) -> list[Any]:
                return jax.tree.leaves(self._jitted(*jax.tree.unflatten(tree, every), *statics))

            donated = tuple(range(first, first + len(jax.tree.leaves(slots))))
            folder = jax.config.values["jax_compilation_cache_dir"]
            self._programs[key] = self._compiled(folder, key, jax.jit(program, donate_argnums=donated), leaves)
        return self._programs[key], leaves

    def _cache_size(self) -> int:
        """Programs so far, as a jit counts them."""
        return len(self._programs) or self._jitted._cache_size()

    def _key(self, args: Sequence[Any]) -> tuple[Any, list[Any]]:
        """What tells a program from others, and the arrays that it reads."""
        arrays, statics = args[: -self._statics], args[-self._statics :]
        leaves, tree = jax.tree.flatten(arrays)
        return (tree, statics, tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)), leaves

    def _path(self, folder: str, key: Any, leaves: Any) -> Path:
        about = [code_digest(), jax.__version__, *_machine(leaves[0].device), *self._about, *map(str, key)]
        return Path(folder) / FOLDER / hashlib.sha256(json.dumps(about).encode()).hexdigest()[:40]

    def _compiled(self, folder: str, key: Any, jitted: Any, leaves: Any) -> Any:
        """From its file, or compiled and put there. A cache that cannot be written is none."""
        path, ahead = self._path(folder, key, leaves), self._reading.pop(key, None)
        if found := ahead.result() if ahead else _read(path, leaves[0].device):
            return found
        with _beside_the_cache():
            compiled = jitted.lower(*leaves).compile()
        with suppress(OSError, ValueError):  # the latter: a backend whose programs cannot be kept
            write_whole(path, pickle.dumps(serialize(compiled)))
        return compiled


def _read(path: Path, device: Any) -> Any:
    """The program of a file; None where there is none, or one that cannot be read, which is then made again."""
    with suppress(Exception):
        program, ins, outs = pickle.loads(path.read_bytes())
        return deserialize_and_load(program, ins, outs, execution_devices=[device])
    return None


@contextmanager
def _beside_the_cache() -> Iterator[None]:
    """What is compiled here does not go into JAX's cache: on a CPU a program that came from there and is kept again has
    lost its functions."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = jax.config.values[name]
    jax.config.update(name, math.inf)
    try:
        yield
    finally:
        jax.config.update(name, before)


def _machine(device: Any) -> list[str]:
    """What a program was compiled for. A CPU by what it can do: a home folder may belong to machines of several
    kinds, and XLA compiles for the one that it is on."""
    flags = [os.environ.get(name, "") for name in FLAGS]
    info = Path("/proc/cpuinfo")
    can = re.search(r"^(?:flags|Features)\s*:.*$", info.read_text(), re.M) if info.exists() else None
    return [device.platform, device.device_kind, platform.machine(), can[0] if can else platform.processor(), *flags]
