"""The device mesh: six named axes, slowest network first."""

from collections.abc import Sequence
from dataclasses import replace
from math import gcd

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from gptjax.config import Config, LayoutConfig, nearest_divisor
from gptjax.config.check import in_section
from gptjax.errors import UserError

MESH_AXES = ("replica", "pipeline", "data", "fsdp", "context", "tensor")
AUTO = (AxisType.Auto,) * len(MESH_AXES)  # explicit, for the default changed in jax 0.9


def degrees(layout: LayoutConfig, num_devices: int) -> tuple[int, ...]:
    """Sizes of MESH_AXES on so many devices; -1 takes what the others leave.

    Raises UserError when the product is not the number of devices.
    """
    given: dict[str, int] = {name: getattr(layout, name) for name in MESH_AXES}
    free = [name for name, degree in given.items() if degree == -1]
    if len(free) > 1:
        raise UserError(f"layout.{free[1]} = -1: layout.{free[0]} is -1 already; nearest 1")
    fixed = 1
    for name, degree in given.items():
        fixed *= 1 if name in free else degree
    if num_devices % fixed or (not free and fixed != num_devices):
        name = max((n for n in given if n not in free), key=lambda n: given[n])
        whole, rest = divmod(num_devices * given[name], fixed)
        near = whole if not (free or rest) else nearest_divisor(whole or 1, given[name])
        shape = " x ".join(f"{n} {d}" for n, d in given.items() if d != 1) or f"{name} 1"
        raise UserError(
            f"layout.{name} = {given[name]}: {shape} does not match {num_devices} device(s); nearest {near}"
            + ("" if free else ", or -1 for whatever is attached")
        )
    if free:
        given[free[0]] = num_devices // fixed
    return tuple(given.values())


def check(config: Config, sizes: tuple[int, ...]) -> None:
    """Does the config divide over a mesh of these sizes? Raises UserError, before anything is compiled."""
    mesh = dict(zip(MESH_AXES, sizes, strict=True))
    batch_ways = mesh["replica"] * mesh["data"] * mesh["fsdp"]
    _check_rows(config, batch_ways)
    for section, model in config.models.items():
        with in_section(section):
            _check_model(replace(config, model=model), mesh)
    _check_pipeline(config, mesh["pipeline"], config.micro_batch_size // batch_ways)


def _check_model(config: Config, mesh: dict[str, int]) -> None:
    """One of the config's models."""
    model = config.model
    whole = {
        "an encoder": ("context",) if not model.causal else (),
        "relative positions": ("context", "pipeline") if model.positions == "relative" else (),
        "cross-attention": ("context", "pipeline") if model.cross_attention else (),
    }
    for what, axes in whole.items():
        if over := [axis for axis in axes if mesh[axis] > 1]:
            raise UserError(f"layout.{over[0]} = {mesh[over[0]]}: {what} cannot be split so; nearest 1")
    if model.num_heads % mesh["tensor"]:
        near = nearest_divisor(model.num_heads, mesh["tensor"])
        raise UserError(
            f"layout.tensor = {mesh['tensor']}: does not divide model.num_heads = {model.num_heads}; nearest {near}"
        )
    if model.kv_heads % mesh["tensor"]:
        near = nearest_divisor(model.kv_heads, mesh["tensor"])
        raise UserError(
            f"layout.tensor = {mesh['tensor']}: does not divide model.num_kv_heads = {model.kv_heads}; nearest {near}"
        )
    if model.mlp_dim % mesh["tensor"]:
        near = nearest_divisor(model.mlp_dim, mesh["tensor"])
        raise UserError(
            f"layout.tensor = {mesh['tensor']}: does not divide model.mlp_size = {model.mlp_dim}; nearest {near}"
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


def _check_rows(config: Config, ways: int) -> None:
    """Every device gets as many rows of a micro-batch. What is said to be nearest is allowed by batch, ramp and lanes,
    which a run that goes on with other devices keeps."""
    train, micro = config.train, config.micro_batch_size
    if micro % ways == 0:
        return
    whole = train.ramp_multiple or gcd(train.batch_size, train.ramp_start)
    possible = [m for m in range(ways, whole + 1, ways) if whole % m == 0 and m % config.data.lanes == 0]
    if possible:
        near = min(possible, key=lambda m: abs(m - micro))
        raise UserError(
            f"train.micro_batch_size = {micro}: not divisible by replica x data x fsdp = {ways} of the mesh; "
            f"nearest {near}"
        )
    near, product = max(1, round(train.batch_size / ways)) * ways, max(d for d in range(1, ways) if whole % d == 0)
    raise UserError(
        f"train.batch_size = {train.batch_size}: its micro-batches are not divisible by replica x data x fsdp = {ways} "
        f"of the mesh; nearest {near}, or a product of {product}, with the other devices in layout.tensor, context or "
        "pipeline, or left out"
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


def _check_pipeline(config: Config, stages: int, rows: int) -> None:
    """Every stage gets as many groups of layers as there are rounds, and every device `rows` of the batch."""
    model, layout = config.model, config.layout
    if stages == 1:
        for name, value, default in (("rounds", layout.pipeline_rounds, 1), ("chunks", layout.pipeline_chunks, 0)):
            if value != default:
                raise UserError(f"layout.pipeline_{name} = {value}: there is one stage; nearest {default}")
        return
    if not model.scan_layers:
        raise UserError(f"layout.pipeline = {stages}: stages are dealt scanned layers; set model.scan_layers true")
    units, rounds = model.num_layers // len(model.attention_pattern), layout.pipeline_rounds
    if units % stages:
        near = nearest_divisor(units, stages)
        raise UserError(
            f"layout.pipeline = {stages}: does not divide the {units} repeats of the pattern; nearest {near}"
        )
    groups = [r for r in range(1, units // stages + 1) if units % (stages * r) == 0]
    possible = [r for r in groups if not (stages % r and r % stages)]  # else dealing them out would gather all layers
    if rounds not in possible:
        closest = min(possible, key=lambda r: abs(r - rounds))
        raise UserError(
            f"layout.pipeline_rounds = {rounds}: {units} repeats of the pattern go round {stages} stages "
            f"{', '.join(map(str, possible))} times; nearest {closest}"
        )
    chunks = layout.pipeline_chunks or rows
    whole = [c for c in range(stages, rows + 1, stages) if rows % c == 0]
    if chunks not in whole:
        name = "layout.pipeline_chunks" if layout.pipeline_chunks else "layout.pipeline_chunks = 0, so"
        remedy = f"nearest {min(whole, key=lambda c: abs(c - chunks))}" if whole else f"use a multiple of {stages} rows"
        raise UserError(
            f"{name} = {chunks}: must be a multiple of layout.pipeline = {stages} that divides the {rows} row(s) a "
            f"device has of a micro-batch; {remedy}"
        )


def make_mesh(config: Config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The checked mesh of a config on the given devices (default: all that are attached).

    Devices of several slices put `replica`, and `pipeline` if need be, on the network between them. Raises UserError
    where the two are not as many as the slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = degrees(config.layout, len(devices))
    check(config, sizes)
    # GPU nodes have slice numbers too, but a network that any axis may cross.
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    if slices == 1:
        placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(placed, MESH_AXES, axis_types=AUTO)
    across = _across_slices(sizes, slices)
    within = tuple(size // a for size, a in zip(sizes, across, strict=True))
    placed = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    return Mesh(placed, MESH_AXES, axis_types=AUTO)


def _across_slices(sizes: tuple[int, ...], slices: int) -> tuple[int, ...]:
    """The part of each axis that crosses slices: all of `replica`, and of `pipeline` what is left."""
    replica, stages = sizes[0], sizes[1]
    if slices % replica or stages % (slices // replica):
        raise UserError(
            f"layout.replica = {replica}: there are {slices} slices, so layout.replica must be {slices}, or a divisor "
            f"of it with layout.pipeline taking the rest; nearest {slices}"
        )
    return (replica, slices // replica, *(1 for _ in sizes[2:]))


def abstract_mesh(config: Config, num_devices: int) -> AbstractMesh:
    """The same mesh without devices: for shapes, shardings and checks of pods that are not there."""
    sizes = degrees(config.layout, num_devices)
    check(config, sizes)
    return AbstractMesh(sizes, MESH_AXES, axis_types=AUTO)
