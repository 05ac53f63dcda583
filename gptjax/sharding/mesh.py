"""The device mesh: six named axes, slowest network first."""

from collections.abc import Sequence

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from gptjax.config import Config, LayoutConfig, nearest_divisor
from gptjax.errors import UserError

MESH_AXES = ("replica", "data", "fsdp", "context", "tensor", "pipeline")
AUTO = (AxisType.Auto,) * len(MESH_AXES)  # explicit, for the default changed in jax 0.9


def degrees(layout: LayoutConfig, num_devices: int) -> tuple[int, ...]:
    """Sizes of MESH_AXES on so many devices; -1 takes what the others leave.

    Raises UserError when the product is not the number of devices.
    """
    given = {"data": layout.data, "fsdp": layout.fsdp, "context": layout.context, "tensor": layout.tensor}
    free = [name for name, degree in given.items() if degree == -1]
    if len(free) > 1:
        raise UserError(f"layout.{free[1]} = -1: layout.{free[0]} is -1 already; nearest 1")
    if wrong := [name for name, degree in given.items() if degree < 1 and degree != -1]:
        raise UserError(f"layout.{wrong[0]} = {given[wrong[0]]}: must be positive, or -1 for the rest; nearest 1")
    fixed = 1
    for name, degree in given.items():
        fixed *= 1 if name in free else degree
    if num_devices % fixed or (not free and fixed != num_devices):
        name = max((n for n in given if n not in free), key=lambda n: given[n])
        near = nearest_divisor(num_devices * given[name] // fixed or 1, given[name])
        shape = " x ".join(f"{n} {d}" for n, d in given.items())
        raise UserError(
            f"layout.{name} = {given[name]}: {shape} does not match {num_devices} device(s); nearest {near}"
            + ("" if free else ", or -1 for whatever is attached")
        )
    if free:
        given[free[0]] = num_devices // fixed
    return tuple(given.get(axis, 1) for axis in MESH_AXES)


def check(config: Config, sizes: tuple[int, ...]) -> None:
    """Does the config divide over a mesh of these sizes? Raises UserError, before anything is compiled."""
    mesh = dict(zip(MESH_AXES, sizes, strict=True))
    model, micro = config.model, config.micro_batch_size
    batch_ways = mesh["replica"] * mesh["data"] * mesh["fsdp"]
    if micro % batch_ways:
        near = max(1, round(micro / batch_ways)) * batch_ways
        name = "train.micro_batch_size" if config.train.micro_batch_size else "train.batch_size"
        raise UserError(
            f"{name} = {micro}: not divisible by replica x data x fsdp = {batch_ways} of the mesh; nearest {near}"
        )
    if model.num_heads % mesh["tensor"]:
        near = nearest_divisor(model.num_heads, mesh["tensor"])
        raise UserError(
            f"layout.tensor = {mesh['tensor']}: does not divide model.num_heads = {model.num_heads}; nearest {near}"
        )
    if model.embed_dim % mesh["fsdp"]:
        near = nearest_divisor(model.embed_dim, mesh["fsdp"])
        raise UserError(
            f"layout.fsdp = {mesh['fsdp']}: does not divide model.embed_dim = {model.embed_dim}; nearest {near}"
        )
    if mesh["context"] > 1:
        _check_context(config, mesh["context"])
    parts = mesh["context"] * mesh["tensor"]
    if config.layout.sequence_sharding and model.seq_len % parts:
        near = nearest_divisor(model.seq_len, parts) // mesh["context"]
        raise UserError(
            f"layout.sequence_sharding: layout.context x layout.tensor = {parts} does not divide model.seq_len = "
            f"{model.seq_len}; nearest layout.tensor {max(1, near)}"
        )


def _check_context(config: Config, ways: int) -> None:
    """The sequence is cut into two chunks per device, and the band must reach no further than one chunk back."""
    model = config.model
    reach = model.window - 1 if "banded" in model.attention_pattern and model.window < model.seq_len else 0
    whole = [d for d in range(1, model.seq_len // 2 + 1) if model.seq_len % (2 * d) == 0]
    possible = [d for d in whole if reach <= model.seq_len // (2 * d)] or [1]
    if ways in possible:
        return
    reason = f"twice that does not divide model.seq_len = {model.seq_len}"
    if ways in whole:
        chunk = model.seq_len // (2 * ways)
        reason = f"chunks of {chunk} positions are shorter than model.window - 1 = {reach}"
    raise UserError(f"layout.context = {ways}: {reason}; nearest {min(possible, key=lambda d: abs(d - ways))}")


def make_mesh(config: Config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The checked mesh of a config on the given devices (default: all that are attached)."""
    devices = jax.devices() if devices is None else devices
    sizes = degrees(config.layout, len(devices))
    check(config, sizes)
    return jax.make_mesh(sizes, MESH_AXES, axis_types=AUTO, devices=devices)


def abstract_mesh(config: Config, num_devices: int) -> AbstractMesh:
    """The same mesh without devices: for shapes, shardings and checks of pods that are not there."""
    sizes = degrees(config.layout, num_devices)
    check(config, sizes)
    return AbstractMesh(sizes, MESH_AXES, axis_types=AUTO)
