"""Learning rate and batch size as pure functions of tokens seen (GPT-3, appendix B): no hidden state to resume."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from gptjax.config import Config, OptimizerConfig
from gptjax.errors import UserError


def learning_rate(config: OptimizerConfig, tokens: int) -> float:
    """Linear warm-up from 0, then down to final_ratio of the peak at decay_tokens, by a cosine or a line, and constant
    afterwards; or with the root of the tokens for good (arXiv 1706.03762, equation 3)."""
    peak, floor = config.learning_rate, config.learning_rate * config.final_ratio
    if tokens < config.warmup_tokens:
        return peak * tokens / config.warmup_tokens
    if config.decay == "root":
        return peak * math.sqrt(max(config.warmup_tokens, 1) / max(tokens, 1))
    if tokens >= config.decay_tokens:
        return floor
    progress = (tokens - config.warmup_tokens) / (config.decay_tokens - config.warmup_tokens)
    left = 1 - progress if config.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return floor + (peak - floor) * left


def batch_size(config: Config, tokens: int) -> int:
    """Sequences of the step that starts at `tokens`: the linear ramp, rounded down to `ramp_multiple`.

    The ramp changes the number of micro-batches, never a compiled shape.
    """
    full, start = config.train.batch_size, config.train.ramp_start
    if not start or tokens >= config.train.ramp_tokens:
        return full
    exact = start + (full - start) * tokens / config.train.ramp_tokens
    return int(exact // config.ramp_multiple) * config.ramp_multiple


def steps(config: Config, step: int, tokens: int) -> Iterator[tuple[int, int, int]]:
    """(step, tokens before it, its batch size) from a position to the end of training."""
    while tokens < config.train.total_tokens:
        size = batch_size(config, tokens)
        yield step, tokens, size
        step, tokens = step + 1, tokens + size * config.row_tokens * config.updates


def with_length(config: Config, epoch_tokens: Callable[[], int]) -> Config:
    """The config with the length of training in tokens alone: the least of `total_tokens`, `total_steps` and `epochs`;
    and a decay that ends with it, where it says so. `epoch_tokens` is asked where there are epochs.

    Raises UserError where the warm-up would be longer than that.
    """
    train, optimizer = config.train, config.optimizer
    total = known_tokens(config)
    if train.epochs:
        total = min(total, max(1, round(train.epochs * epoch_tokens())))
    decay = optimizer.decay_tokens or total
    if optimizer.warmup_tokens > decay:
        raise UserError(
            f"optimizer.warmup_tokens = {optimizer.warmup_tokens}: longer than the training of {total:,} tokens; "
            f"nearest {total}"
        )
    return replace(
        config,
        train=replace(train, total_tokens=total, total_steps=0),
        optimizer=replace(optimizer, decay_tokens=decay),
    )


def known_tokens(config: Config) -> int:
    """Tokens at which training ends by `total_tokens` and `total_steps`, which no text is needed for."""
    total, count = config.train.total_tokens, config.train.total_steps
    return min(total, _tokens_after(config, count)) if count else total


def _tokens_after(config: Config, count: int) -> int:
    """Tokens of the first `count` steps."""
    train, step, tokens = config.train, 0, 0
    while train.ramp_start and step < count and tokens < train.ramp_tokens:
        step, tokens = step + 1, tokens + batch_size(config, tokens) * config.row_tokens * config.updates
    return tokens + (count - step) * config.step_tokens


def total_steps(config: Config) -> int:
    """Steps of the whole run: the ramp is walked, the constant rest divided (GPT-3 175B: 109,148)."""
    step = tokens = 0
    while tokens < min(config.train.ramp_tokens, config.train.total_tokens) and config.train.ramp_start:
        step, tokens = step + 1, tokens + batch_size(config, tokens) * config.row_tokens * config.updates
    left = max(0, config.train.total_tokens - tokens)
    return step + -(-left // config.step_tokens)
