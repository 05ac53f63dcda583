"""Seconds of a step in which a device computes, or moves its own memory."""

from collections import Counter

from gptjax.model.accounting import mean_keys
from gptjax.planner.place import FLOAT, Place

ATTENTION_RATE = 0.5  # of the matrix rate: its products are small, and exponentials wait in between
KERNEL_BLOCK = 256  # keys that a kernel computes beyond the mask's edge, on average
UNFUSED = 0.7  # share of the traffic between operations that no fusion saves


def computation(place: Place) -> dict[str, float]:
    """Seconds of the arithmetic of a step's updates and of its own memory traffic, without the bubble."""
    micro, updates = place.config.max_accumulation, place.config.updates
    seconds = Counter[str]()
    for model in place.learners:
        seconds.update(passes(model))
    state = FLOAT * place.local_trained / place.topology.chip.hbm_rate
    optimizer = {"optimizer": state * (8 + (3 * micro if micro > 1 else 0))}
    return {part: updates * each for part, each in ({p: micro * s for p, s in seconds.items()} | optimizer).items()}


def passes(place: Place) -> dict[str, float]:
    """Seconds of one model that reads a micro-batch, forward and, where it is trained, backward."""
    model, chip, tensor, reading = place.model, place.topology.chip, place.mesh["tensor"], place.reading
    rate, trained = chip.flops * chip.matmul, reading.trained
    work = place.tokens * place.layers  # tokens x layers
    unit = len(model.attention_pattern)
    product = 24 * model.embed_dim**2 / tensor * work / rate  # the forward pass
    kinds = model.layer_kinds
    keys = sum(mean_keys(kind, model.seq_len, model.window) + KERNEL_BLOCK for kind in kinds) / len(kinds)
    attention = 4 * model.embed_dim / tensor * min(keys, model.seq_len) * work / (rate * ATTENTION_RATE)
    again = 1.0 if model.remat == "full" and trained else 0.0
    residual_ways = place.length / place.residual_length
    # Reads and writes of a layer's forward pass between its products: 12 of [T, D], 27 split over tensor.
    between = UNFUSED * place.width * model.embed_dim * (12 / residual_ways + 27 / tensor) * work / chip.hbm_rate
    crossings = 3 + (0.5 if model.remat == "dots" else again) if trained else 1
    each, in_head, in_adapter = reading.products_per_weight
    adapters = 2 * sum(place.adapters) / place.width * work / rate
    head = in_head * model.padded_vocab_size * model.embed_dim / tensor * place.outside_tokens / rate
    return {
        "matrix products": each / 2 * product + in_adapter / 2 * adapters + head,
        "recomputation": again * (product * (12 * unit - 4) / (12 * unit) + adapters + attention),
        "attention": (3.5 if trained else 1) * attention,
        "memory traffic": crossings * between,
    }
