"""`gptjax bench ppo CONFIG`: what an iteration of a policy that learns from its own replies spends its time on, and how
fast it draws beside an engine that does nothing else.

The numbers are of a run's own: its prompts, its weights, its reward. Programs that are compiled are counted, for after
the second iteration there should be none.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np

from gptjax.bench.measure import provenance, save
from gptjax.bench.work import Work
from gptjax.config import Config, RewardedConfig
from gptjax.errors import UserError
from gptjax.infer.engine import Engine
from gptjax.stages.launch import first_params, prepare, with_text
from gptjax.stages.on_policy import OnPolicy
from gptjax.stages.rollout import requests
from gptjax.stages.weights import first_weights
from gptjax.train.checkpoint import Position
from gptjax.train.loop import batches
from gptjax.train.step import MICRO_BATCHES, make_step, placed, start_state

COMPILED = "/jax/core/compile/backend_compile_duration"  # as JAX calls what it tells of each compilation
WARM = 2  # iterations that may compile
Row = dict[str, Any]


def run(config: Config, iterations: int, folder: Path) -> str:
    """Measure so many iterations, write ppo.json, and give the table. Raises UserError for a config of another kind."""
    if not isinstance(config, RewardedConfig):
        raise UserError(f"stage {config.stage}: draws no replies to learn from; give a config of stage ppo or grpo")
    if iterations <= WARM:
        raise UserError(f"--iterations {iterations}: the first {WARM} warm up; nearest {WARM + 1}")
    prepare(config)
    rows, alone = measured(config, iterations)
    result = {"config": config.name, "iterations": rows, "engine_tokens_per_s": alone} | summary(rows, alone)
    save(provenance() | result, folder / "ppo.json")
    return table(rows, result)


def measured(config: RewardedConfig, iterations: int) -> tuple[list[Row], float]:
    """A row for each iteration, and tokens per second of an engine alone."""
    work = Work.prepare(config, jax.devices())
    stage = with_text(work.stage)
    assert isinstance(stage, OnPolicy)
    stage.check()
    places = placed(work.abstract, work.shardings)
    load = partial(first_weights(config).start, config.model)
    state = start_state(config, stage, first_params(stage, load, places.every_param), work.shardings)
    step: Any = make_step(config, stage, work.shardings, work.layout)
    mine, sharding = range(config.micro_batch_size), work.layout.sharding(MICRO_BATCHES)
    feed = batches(config, stage, sharding, mine, Position(), lambda: state.every_param)
    rows = []
    for number in range(iterations):
        with _counted() as compiled:
            batch = next(feed)
            started = time.perf_counter()
            rate = np.float32(config.optimizer.learning_rate)
            state, _ = step(state, batch.rows, rate, np.int32(batch.num_micro), np.int32(number))
            jax.block_until_ready(state)
            seconds = time.perf_counter() - started
        told = batch.figures
        rows.append(
            {
                "rollout_s": told["rollout_s"],
                "judge_s": told["judge_s"],
                "update_s": seconds,
                "tokens": round(told["length"] * config.rollout.episodes),
                "score": told["score"],
                "kl": told["kl"],
                "compiled": len(compiled),
            }
        )
    return rows, _alone(stage, state.every_param, iterations)


def _alone(stage: OnPolicy, params: Any, iterations: int) -> float:
    """Tokens per second of an engine that answers the same prompts, once it is warm, each time drawn anew."""
    rollout = stage.config.rollout
    engine: Engine = stage.engine_with(params)
    rates = []
    for number in range(2, iterations + 2):
        prompts = [stage.prompt_of(i).ids for i in range(rollout.episodes)]
        started = time.perf_counter()
        asked = requests(engine.capacity, prompts, stage.ends, stage.sampling, number, 0, rollout.max_tokens)
        replies = engine.run(asked)
        rates.append(sum(len(reply.tokens) for reply in replies) / (time.perf_counter() - started))
    return median(rates[1:])


@contextmanager
def _counted() -> Iterator[list[float]]:
    """Seconds of each compilation meanwhile."""
    found: list[float] = []

    def note(event: str, duration_secs: float, **_: Any) -> None:
        if event == COMPILED:
            found.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


def summary(rows: list[Row], alone: float) -> Row:
    """Medians of the iterations after the warm ones, the share of the engine's own speed, and what they compiled."""
    warm = rows[WARM:]
    parts = {name: median(row[name] for row in warm) for name in ("rollout_s", "judge_s", "update_s")}
    rate = median(row["tokens"] / row["rollout_s"] for row in warm)
    return parts | {"rollout_tokens_per_s": rate, "share": rate / alone, "late": sum(row["compiled"] for row in warm)}


def table(rows: list[Row], result: Row) -> str:
    """What is printed."""
    lines = ["iteration  drawing  judging  learning  tokens   score      kl  compiled"]
    for number, row in enumerate(rows, 1):
        seconds = "".join(f"{row[name]:7.2f} s" for name in ("rollout_s", "judge_s", "update_s"))
        about = f"{row['tokens']:8,} {row['score']:7.3f} {row['kl']:7.3f} {row['compiled']:9}"
        lines.append(f"{number:9}{seconds} {about}")
    lines.append(
        f"after {WARM}: drawing {result['rollout_tokens_per_s']:,.0f} tokens/s, {result['share']:.2f} of an engine "
        f"alone ({result['engine_tokens_per_s']:,.0f}); {result['late']} programs compiled"
    )
    return "\n".join(lines)
