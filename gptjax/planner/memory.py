"""Bytes on one device at the highest moment of a step, by what they are for."""

from gptjax.planner.place import FLOAT, Place
from gptjax.planner.traffic import Rates

WORKING = 0.65  # share of a unit's activations that is there at one moment of its backward pass


def memory(place: Place) -> dict[str, float]:
    """Bytes by what they are for, at the highest moment of the step."""
    parts: dict[str, float] = {}
    for part, _, size in arrays_at_peak(place):
        parts[part] = parts.get(part, 0.0) + size
    return parts


def arrays_at_peak(place: Place) -> list[tuple[str, str, float]]:
    """(part, what, bytes) of everything that is there at the highest moment of the step: in the backward pass of a
    unit, or in the loss."""
    model, mesh, accumulates = place.config.model, place.mesh, place.config.max_accumulation > 1
    state, unit = FLOAT * place.local_trained, len(model.attention_pattern)
    narrow = place.width * place.local_trained if accumulates and place.width < FLOAT else 0.0
    found = [
        ("parameters", "float32 weights", state),
        ("parameters", "frozen weights", place.local_frozen),
        ("parameters", "in the compute dtype, for all micro-batches", narrow),
        ("optimizer", "the optimizer's moments", FLOAT * place.local_moments),
        ("gradients", "float32 gradients", state),
        ("gradients", "their sum over micro-batches", state if accumulates else 0.0),
        ("activations", "inputs of the units", place.ticks / place.chunks * place.layers / unit * place.resting),
        ("activations", f"kept by remat {model.remat}", place.ticks / place.chunks * place.layers * saved(place)),
    ]
    working = unit * saved(place, "none") * (1 if model.remat == "full" else 0.5) * WORKING / place.chunks
    if mesh["tensor"] > 1:  # what the layers gather along the length, and its gradients
        working += 2 * unit * place.residual / place.chunks
    if mesh["pipeline"] > 1:
        whole = place.layers * place.matrices
        found.append(("temporaries", "the stage's weights, whole over fsdp", whole))
        found.append(("temporaries", "float32 gradients of the stage's weights", whole * FLOAT / place.width))
        found.append(("activations", "what waits between rounds", 3 * place.residual))
        gathered = 0.0
    else:
        gathered = (3 if Rates(place).padded("fsdp") else 2) * place.matrices if mesh["fsdp"] > 1 else place.matrices
    backward = [
        ("temporaries", "weights of the layers at work, and their gradient", gathered),
        ("temporaries", "activations of the unit at work", working),
        ("temporaries", "the embedding and its gradient, whole over fsdp", 2 * place.embedding),
    ]
    scored = min(model.loss_chunk, model.seq_len) if place.config.predicts else 0
    logits = place.outside_tokens / place.length * scored
    loss = [
        ("temporaries", "the embedding and its float32 gradient", place.embedding * (1 + FLOAT / place.width)),
        ("temporaries", "a chunk of logits", logits * model.padded_vocab_size / mesh["tensor"] * 2 * place.width),
        ("temporaries", "what the loss is computed from", 2 * place.residual / mesh["pipeline"]),
    ]
    return found + max(backward, loss, key=lambda phase: sum(size for _, _, size in phase))


def saved(place: Place, remat: str | None = None) -> float:
    """Bytes that a layer keeps for its backward pass, for a micro-batch, beside the input of its unit."""
    model, tensor = place.config.model, place.mesh["tensor"]
    remat = remat or model.remat
    if remat == "full":
        return 0.0
    whole = place.tokens * model.embed_dim * place.width  # [rows, length, D]
    shared = whole / place.length * place.residual_length
    normaliser = place.tokens * model.num_heads / tensor * FLOAT
    heads = float(whole)
    if place.topology.chip.platform == "tpu":  # whose registers have 128 lanes: smaller heads are padded to them
        heads *= -(-model.head_dim // 128) * 128 / model.head_dim
    if remat == "dots":  # qkv, attention's output and normaliser, the projection, the MLP's inner product
        return (heads + (3 + 4) * whole) / tensor + normaliser + shared
    # q, k and v, attention's output as it leaves the kernel and as the projection takes it, the MLP's inner product and
    # its activation; both norms' inputs and outputs. Only what leaves attention's kernel is padded.
    return (2 * heads + (3 + 4 + 4) * whole) / tensor + normaliser + 2 * whole + 2 * shared
