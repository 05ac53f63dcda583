"""Published runs, as the planner prices them: blocks of other widths than ours on the planner's own formulas."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from gptjax.config import Config, ModelConfig, TrainConfig
from gptjax.model.accounting import Reading
from gptjax.planner.arithmetic import passes
from gptjax.planner.chips import Topology, topology
from gptjax.planner.cost import times
from gptjax.planner.place import Place
from gptjax.planner.published import SHAPES, Name, Run, Shape
from gptjax.planner.search import named
from gptjax.planner.traffic import traffic
from gptjax.sharding.mesh import MESH_AXES, degrees
from gptjax.sharding.rules import rule_table

INT8 = {"v5e": 3.94e14, "v5p": 9.18e14, "v6e": 1.836e15}
"""FLOP/s of int8 products, in which 8-bit runs on these chips computed; they stand where float8 does."""


@dataclass(frozen=True)
class Guest(Place):
    """A decoder of others on a mesh: the planner's formulas with its widths. Biases, norms and positions have no part
    in them, nor has a second embedding in traffic."""

    shape: Shape = SHAPES["GPT-3 175B"]
    again: tuple[Name, ...] = ()
    attention_again: bool = True

    @property
    def recomputed(self) -> dict[str, float]:
        return dict.fromkeys(self.again, 1.0) | {"attention": float(self.attention_again)}

    @cached_property
    def local_trained(self) -> float:
        return self.shape.params / self.mesh["fsdp"] / self.mesh["tensor"]

    @cached_property
    def restarts(self) -> bool:
        return False


def where(run: Run) -> Topology:
    """Its devices; int8 stands for float8 where it was used."""
    found = topology(run.topology, run.slices)
    peak = INT8.get(found.family)
    return replace(found, chip=replace(found.chip, float8=peak)) if run.bits == 8 and peak else found


def guest(run: Run, pod: Topology) -> Guest:
    """A run as the planner sees it."""
    s = run.shape
    size = round(run.batch * pod.num_devices)
    remat: Literal["dots", "full"] = "full" if "projection" in run.again else "dots"
    heads = s.attention // 128
    model = ModelConfig(
        s.layers,
        heads,
        s.width,
        s.length,
        s.vocab,
        num_kv_heads=heads // s.shared,
        head_size=128,
        mlp_size=s.mlp,
        activation="swiglu" if s.gated else "gelu_tanh",
        fp8=run.bits == 8,
        remat=remat,
    )
    plain = Config("published", model, train=TrainConfig(batch_size=size, micro_batch_size=size))
    config = named(plain, run.layout)
    mesh = dict(zip(MESH_AXES, degrees(config.layout, pod.num_devices), strict=True))
    return Guest(
        config, pod, mesh, (), {}, rule_table(config.layout), Reading(model), s, run.again, run.attention_again
    )


def predicted(run: Run, pod: Topology | None = None) -> float:
    """Tokens a second and chip, evaluation included where the published figure includes it."""
    pod = pod or where(run)
    here = guest(run, pod)
    step = sum(times(here, traffic(here)).values())
    if run.evaluated:
        reading = replace(here.reading, trained=False)
        step += run.evaluated * sum(passes(here.of(reading)).values())
    return here.config.step_tokens / step / pod.chips
