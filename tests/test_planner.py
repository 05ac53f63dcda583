"""The planner against what compilers make of the same step, closed forms, and published runs."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gptjax import cli
from gptjax.config import Config, LayoutConfig, ModelConfig, TrainConfig
from gptjax.errors import UserError
from gptjax.loading import load_config
from gptjax.model.accounting import train_flops_per_token
from gptjax.planner import cost
from gptjax.planner.bill import Collective, read
from gptjax.planner.check import replicated, unexpected
from gptjax.planner.chips import Chip, Topology, topology, wiring
from gptjax.planner.compile import Compiled, compile_all, lower, needed
from gptjax.planner.explain import diff, explain
from gptjax.planner.plan import Row, Settings, plan
from gptjax.planner.search import finalists, layouts, name, named, priced, search
from gptjax.sharding.mesh import MESH_AXES

CONFIGS = Path(__file__).parents[1] / "configs"
CPU = Topology("cpu-8", "cpu", Chip("CPU", 1e11, 1e10, 1e10, 1e10, 1e9, 0.7, "cpu"), (8,))
SMALL = Config(
    name="small",
    model=ModelConfig(
        num_layers=4,
        num_heads=8,
        embed_dim=256,
        seq_len=256,
        vocab_size=512,
        attention_pattern=("dense", "banded"),
        window=64,
    ),
    train=TrainConfig(batch_size=32, micro_batch_size=16),
)
# What each layout is for, and how close formula and program are: bytes over every group of mesh axes.
BILLED = {
    "fsdp": LayoutConfig(fsdp=8),
    "data": LayoutConfig(data=8, fsdp=1),
    "tensor": LayoutConfig(fsdp=1, tensor=8),
    "fsdp_tensor": LayoutConfig(fsdp=4, tensor=2),
    "fsdp_tensor_sequence": LayoutConfig(fsdp=4, tensor=2, sequence_sharding=True),
    "replica_fsdp": LayoutConfig(replica=2, fsdp=4),
    "pipeline_fsdp": LayoutConfig(pipeline=2, fsdp=4),
    "pipeline_tensor": LayoutConfig(pipeline=2, fsdp=1, tensor=4),
}


# Chips and topologies


@pytest.mark.parametrize(
    ("text", "devices", "shape", "wrapped"),
    [
        ("v5p-1024", 512, (8, 8, 8), True),
        ("v4-8", 4, (2, 2, 1), False),
        ("v5e-256", 256, (16, 16), True),
        ("v5litepod-64", 64, (8, 8), False),
        ("v6e-8", 8, (2, 4), False),
        ("tpu7x-128", 128, (4, 4, 4), True),
        ("h100-8x64", 512, (8,), False),
    ],
)
def test_names_as_users_know_them(text: str, devices: int, shape: tuple[int, ...], wrapped: bool) -> None:
    found = topology(text)
    assert (found.num_devices, found.shape) == (devices, shape)
    assert found.chip.platform == "gpu" or all(found.wrap) == wrapped


@pytest.mark.parametrize(
    ("text", "slices", "message"),
    [
        ("v9-8", 1, "expected one of v4-N"),
        ("v5p-1000", 1, "no slice of v5p has that size; nearest v5p-1024"),
        ("v5e-100", 1, "nearest v5e-128"),
        ("v5p-7", 1, "nearest v5p-8"),
        ("h100-8", 1, "h100-8x64"),
        ("v5p-128", 0, "--slices 0: must be positive"),
        ("h100-8x2", 2, "counted in the name"),
    ],
)
def test_topologies_that_are_none(text: str, slices: int, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        topology(text, slices)


def test_mesh_axes_on_the_torus() -> None:
    """8x8x8: tensor takes a whole ring, fsdp the two others; parts of a ring and open rings give half."""
    link = topology("v5p-1024").chip.link
    whole = wiring(topology("v5p-1024"), {"fsdp": 64, "tensor": 8})
    assert whole == {"fsdp": (2 * link, 2), "tensor": (link, 1)}
    parts = wiring(topology("v5p-1024"), {"fsdp": 128, "tensor": 4})
    assert parts["tensor"] == (link / 2, 1)
    assert wiring(topology("v5e-64"), {"fsdp": 8, "tensor": 8})["fsdp"] == (topology("v5e-64").chip.link / 2, 1)


# The bill


def compiled_text(function, *arguments) -> str:  # type: ignore[no-untyped-def]
    return jax.jit(function).lower(*arguments).compile().as_text()


@given(turns=st.integers(1, 9), ways=st.sampled_from([2, 4]))
@settings(max_examples=6)
def test_a_loop_counts_as_often_as_it_turns(turns: int, ways: int) -> None:
    """A sum over one axis of a 2-axis mesh, in a scan in a scan."""
    mesh = Mesh(np.array(jax.devices()).reshape(8 // ways, ways), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    def body(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jax.lax.psum(x, "b") * 0.5, None

    def nested(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jax.lax.scan(body, x, None, length=turns)[0], None

    def run(x: jax.Array) -> jax.Array:
        inner = jax.shard_map(
            lambda x: jax.lax.scan(nested, x, None, length=3)[0],
            mesh=mesh,
            in_specs=PartitionSpec("a"),
            out_specs=PartitionSpec("a"),
        )
        return inner(x)

    (found,) = read(compiled_text(run, jnp.zeros((8, 16))), {"a": 8 // ways, "b": ways})
    assert (found.kind, found.axes, found.ways, found.count) == ("all-reduce", ("b",), ways, 3 * turns)
    assert found.bytes == 8 // (8 // ways) * 16 * 4


def test_gathers_and_permutes_over_their_axes() -> None:
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    spec = PartitionSpec(("a", "b"))

    def run(x: jax.Array) -> jax.Array:
        def here(x: jax.Array) -> jax.Array:
            x = jax.lax.ppermute(x, "a", [(0, 1), (1, 0)])
            return jnp.sum(jax.lax.all_gather(x, "b", tiled=True), keepdims=True)

        return jax.shard_map(here, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(x)

    found = {c.kind: c for c in read(compiled_text(run, jnp.zeros(80)), {"a": 2, "b": 4})}
    assert (found["collective-permute"].axes, found["collective-permute"].bytes) == (("a",), 40)
    assert (found["all-gather"].axes, found["all-gather"].bytes) == (("b",), 160)


TPU_TEXT = """HloModule m

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %s = f32[] add(%x, %y)
}

%piece.1 (p: bf16[16,8]) -> bf16[64,8] {
  %p = bf16[16,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %g.1 = bf16[64,8]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
}

%piece.2 (p: bf16[16,8]) -> bf16[64,8] {
  %p = bf16[16,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %g.2 = bf16[64,8]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
}

%all-reduce-scatter.1 (p: f32[64,8]) -> f32[16,8] {
  %p = f32[64,8]{1,0} parameter(0)
  %r = f32[64,8]{1,0} all-reduce(%p), channel_id=8, replica_groups=mesh['a'=4,'b'=2] {'a'}, to_apply=%add
  ROOT %d = f32[16,8]{1,0} dynamic-slice(%r, %c, %c), dynamic_slice_sizes={16,8}
}

%cond (t: (s32[], f32[64,8])) -> pred[] {
  %n = s32[]{:T(128)} constant(5)
  %t = (s32[], f32[64,8]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body (t: (s32[], f32[64,8])) -> (s32[], f32[64,8]) {
  %t = (s32[], f32[64,8]) parameter(0)
  %a = bf16[64,8] fusion(%t), kind=kCustom, calls=%piece.1
  %b = bf16[64,8] fusion(%t), kind=kCustom, calls=%piece.2
  %c = f32[16,8] fusion(%t), kind=kCustom, calls=%all-reduce-scatter.1
  %z = f32[64,8] dynamic-update-slice(%o, %q, %i, %k)
  %w = f32[64,8] all-reduce(%z), channel_id=9, replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add
  ROOT %r = (s32[], f32[64,8]) tuple(%i, %w)
}

%open (t: (s32[], s32[], f32[64,8])) -> pred[] {
  %t = (s32[], s32[], f32[64,8]) parameter(0)
  ROOT %lt = pred[] compare(%i, %m), direction=LT
}

%outer (t: (s32[], s32[], f32[64,8])) -> (s32[], s32[], f32[64,8]) {
  %w = (s32[], f32[64,8]) while(%t), condition=%cond, body=%body
}

ENTRY %main (p: f32[64,8]) -> f32[64,8] {
  %w = (s32[], s32[], f32[64,8]) while(%p), condition=%open, body=%outer
}
"""


def test_the_forms_of_the_tpu_compiler() -> None:
    """A gather repeated in the fusions that hide it, a reduce-scatter inside a fusion, a gather written as a sum of
    zero-padded parts, groups in three notations, and trips from a condition or from the caller."""
    found = {(c.kind, c.disguised): c for c in read(TPU_TEXT, {"a": 4, "b": 2}, dynamic_trips=3)}
    assert len(found) == 3
    gather, scatter, padded = found["all-gather", False], found["reduce-scatter", False], found["all-gather", True]
    assert (gather.axes, gather.bytes, gather.count, gather.overlapped) == (("a",), 64 * 8 * 2, 15, True)
    assert (scatter.axes, scatter.bytes, scatter.count, scatter.overlapped) == (("a",), 64 * 8 * 4, 15, False)
    assert (padded.axes, padded.count) == (("a",), 15)


def by_axes(transfers: Iterator) -> Counter:  # type: ignore[type-arg]
    sent: Counter[tuple[str, ...]] = Counter()
    for axes, size in transfers:
        sent[axes] += size
    return sent


@pytest.mark.slow
@pytest.mark.parametrize("layout", BILLED)
def test_formulas_are_what_the_program_sends(layout: str) -> None:
    """Every formula against the compiled step, axis by axis, within 5%."""
    config = replace(SMALL, layout=BILLED[layout])
    if config.layout.pipeline > 1:  # this compiler gathers a stage's weights once a step, the TPU's once a micro-batch
        config = replace(config, train=replace(config.train, micro_batch_size=32))
    lowered, mesh = lower(config, CPU)
    program = read(lowered.compile().as_text(), mesh, config.max_accumulation)
    billed = by_axes((c.axes, c.total) for c in program)
    formula = by_axes((t.axes, t.bytes) for t in cost.traffic(cost.place(config, CPU)))
    for axes in billed.keys() | formula.keys():
        if billed[axes] > 0.005 * billed.total():
            assert formula[axes] == pytest.approx(billed[axes], rel=0.05), axes
    assert formula.total() == pytest.approx(billed.total(), rel=0.05)


@pytest.mark.slow
def test_a_broken_rule_is_named() -> None:
    """An MLP that a table forgets: the weight is named before, and what it costs on the network after compiling."""
    config = replace(SMALL, layout=LayoutConfig(fsdp=4, tensor=2))
    right = cost.place(config, CPU)
    assert replicated(right) == []
    assert unexpected(right, _program(config)) == []
    broken = cost.place(config, CPU, rules=right.rules | {"mlp": ()})
    (line, *more) = replicated(broken)
    assert line.startswith("units/block_0/mlp_up/kernel: ")
    assert "mlp -> nothing" in line
    assert len(more) == 3
    # The length split over tensor where the model does not expect it: activations are gathered before each product.
    lines = unexpected(right, _program(config, right.rules | {"length": ("tensor",), "residual_length": ("tensor",)}))
    assert any("tensor" in line and "all-gather" in line for line in lines), lines


def _program(config: Config, rules: dict | None = None) -> tuple[Collective, ...]:  # type: ignore[type-arg]
    lowered, mesh = lower(config, CPU, rules)
    return tuple(read(lowered.compile().as_text(), mesh, config.max_accumulation))
