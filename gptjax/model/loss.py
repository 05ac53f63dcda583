"""Cross-entropy and log-probabilities of a head without the full logits, forward or backward."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gptjax.model.products import multiply_outputs_first

IGNORED = -1
"""Target id of a position that does not count."""


class Head(NamedTuple):
    """What scores the vocabulary."""

    table: Array
    """[V', D] in the compute dtype: the embedding, or a table of its own."""
    bias: Array | None = None
    """float32 [V']."""


def logits(hidden: Array, head: Head, vocab_size: int, outputs_first: bool = False) -> Array:
    """hidden [..., D] -> float32 [..., V'] with padded ids at -inf. outputs_first: for a CPU that decodes; see
    products.Product."""
    accumulate = _accumulate(hidden)
    if outputs_first:
        scores = multiply_outputs_first(hidden, head.table, 1, accumulate)
    else:
        scores = jnp.einsum("...d,vd->...v", hidden, head.table, preferred_element_type=accumulate)
    scores = scores if head.bias is None else scores + head.bias
    return jnp.where(jnp.arange(head.table.shape[0]) < vocab_size, scores, -jnp.inf)


def _accumulate(x: Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


def log_probs(hidden: Array, head: Head, targets: Array, vocab_size: int, chunk: int) -> Array:
    """Each target's log-probability in nats, float32 [..., T], by the `logits` that the sampler draws from; 0 where it
    is IGNORED. What anyone reads or compares; shapes and `chunk` as for `cross_entropy`."""
    return _by_chunk(_log_prob, hidden, head, targets, vocab_size, chunk)


def judged(hidden: Array, head: Head, targets: Array, vocab_size: int, chunk: int) -> tuple[Array, Array]:
    """`log_probs`, and whether each target is the likeliest id, bool [..., T]; False where it is IGNORED."""

    def judge(scores: Array, y: Array) -> tuple[Array, Array]:
        return _log_prob(scores, y), jnp.argmax(scores, axis=-1) == y

    return _by_chunk(judge, hidden, head, targets, vocab_size, chunk)


def drawn_log_probs(
    hidden: Array, head: Head, targets: Array, vocab_size: int, chunk: int, temperature: float, top_k: int
) -> tuple[Array, Array]:
    """Log-probability of each target, and the entropy of what it is drawn from, nats [..., T], by a sampler that
    divides logits by `temperature` and draws from the `top_k` likeliest ids alone (0: from all); 0 where it is IGNORED.

    A target that is none of the likeliest, as one may be that was drawn by other weights, is measured by their
    normaliser all the same: its value is finite, and has a gradient.
    """

    def judge(scores: Array, y: Array) -> tuple[Array, Array]:
        scores = scores / temperature
        likeliest = scores
        if 0 < top_k < vocab_size:
            likeliest = jnp.where(scores >= jax.lax.top_k(scores, top_k)[0][..., -1:], scores, -jnp.inf)
        log_z = jax.nn.logsumexp(likeliest, axis=-1)
        log_p = likeliest - log_z[..., None]
        entropy = -jnp.sum(jnp.where(log_p == -jnp.inf, 0, jnp.exp(log_p) * log_p), axis=-1)
        counts = y != IGNORED
        return jnp.where(counts, _picked(scores, y) - log_z, 0), jnp.where(counts, jax.lax.stop_gradient(entropy), 0)

    return _by_chunk(judge, hidden, head, targets, vocab_size, chunk)


def divergence(
    hidden: Array, head: Head, other: Array, other_head: Head, targets: Array, vocab_size: int, chunk: int, heat: float
) -> Array:
    """Nats [..., T] by which a model's probabilities differ from another's, KL(other, model), both of scores divided by
    the temperature `heat`; 0 where a target is IGNORED. hidden and other [..., T, D]."""

    @partial(jax.checkpoint, prevent_cse=False)
    def one_chunk(x: Array, y: Array, asked: Array) -> Array:
        ours = jax.nn.log_softmax(logits(x, head, vocab_size) / heat)[..., :vocab_size]
        theirs = jax.nn.log_softmax(logits(y, other_head, vocab_size) / heat)[..., :vocab_size]
        return jnp.where(asked == IGNORED, 0, jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1))

    (x, asked), (y, _) = (_split(each, targets, chunk) for each in (hidden, other))
    chunks = jax.lax.map(lambda part: one_chunk(*part), (x, y, asked))
    *lead, length = targets.shape
    return jnp.moveaxis(chunks, 0, -2).reshape(*lead, -1)[..., :length]


def _log_prob(scores: Array, targets: Array) -> Array:
    return jnp.where(targets == IGNORED, 0, _picked(scores, targets) - jax.nn.logsumexp(scores, axis=-1))


def _by_chunk(
    judge: Callable[[Array, Array], Any], hidden: Array, head: Head, targets: Array, vocab_size: int, chunk: int
) -> Any:
    """What `judge` makes of logits and targets [..., c], for all T."""

    @partial(jax.checkpoint, prevent_cse=False)
    def one_chunk(x: Array, y: Array) -> Any:
        return judge(logits(x, head, vocab_size), y)

    chunks = jax.lax.map(lambda part: one_chunk(*part), _split(hidden, targets, chunk))
    *lead, length = targets.shape
    return jax.tree.map(lambda part: jnp.moveaxis(part, 0, -2).reshape(*lead, -1)[..., :length], chunks)


def _picked(scores: Array, targets: Array) -> Array:
    """The targets' scores [..., c]; IGNORED takes that of id 0."""
    return jnp.take_along_axis(scores, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def cross_entropy(
    hidden: Array, head: Head, targets: Array, vocab_size: int, chunk: int, smoothing: float = 0.0
) -> Array:
    """Summed negative log-likelihood in nats over targets that are not IGNORED, for training alone: in bfloat16 its
    scores are rounded, which moves one token by hundredths of a nat; `log_probs` is what else reads a model.

    hidden [..., T, D], targets [..., T]. Logits of `chunk` positions per leading index are in memory at once. The
    forward pass of a differentiated call also makes the gradients, chunk by chunk: three products with the table
    instead of the four that recomputing takes.

    With label smoothing a target's probability is 1 - smoothing, and that is spread over the whole vocabulary, the
    target among it (arXiv 1512.00567, section 7).
    """

    table = _centred(head, vocab_size)

    def body(total: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
        x, y = part
        return total + _nats(_scores(x, table, vocab_size), y, vocab_size, smoothing)[0], None

    return jax.lax.scan(body, jnp.zeros((), _accumulate(hidden)), _split(hidden, targets, chunk))[0]


def _centred(head: Head, vocab_size: int) -> Head:
    """With a table less its mean row: softmax and all gradients stay, and a bfloat16 score does not spend its 8 bits
    on what all scores of a row share (about -100 in GPT-2, where bfloat16 counts in halves)."""
    table = head.table
    mean = table[:vocab_size].mean(0, dtype=_accumulate(table))
    return Head((table - mean).astype(table.dtype), head.bias)


def _scores(x: Array, head: Head, vocab_size: int) -> Array:
    """`logits` up to a constant per row, rounded to the compute dtype before anything reads them: the passes over the
    [tokens, V'] array, not the products, are what a bfloat16 head waits for."""
    scores = jnp.einsum("...d,vd->...v", x, head.table).astype(_accumulate(x))
    scores = scores if head.bias is None else scores + head.bias
    return jnp.where(jnp.arange(head.table.shape[0]) < vocab_size, scores, -jnp.inf)


def _nats(scores: Array, targets: Array, vocab_size: int, smoothing: float) -> tuple[Array, Array]:
    """Summed nats, and the log-normaliser per position [..., c]."""
    log_z = jax.nn.logsumexp(scores, axis=-1)
    picked = _picked(scores, targets)
    if smoothing:
        picked = (1 - smoothing) * picked + smoothing * scores[..., :vocab_size].mean(-1)
    return jnp.sum(jnp.where(targets == IGNORED, 0, log_z - picked)), log_z


def _split(hidden: Array, targets: Array, chunk: int) -> tuple[Array, Array]:
    """Chunks along T, leading: [n, ..., c, D] and [n, ..., c]; the other axes keep their sharding."""
    *lead, length = targets.shape
    chunk = min(chunk, length)
    pad, tail = [(0, 0)] * len(lead), (0, -length % chunk)
    hidden = jnp.pad(hidden, [*pad, tail, (0, 0)]).reshape(*lead, -1, chunk, hidden.shape[-1])
    targets = jnp.pad(targets, [*pad, tail], constant_values=IGNORED).reshape(*lead, -1, chunk)
    return jnp.moveaxis(hidden, -3, 0), jnp.moveaxis(targets, -2, 0)


def _forward(
    hidden: Array, head: Head, targets: Array, vocab_size: int, chunk: int, smoothing: float = 0.0
) -> tuple[Array, tuple[Array, Head]]:
    centred, size = _centred(head, vocab_size), head.table.shape[0]

    def body(carry: tuple[Array, Head], part: tuple[Array, Array]) -> tuple[tuple[Array, Head], Array]:
        total, grads = carry
        x, y = part  # [..., c, D], [..., c]
        scores = _scores(x, centred, vocab_size)
        nats, log_z = _nats(scores, y, vocab_size, smoothing)
        counts = (y != IGNORED)[..., None]
        wanted = jax.nn.one_hot(y, size, dtype=scores.dtype)
        if smoothing:
            wanted = (1 - smoothing) * wanted + (jnp.arange(size) < vocab_size) * smoothing / vocab_size
        grad = jnp.exp(scores - log_z[..., None]) - wanted
        grad = jnp.where(counts, grad, 0)
        rows = tuple(range(y.ndim))
        bias = None if grads.bias is None else grads.bias + grad.sum(rows)
        grad = grad.astype(x.dtype)
        dims = (rows, rows), ((), ())
        table = grads.table + jax.lax.dot_general(grad, x, dims, preferred_element_type=grads.table.dtype)
        return (total + nats, Head(table, bias)), grad @ centred.table

    accumulate = _accumulate(hidden)
    start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, accumulate), head)
    (total, grads), grad_hidden = jax.lax.scan(body, (jnp.zeros((), accumulate), start), _split(hidden, targets, chunk))
    *lead, length, dim = hidden.shape
    grad_hidden = jnp.moveaxis(grad_hidden, 0, -3).reshape(*lead, -1, dim)[..., :length, :]
    return total, (grad_hidden, grads)


def _backward(
    vocab_size: int, chunk: int, smoothing: float, saved: tuple[Array, Head], cotangent: Array
) -> tuple[Array, Head, None]:
    grad_hidden, grads = saved
    dtype = grad_hidden.dtype
    bias = None if grads.bias is None else grads.bias * cotangent
    return (grad_hidden * cotangent).astype(dtype), Head((grads.table * cotangent).astype(dtype), bias), None


cross_entropy.defvjp(_forward, _backward)
