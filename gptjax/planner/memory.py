"""Bytes on one device at the highest moment of a step, by what they are for."""

from collections.abc import Iterator

from gptjax.planner.place import FLOAT, Place
from gptjax.planner.rollout import drawing
from gptjax.planner.traffic import Rates

Item = tuple[str, str, float]
"""(part, what, bytes)."""

WORKING = 0.65  # share of a unit's activations that is there at one moment of its backward pass


def memory(place: Place) -> dict[str, float]:
    """Bytes by what they are for, at the highest moment of the step."""
    parts: dict[str, float] = {}
    for part, _, each in arrays_at_peak(place):
        parts[part] = parts.get(part, 0.0) + each
    return parts


def arrays_at_peak(place: Place) -> list[Item]:
    """(part, what, bytes) of everything that is there at the highest moment of the step: in the backward pass of a
    unit or in the loss of an update, or while replies are drawn."""
    accumulates = place.config.max_accumulation > 1
    state = FLOAT * place.local_trained
    narrow = place.width * place.local_trained if accumulates and place.width < FLOAT else 0.0
    resident = [
        ("parameters", "float32 weights", state),
        ("parameters", "weights beside them, which have no gradient", place.local_frozen),
        ("optimizer", "the optimizer's moments", FLOAT * place.local_moments),
    ]
    update = [
        ("parameters", "in the compute dtype, for all micro-batches", narrow),
        ("gradients", "float32 gradients", state),
        ("gradients", "their sum over micro-batches", state if accumulates else 0.0),
    ]
    learners = [model for model in place.learners if model.reading.trained]
    kept = [item for model in learners for item in activations(model)]
    working = max((moment for model in learners for moment in moments(model)), key=size)
    return resident + max([update + kept + working, drawing(place)], key=size)


def size(items: list[Item]) -> float:
    """Bytes of all of them."""
    return sum(each for _, _, each in items)


def activations(place: Place) -> list[Item]:
    """What a model keeps of its forward pass for the backward one."""
    model, unit = place.model, len(place.model.attention_pattern)
    units = place.ticks / place.chunks * place.layers / unit
    return [
        ("activations", "the text looked at and its gradient", 2 * place.memory),
        ("activations", "inputs of the units", units * place.resting),
        ("activations", f"kept by remat {model.remat}", units * unit * saved(place)),
    ]


def moments(place: Place) -> Iterator[list[Item]]:
    """What is there for a moment, while a model's units or its loss are gone through backward."""
    model, mesh, unit = place.model, place.mesh, len(place.model.attention_pattern)
    working = unit * saved(place, "none") * (1 if model.remat == "full" else 0.5) * WORKING / place.chunks
    if mesh["tensor"] > 1:  # what the layers gather along the length, and its gradients
        working += 2 * unit * place.residual / place.chunks
    staged: list[Item] = []
    if mesh["pipeline"] > 1:
        whole = place.layers * place.matrices
        staged = [
            ("temporaries", "the stage's weights, whole over fsdp", whole),
            ("temporaries", "float32 gradients of the stage's weights", whole * FLOAT / place.width),
            ("activations", "what waits between rounds", 3 * place.residual),
        ]
        gathered = 0.0
    else:
        gathered = (3 if Rates(place).padded("fsdp") else 2) * place.matrices if mesh["fsdp"] > 1 else place.matrices
    yield [
        *staged,
        ("temporaries", "weights of the layers at work, and their gradient", gathered),
        ("temporaries", "activations of the unit at work", working),
        ("temporaries", "the embedding and its gradient, whole over fsdp", 2 * place.embedding),
    ]
    scored = min(model.loss_chunk, place.reading.scored)
    logits = place.outside_tokens / place.length * scored * model.padded_vocab_size / mesh["tensor"] * place.width
    yield [
        *staged,
        ("temporaries", "the embedding and its float32 gradient", place.embedding * (1 + FLOAT / place.width)),
        (
            "temporaries",
            "a chunk of logits, their gradient and its transpose",
            3 * logits,
        ),
        ("temporaries", "what the loss is computed from", 2 * place.residual / mesh["pipeline"]),
    ]


def saved(place: Place, remat: str | None = None) -> float:
    """Bytes that a layer keeps for its backward pass, for a micro-batch, beside the input of its unit."""
    model, tensor = place.model, place.mesh["tensor"]
    remat = remat or model.remat
    if remat == "full":
        return 0.0
    token = place.tokens * place.width
    whole = token * model.embed_dim  # [rows, length, D]
    shared = whole / place.length * place.residual_length
    normaliser = place.tokens * model.num_heads / tensor * FLOAT
    qkv, up = (token * place.products[name].outer for name in ("qkv", "mlp_up"))  # what tensor leaves of them
    queries = token * place.attention_width / tensor
    heads = queries * (1 if model.positions == "relative" else place.padding)
    across = model.cross_attention
    if remat == "dots":  # qkv, attention's output and normaliser, the projection, the MLP's inner products
        return heads + normaliser + shared + across * (queries + normaliser + shared) + qkv + up
    # q, k and v for each head of queries, attention's output as it leaves the kernel and as the projection takes it,
    # the MLP's inner products and what goes down; the norms' inputs and outputs; a byte a number for dropout.
    # Only what leaves attention's kernel is padded, which relative positions and cross-attention do without. This keeps
    # the keys and values that it looks at.
    down = token * place.products["mlp_down"].inner * (1 + model.gated)
    kept = 2 * heads + 3 * queries + up + down + normaliser + 2 * whole + 2 * shared
    if across:
        looked_at = place.products["cross_keys_values"]
        kept += 3 * queries + normaliser + whole + shared + looked_at.rows * looked_at.outer * place.width
    return kept + place.tokens * model.embed_dim * (2 + across) * bool(model.dropout)
