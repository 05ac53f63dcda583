"""A checksum of every array of a tree: the same on every layout, another if one bit, or two numbers' places, change."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gptjax.sharding.rules import leaf_name

SEEDS = (0x9E3779B9, 0x85EBCA6B)  # two sums of 32 bits
SMALL = 1 << 24  # numbers that NumPy sums in the time, 0.3 s, in which a CPU gets a program for it from its cache


def fingerprint(tree: Any) -> dict[str, str]:
    """Name -> 16 hexadecimal digits, for arrays of any type. Computed where the arrays lie, nothing is gathered.

    One array after another: programs of several processes that are under way at once may meet in different orders on a
    CPU, and then wait for each other for ever.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    small = sum(leaf.size for _, leaf in leaves) <= SMALL and all(_on_cpu(leaf) for _, leaf in leaves)
    sums = _on_host if small else _on_devices
    return {leaf_name(path): _digits(sums(leaf)) for path, leaf in leaves}


def fingerprint_of_parts(parts: Iterable[tuple[Sequence[int], np.ndarray]]) -> str:
    """The same digits of one array that comes in parts, each with the place of its first number in the whole."""
    total = np.zeros(len(SEEDS), np.uint32)
    with np.errstate(over="ignore"):
        for begin, part in parts:
            total += _sums(np, part, begin)
    return _digits(total)


def _digits(sums: np.ndarray) -> str:
    return "".join(f"{int(x):08x}" for x in sums)


def _on_cpu(leaf: Array) -> bool:
    """Whether it is one piece of this process's own memory."""
    return leaf.is_fully_addressable and [device.platform for device in leaf.devices()] == ["cpu"]


def _on_host(leaf: Array) -> np.ndarray:
    with np.errstate(over="ignore"):
        return _sums(np, np.asarray(_plain(leaf)))


def _on_devices(leaf: Array) -> np.ndarray:
    plain = _plain(leaf)
    return np.asarray(jax.device_get(_program(plain)(plain)))


def _program(leaf: Array) -> Any:
    return _on_cpus if next(iter(leaf.devices())).platform == "cpu" else _on_others


def _plain(leaf: Array) -> Array:
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def _sums(xp: Any, leaf: Any, begin: Sequence[int] = ()) -> Any:
    """uint32 [2]: the words of an array, each mixed with its place in the whole, summed modulo 2³²: a sum has no order,
    so it does not matter which device holds which part. xp: numpy, or jax.numpy. A part of a whole has its `begin`."""
    words, sums = _words(xp, leaf), []
    # Of complex numbers the first axis is their two halves, of numbers of 64 bits the last.
    front = (0,) if xp.issubdtype(leaf.dtype, xp.complexfloating) else ()
    first = [*front, *begin, *[0] * words.ndim][: words.ndim]
    for seed in SEEDS:
        mixed = xp.full((1,) * words.ndim, seed, xp.uint32)
        for axis, size in enumerate(words.shape):  # grows by an axis at a time, so that all but the last are cheap
            along = [-1 if i == axis else 1 for i in range(words.ndim)]
            place = xp.arange(first[axis], first[axis] + size, dtype=xp.uint32)
            mixed = _mix(mixed ^ place.reshape(along))
        sums.append(_mix(mixed ^ words).sum(dtype=xp.uint32))
    return xp.stack(sums)


_on_others = jax.jit(partial(_sums, jnp))  # a program for each shape and layout, compiled once
# XLA sums on a CPU by trees of windows, for the sake of rounding, over a copy of every mixed word: of whole numbers,
# which have no rounding, that is 10 ns a number in the place of 1.
_on_cpus = jax.jit(partial(_sums, jnp), compiler_options={"xla_disable_hlo_passes": "tree_reduction_rewriter"})


def _mix(x: Any) -> Any:
    """Every bit of a word onto every other: the last steps of MurmurHash3 (Appleby, public domain), a bijection."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _words(xp: Any, leaf: Any) -> Any:
    """The bits of an array as uint32; numbers of 64 bits get another axis of two."""
    if xp.issubdtype(leaf.dtype, xp.complexfloating):
        return xp.stack([_words(xp, leaf.real), _words(xp, leaf.imag)])
    size = leaf.dtype.itemsize
    if size == 8:
        return leaf[..., None].view(xp.uint32)
    if size == 4:
        return leaf.view(xp.uint32)
    return leaf.view(f"uint{8 * size}").astype(xp.uint32)
