"""What comes before the updates of a policy that learns from its own replies: they are drawn, and judged.

Prompts and replies are taken to be as long as they may be. Other stages draw nothing: it costs them nothing.
"""

import math
from dataclasses import dataclass, replace

from gptjax.config import RewardedConfig
from gptjax.model.accounting import Reading, cache_bytes
from gptjax.planner.arithmetic import passes
from gptjax.planner.place import FLOAT, Place
from gptjax.planner.traffic import Rates, judged

SHARED_ROWS = 1  # of an engine's, beside the slots: what prompts share
SAMPLING = 9  # bytes that an engine keeps of each id for a row: its bias, how often it was drawn, whether it was seen


@dataclass(frozen=True)
class Rollout:
    """How an engine draws the replies of an iteration, on each device."""

    steps: int
    """Of decoding: a token in every slot."""
    parts: dict[str, float]
    """Seconds of a step that read weights, keys and values, multiply, or send. The first two take turns, and hide the
    products or are hidden by them."""
    prompts: float
    """Seconds in which prompts are read."""

    @property
    def step_seconds(self) -> float:
        p = self.parts
        return max(p["weights"] + p["keys and values"], p["products"]) + p["network"]

    @property
    def seconds(self) -> float:
        return self.prompts + self.steps * self.step_seconds


def rollout(place: Place) -> Rollout | None:
    """None for a stage that draws nothing.

    Every device computes all of the policy's layers, but for what `tensor` cuts of them: where parameters are cut over
    `fsdp` or `pipeline`, every step gathers them.
    """
    c, model, mesh = place.config, place.model, place.mesh
    if not isinstance(c, RewardedConfig):
        return None
    chip, rates, rows, tensor = place.topology.chip, Rates(place), cache_rows(place), mesh["tensor"]
    prompt, reply = c.text_tokens
    weights = place.matrices * model.num_layers + place.embedding
    context = prompt + reply // 2  # in the mean
    keys = sum(min(model.window, context) if kind == "banded" else context for kind in model.layer_kinds)
    flops = 2 * rows * (weights / place.width + 2 * place.attention_width * keys / tensor)
    residual = 2 * model.num_layers * rows * model.embed_dim * place.width  # summed twice a layer
    sent = (("all-gather", ("pipeline", "fsdp"), weights), ("all-reduce", ("tensor",), residual))
    parts = {
        "weights": weights / chip.hbm_rate,
        "keys and values": place.padding * cache_bytes(model, rows, context, place.width) / tensor / chip.hbm_rate,
        "products": flops / (chip.flops * chip.matmul),
        "network": sum(rates.seconds(*each) for each in sent),
    }
    read = place.of(Reading(replace(model, seq_len=prompt), trained=False, predicts=False))
    prompts = sum(passes(read).values()) * c.rollout.episodes / c.micro_batch_size
    return Rollout(math.ceil(c.rollout.episodes / c.rollout.slots) * reply, parts, prompts)


def cache_rows(place: Place) -> int:
    """Rows of an engine's cache on a device: the slots, and those that keep what prompts share."""
    assert isinstance(place.config, RewardedConfig)
    return math.ceil((place.config.rollout.slots + SHARED_ROWS) / place.ways("batch"))


def drawing(place: Place) -> list[tuple[str, str, float]]:
    """(part, what, bytes) of what is there while replies are drawn, beside the parameters."""
    if not isinstance(place.config, RewardedConfig):
        return []
    model, rows = place.model, cache_rows(place)
    kept = place.padding * cache_bytes(model, rows, model.seq_len, place.width)
    every = rows * place.ways("batch") * model.padded_vocab_size
    policy = place.of(place.reading).local_trained
    return [
        ("cache", "keys and values of replies", kept / place.ways("layers") / place.ways("heads")),
        ("cache", "what sampling keeps of each id", SAMPLING * every),
        ("temporaries", "the policy in the compute dtype", policy * place.width if place.width < FLOAT else 0.0),
        ("temporaries", "weights of the layer at work, and the embedding", place.matrices + place.embedding),
        ("temporaries", "logits in float32", FLOAT * rows * model.padded_vocab_size / place.ways("vocab")),
    ]


def judging(place: Place) -> float:
    """Seconds in which the replies of an iteration are judged; 0 of a stage that judges none."""
    if not isinstance(place.config, RewardedConfig):
        return 0.0
    calls = math.ceil(place.config.rollout.episodes / place.config.micro_batch_size)
    compute = calls * place.stretch * sum(sum(passes(model).values()) for model in place.judges)
    return compute + sum(transfer.exposed for transfer in judged(place, calls, compute))
