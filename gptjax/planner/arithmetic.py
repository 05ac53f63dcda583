"""Seconds of a step in which a device computes, or moves its own memory."""

from collections import Counter

from gptjax.model.accounting import mean_keys
from gptjax.planner.chips import Chip
from gptjax.planner.place import FLOAT, Place
from gptjax.planner.products import Product, cast

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
    model, chip, trained = place.model, place.topology.chip, place.reading.trained
    width, float8, layers = place.width, model.fp8, place.layers
    each, in_head, in_adapter = place.reading.products_per_weight
    matrices = sum(_with_gradients(product, each, chip, width, float8) for product in place.products.values())
    scored, dim = place.outside_tokens * place.reading.scored / model.seq_len, model.embed_dim
    head = Product(scored, dim, model.padded_vocab_size / place.mesh["tensor"])
    transform = Product(place.outside_tokens * place.reading.places / model.seq_len, dim, dim)
    heads = sum(_with_gradients(product, in_head, chip, width) for product in (head, transform) if product.rows)
    adapters = 2 * sum(place.adapters) / width * place.tokens * layers / (chip.flops * chip.matmul)
    attention = _attention(place)
    again = dict(place.recomputed) if trained else {}
    attended = again.pop("attention", 0.0) * attention
    remade = sum(share * place.products[name].seconds(chip, width, float8) for name, share in again.items())
    # Reads and writes of a layer's forward pass between its products.
    between = UNFUSED * width * place.between * place.tokens * layers / chip.hbm_rate
    crossings = 3 + (1 if model.remat == "full" else 0.5 if model.remat == "dots" else 0) if trained else 1
    return {
        "matrix products": layers * matrices + in_adapter / 2 * adapters + heads,
        "recomputation": layers * remade + (adapters if again else 0.0) + attended,
        "attention": (3.5 if trained else 1) * attention,
        "memory traffic": crossings * between,
        "casts to float8": layers * _casts(place, again) if float8 else 0.0,
    }


def _attention(place: Place) -> float:
    """Seconds of queries, keys and values of all layers, forward."""
    model, chip = place.model, place.topology.chip
    kinds = model.layer_kinds
    keys = sum(mean_keys(kind, model.seq_len, model.window, model.causal) + KERNEL_BLOCK for kind in kinds) / len(kinds)
    keys = min(keys, model.seq_len) + place.reading.memory_length
    flops = 4 * place.attention_width / place.mesh["tensor"] * keys * place.tokens * place.layers
    return flops / (chip.flops * chip.matmul * ATTENTION_RATE)


def _casts(place: Place, again: dict[str, float]) -> float:
    """Seconds in which a layer's activations, weights and gradients become float8; what goes into products that are
    computed `again` once more."""
    chip, products = place.topology.chip, place.products
    inputs = sum((1 + again.get(name, 0.0)) * product.operands for name, product in products.items())
    gradients = sum(product.rows * product.outer for product in products.values()) if place.reading.trained else 0.0
    return cast(chip, inputs + gradients, place.width)


def _with_gradients(product: Product, flops: float, chip: Chip, width: int, float8: bool = False) -> float:
    """Seconds of a product forward, of its gradient for what goes in and of that for its matrix, where `flops` a number
    of the matrix and token are 2, 4 or 6; none where it is not computed."""
    all_three = (product, product.of_input, product.of_weights)
    return sum(one.seconds(chip, width, float8) for one in all_three[: int(flops // 2)])
