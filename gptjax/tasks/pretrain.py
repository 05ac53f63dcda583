"""Pretraining: next-token prediction on packed rows. What a stage supplies, and nothing more."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gptjax.config import Config
from gptjax.data.rows import Rows
from gptjax.data.sources import Corpus, TextSource
from gptjax.data.stream import TokenStream, eval_batches
from gptjax.data.tokenizers import Tokenizer
from gptjax.errors import UserError
from gptjax.infer.sampling import Sampling, generate
from gptjax.model.attention import Need
from gptjax.model.gpt import GPT, Parallelism, compute_dtype, forward, layer_mask
from gptjax.model.kernels import BACKENDS, choose
from gptjax.model.loss import IGNORED, cross_entropy, log_probs
from gptjax.sharding import context, pipeline
from gptjax.sharding.rules import Layout

SAMPLE_TOKENS = 200


@dataclass(frozen=True)
class Pretrain:
    """Loss, batches and evaluation of a decoder on rows of a text."""

    config: Config
    platform: str
    """Where it computes: cpu, gpu or tpu."""
    layout: Layout | None = None
    """None on a single device."""
    tokenizer: Tokenizer | None = None
    """None where only shapes and the loss are wanted."""
    corpus: Corpus | None = None
    """The text, opened once: what becomes of its files does not reach a run. None as for the tokenizer."""

    @cached_property
    def attention(self) -> tuple[str, str]:
        """The backend and the reason for it; see kernels.choose."""
        model, ways = self.config.model, self._ways
        masks = tuple(layer_mask(model, kind) for kind in dict.fromkeys(model.attention_pattern))
        dtype = self.plain_model.dtype
        need = Need(self.platform, dtype, model.head_dim, model.seq_len, masks, model.separate_documents, ways)
        name, reason = choose(model.attention, need)
        split = f"; the sequence in {2 * ways} chunks, a ring for dense layers and a halo for banded ones"
        return name, reason + (split if ways > 1 else "")

    @cached_property
    def model(self) -> GPT:
        """The decoder over the whole layout."""
        attend = BACKENDS[self.attention[0]].attend
        if self.layout is None:
            return self.plain_model.clone(parallelism=Parallelism(attend))
        layout, stages = self.layout, None
        if layout.mesh.shape[pipeline.AXIS] > 1:
            units = jax.eval_shape(self.init, jax.random.key(0))["units"]
            stages = pipeline.on_mesh(self.config, layout, units, self.plain_model.dtype)
            layout = pipeline.inside(layout)
        attend = context.on_mesh(attend, layout)
        merge_qkv = layout.mesh.shape["tensor"] > 1
        how = Parallelism(attend, layout.constrain, self._ways == 1, merge_qkv, stages)
        return self.plain_model.clone(parallelism=how)

    @cached_property
    def plain_model(self) -> GPT:
        """The same function without constraints on shapes: for initialising and sampling."""
        return GPT(self.config.model, compute_dtype(self.config.model, self.platform))

    def init(self, key: Array) -> Any:
        """Parameters boxed with their logical axes; the shape of the dummy batch does not matter."""
        return self.plain_model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]

    @property
    def row(self) -> Rows:
        """The shapes of one row."""
        ids = jax.ShapeDtypeStruct((self.config.model.seq_len,), np.int32)
        return Rows(ids, ids, ids if self.config.model.separate_documents else None)

    def counts(self, rows: Rows) -> Array:
        """The number of targets."""
        return jnp.sum(rows.targets != IGNORED, dtype=jnp.float32)

    def loss(self, params: Any, rows: Rows, counts: Array, key: Array | None) -> Array:
        """rows [b, T] -> their part in the mean nats of `counts` targets; a key of None switches dropout off."""
        hidden, embedding, targets = self._before_head(params, rows, key)
        with jax.named_scope("loss"):
            c = self.config.model
            return cross_entropy(hidden, embedding, targets, c.vocab_size, c.loss_chunk) / counts

    def _before_head(self, params: Any, rows: Rows, key: Array | None) -> tuple[Array, Array, Array]:
        """rows [b, T] -> hidden [b, T, D], embedding [V', D], targets [b, T]; where the sequence is split over
        `ways` devices, [b, ways, T/ways] in place of [b, T]."""
        c = self.config.model
        inputs, targets, segments = rows
        ways, positions = self._ways, None
        if ways > 1:
            positions = context.order(inputs.shape[1], ways)
            inputs, targets = inputs[:, positions], targets[:, positions]
            segments = None if segments is None else segments[:, positions]
        hidden, embedding, _ = forward(
            self.model, params, inputs, positions=positions, segments=segments, dropout_key=key
        )
        if ways > 1:  # every device's part of the sequence on an axis of its own: a chunk of the loss stays where it is
            parts = (len(targets), ways, -1)
            hidden, targets = hidden.reshape(*parts, c.embed_dim), targets.reshape(parts)
        return hidden, embedding, targets

    @property
    def _ways(self) -> int:
        """Parts that the layout cuts a sequence into."""
        return self.layout.mesh.shape[context.AXIS] if self.layout else 1

    def stream(self, positions: Sequence[int] | None, rows: Sequence[int]) -> TokenStream:
        """The training rows from a position on: of every micro-batch those of this process."""
        data = self.config.data
        return TokenStream(
            self.training_text,
            self._tokenizer,
            self.config.model.seq_len,
            lanes=data.lanes,
            seed=data.seed,
            micro_batch=self.config.micro_batch_size,
            rows=rows,
            separate=self.config.model.separate_documents,
            threads=data.threads,
            positions=positions,
        )

    def evaluate(self, params: Any, place: Callable[[Rows], Rows], rows: Sequence[int]) -> dict[str, float]:
        """Loss in nats per token and bits per byte over the evaluation split, in order; `rows` of every batch are this
        process's to read and `place`."""
        c, text = self.config, self.evaluation_text
        shape = c.model.seq_len, c.micro_batch_size
        batches = eval_batches(
            text, self._tokenizer, *shape, rows=rows, separate=c.model.separate_documents, limit=c.train.eval_batches
        )
        sums = [self._evaluate_batch(params, place(batch)) for batch in batches]
        nats, targets, size_bytes = (math.fsum(column) for column in zip(*jax.device_get(sums), strict=True))
        return {"loss": nats / targets, "bits_per_byte": nats / math.log(2) / size_bytes}

    @cached_property
    def _evaluate_batch(self) -> Callable[[Any, Rows], tuple[Array, Array, Array]]:
        """jit of (params, rows [b, T]) -> nats, targets, and the UTF-8 bytes that the targets stand for."""
        c, token_bytes = self.config.model, self._tokenizer.token_bytes()

        def sums(params: Any, rows: Rows) -> tuple[Array, Array, Array]:
            hidden, embedding, targets = self._before_head(params, rows, None)
            nats = -jnp.sum(log_probs(hidden, embedding, targets, c.vocab_size, c.loss_chunk))
            size = jnp.where(targets == IGNORED, 0, jnp.asarray(token_bytes)[jnp.maximum(targets, 0)])
            return nats, jnp.sum(targets != IGNORED, dtype=jnp.int32), jnp.sum(size)

        return jax.jit(sums)

    def sample(self, params: Any) -> str:
        """One continuation of train.sample_prompt, the same seed each time so that samples compare."""
        prompt = self.config.train.sample_prompt
        how = Sampling(temperature=0.8, top_k=50)
        return prompt + self.continuations(params, prompt, how, num_samples=1, num_tokens=SAMPLE_TOKENS, seed=0)[0]

    def continuations(self, params: Any, prompt: str, how: Sampling, **size: int) -> list[str]:
        """What the model goes on with after a prompt; `size` as for `generate`."""
        tokenizer = self._tokenizer
        ids = tokenizer.prompt(prompt)
        made = generate(self.plain_model, params, ids, how=how, possible=tokenizer.possible, **size)
        return [tokenizer.decode(row, inside=True) for row in made]

    @cached_property
    def training_text(self) -> TextSource:
        return self._split(self.config.data.train_split)

    @cached_property
    def evaluation_text(self) -> TextSource:
        return self._split(self.config.data.eval_split)

    def _split(self, name: str) -> TextSource:
        if self.corpus is None:
            raise ValueError("this task was built without a text")
        return self.corpus.split(name, self.config.data.split_by)

    @property
    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError("this task was built without a tokenizer")
        return self.tokenizer


def fit_vocabulary(config: Config, tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with the model's vocabulary, for whoever joins the two: ids beyond the tokenizer's stand for
    nothing, and chat tokens beyond the model's are absent, for pretraining never meets them.

    Raises UserError if text can yield an id that the model does not have.
    """
    size, needed = config.model.vocab_size, tokenizer.least_vocab_size
    if size < needed:
        raise UserError(
            f"model.vocab_size = {size}: the tokenizer {config.data.tokenizer} needs {needed}; nearest {needed}"
        )
    return tokenizer.fit(size)
