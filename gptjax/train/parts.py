"""The trainable and the frozen part of a tree of parameters, told apart by name, and the tree of both."""

from collections.abc import Callable
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

Params = Any
"""Nested dicts of arrays, or of what stands for them."""


def split(params: Params, which: Callable[[str], bool]) -> tuple[Params, Params]:
    """(the parameters that are not `which`, those that are), by names such as units/block_0/qkv/kernel."""
    flat = flatten_dict(params, sep="/")
    chosen = {name: leaf for name, leaf in flat.items() if which(name)}
    rest = {name: leaf for name, leaf in flat.items() if name not in chosen}
    return unflatten_dict(rest, sep="/"), unflatten_dict(chosen, sep="/")


def join(one: Params, other: Params) -> Params:
    """The tree of both parts, which have no name in common."""
    if not one or not other:
        return one or other
    return unflatten_dict(flatten_dict(one, sep="/") | flatten_dict(other, sep="/"), sep="/")
