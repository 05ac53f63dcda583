"""Programs as they were traced, kept beside the compilation cache: a start of the same engine traces nothing.

The cache of JAX spares the compiler, but its key is the traced program, and to trace and lower the two programs of an
engine is a quarter of what the first answer of a small model takes on a CPU.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
from jax import export

from gptjax.files import code_digest, write_whole

FOLDER = "traced"


class Kept:
    """A jit of (params, slots, *arrays, *statics) -> (slots, a named tuple or None), on a single device; slots are
    donated. Each of its programs is a file in the folder of the compilation cache, if there is one."""

    def __init__(self, jitted: Any, about: Sequence[Any], statics: int, rest: Callable[..., Any]) -> None:
        """about: what the programs depend on, in JSON, beside code, versions, device and shapes; statics: how many of
        the arguments, the last ones, are numbers that make another program; rest: makes the named tuple."""
        self._jitted, self._about, self._statics, self._rest = jitted, about, statics, rest
        self._programs: dict[Any, Any] = {}

    def __call__(self, params: Any, slots: Any, *rest: Any) -> tuple[Any, Any]:
        folder = jax.config.values["jax_compilation_cache_dir"]
        if not folder:
            made: tuple[Any, Any] = self._jitted(params, slots, *rest)
            return made
        arrays, statics = rest[: -self._statics], rest[-self._statics :]
        leaves, tree = jax.tree.flatten((params, slots, *arrays))
        key = tree, statics, tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)
        first, (kept, form) = len(jax.tree.leaves(params)), jax.tree.flatten(slots)
        if key not in self._programs:
            flat = jax.jit(lambda *every: jax.tree.leaves(self._jitted(*jax.tree.unflatten(tree, every), *statics)))
            exported = self._exported(Path(folder), key, flat, leaves)
            donated = tuple(range(first, first + len(kept)))
            self._programs[key] = jax.jit(exported.call, donate_argnums=donated)
        out = self._programs[key](*leaves)
        more = out[len(kept) :]
        return jax.tree.unflatten(form, out[: len(kept)]), self._rest(*more) if more else None

    def _cache_size(self) -> int:
        """Programs so far, as a jit counts them."""
        return len(self._programs) or self._jitted._cache_size()

    def _exported(self, folder: Path, key: Any, flat: Any, leaves: Any) -> export.Exported:
        """From its file, or traced and put there. What cannot be read is made again; a cache that cannot be written is
        none."""
        device = jax.devices()[0]
        about = [code_digest(), jax.__version__, device.platform, device.device_kind, *self._about, *map(str, key)]
        name = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:40]
        path = folder / FOLDER / name
        with suppress(Exception):
            return export.deserialize(bytearray(path.read_bytes()))
        exported = export.export(flat)(*leaves)
        with suppress(OSError):
            write_whole(path, bytes(exported.serialize()))
        return exported
