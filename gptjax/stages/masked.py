"""Masked-language modelling: an encoder learns the words that are hidden from it, which of two texts follow each other
(BERT, arXiv 1810.04805), and what a larger encoder, its teacher, thinks of both (DistilBERT, arXiv 1910.01108)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gptjax.config import Config, MaskedConfig, nearest_divisor
from gptjax.config.fields import typed
from gptjax.data.examples import eval_batches
from gptjax.data.masked import MaskedRows, MaskedWindows, num_hidden, open_masked
from gptjax.data.rows import PADDING
from gptjax.data.sources import TextSource
from gptjax.errors import UserError
from gptjax.model.accounting import Reading
from gptjax.model.gpt import as_layers, layers_of
from gptjax.model.heads import HEADS, NEXT_SENTENCE, POOLER, TRANSFORM, init_heads, pooled, told, transformed
from gptjax.model.loss import IGNORED, Head, cross_entropy, divergence, judged
from gptjax.parallel.network import Network
from gptjax.stages.encoder import WithHeads, encoded
from gptjax.train.fingerprint import fingerprint
from gptjax.train.parts import split
from gptjax.train.step import narrow

if TYPE_CHECKING:
    from gptjax.stages.weights import Weights

TEACHER = "teacher"

Heard = tuple[Array, Head, Array]
"""What the head over the vocabulary reads [b, M, D], that head, and the last hidden states [b, T, D]."""


class Masked(WithHeads[MaskedWindows]):
    """Batches and evaluation of an encoder on texts with hidden words."""

    config: MaskedConfig
    grows = False
    apart = (TRANSFORM, POOLER, NEXT_SENTENCE)

    # Parameters

    @classmethod
    def heads_of(cls, config: Config) -> frozenset[str]:
        assert isinstance(config, MaskedConfig)
        return frozenset(cls.apart if config.masking.next_sentence else (TRANSFORM,))

    def init(self, key: Array) -> Any:
        made = super().init(key)
        if self.taught is None:
            return made
        return made | {TEACHER: narrow(self._init_teacher(key), self.teacher.plain_model.dtype)}

    def _init_teacher(self, key: Array) -> Any:
        return self.teacher.init(key) | init_heads(self.teacher.config.model, (TRANSFORM,), key)

    def is_frozen(self, name: str) -> bool:
        return name.split("/")[0] == TEACHER

    @property
    def beside(self) -> tuple[str, ...]:
        return (TEACHER,)

    # The teacher

    @cached_property
    def taught(self) -> "Weights | None":
        """The teacher's; None without one."""
        if not self.config.distill.teacher:
            return None
        from gptjax.stages.weights import open_weights  # which opens runs of any stage, and so imports all of them

        return open_weights(self.config.distill.teacher)

    @cached_property
    def teacher(self) -> Network:
        """What it computes with. Only where there is one."""
        assert self.taught
        own, theirs = self.config.model, self.taught.config.model
        model = replace(theirs, seq_len=own.seq_len, dtype=own.dtype, dropout=0.0, attention=own.attention)
        return Network(replace(self.config, model=model), self.platform, self.layout)

    def agree(self) -> None:
        """Raises UserError where the teacher is none of such a model."""
        if self.taught is None:
            return
        own, theirs, name = self.config.model, self.taught.config.model, self.config.distill.teacher
        if TRANSFORM not in self.taught.heads:
            raise UserError(f"distill.teacher = {name}: tells no hidden words; name a run of stage masked")
        for field in ("embed_dim", "vocab_size", "seq_len", *self._block):
            if getattr(own, field) != getattr(theirs, field):
                shown = typed(getattr(theirs, field))
                raise UserError(
                    f"distill.teacher = {name}: its model.{field} is {shown}, not {typed(getattr(own, field))}; set "
                    f"--model.{field} {shown}"
                )
        read = type(self).fit_tokenizer(self.taught.config, self.taught.tokenizer()).pieces
        if self.tokenizer and self.tokenizer.pieces != read:
            raise UserError(
                f"distill.teacher = {name}: reads by another tokenizer than data.tokenizer = "
                f"{self.config.data.tokenizer}; leave that out, the teacher's is taken"
            )
        if self.config.init_from:
            return
        if theirs.num_layers % own.num_layers:
            near = nearest_divisor(theirs.num_layers, own.num_layers)
            raise UserError(
                f"model.num_layers = {own.num_layers}: the run starts with every so many of the teacher's "
                f"{theirs.num_layers} layers; nearest {near}"
            )

    @property
    def _block(self) -> tuple[str, ...]:
        """Fields of a model in which one that begins with a teacher's layers does not differ."""
        if self.config.init_from:
            return ()
        from gptjax.stages.weights import BLOCK

        own = self.config.model
        untyped = not own.token_types and own.positions == "learned"  # see _from_teacher
        return tuple(field for field in BLOCK if not (untyped and field == "token_types"))

    def of_weights(self, load: Callable[[Any], Any], places: Any) -> Any:
        """The teacher, and the model from its own weights or from some of the teacher's layers."""
        if self.taught is None:
            return load(places)
        own, frozen = split(places, self.is_frozen)
        made = {TEACHER: self.taught.start(self.taught.config.model, frozen[TEACHER])} if frozen else {}
        if own:
            made |= load(own) if self.config.init_from else self._from_teacher(own)
        return made

    def pins(self, params: Any) -> dict[str, tuple[str, dict[str, str]]]:
        """The teacher's weights."""
        teacher = self.config.distill.teacher
        return {"distill.teacher": (teacher, fingerprint(params[TEACHER]))} if TEACHER in params else {}

    def _from_teacher(self, places: Any) -> Any:
        """Every so many of its layers, and the rest as it is; what it adds for the first type of token, where the model
        has no types, goes into the positions."""
        assert self.taught
        from gptjax.stages.weights import places as lain

        model, theirs = self.config.model, self.taught.config.model
        names = [name for name in HEADS if name in places]
        whole = lain(lambda key: self.teacher.init(key) | init_heads(theirs, tuple(names), key), self.layout)

        def pick(teacher: Any) -> Any:
            made = {name: leaf for name, leaf in teacher.items() if name in places}
            if theirs.token_types and not model.token_types:
                made["positions"] += teacher["token_types"][0]
            step = theirs.num_layers // model.num_layers
            return made | as_layers(layers_of(teacher, theirs)[::step], model)

        shardings = jax.tree.map(lambda place: place.sharding, places)
        return jax.jit(pick, out_shardings=shardings)(self.taught.load(theirs, whole))

    # Rows

    @property
    def row(self) -> MaskedRows:
        """The shapes of one row."""
        length, room = self.config.model.seq_len, num_hidden(self.config.masking, self.config.model.seq_len)
        ids, hidden = (jax.ShapeDtypeStruct((size,), np.int32) for size in (length, room))
        return MaskedRows(ids, ids, ids, hidden, hidden, jax.ShapeDtypeStruct((), np.int32))

    def random_rows(self, seed: int, lead: tuple[int, ...]) -> MaskedRows:
        """Rows [*lead, ...] of random ids, full, with as many hidden as may be."""
        rng, c, row = np.random.default_rng(seed), self.config, self.row
        length, room = row.tokens.shape[0], row.places.shape[0]
        tokens, targets = (rng.integers(0, c.model.vocab_size, (*lead, n), np.int32) for n in (length, room))
        places = np.argsort(rng.random((*lead, length)), axis=-1)[..., :room].astype(np.int32)
        zeros = np.zeros((*lead, length), np.int32)
        second = (zeros + (np.arange(length) >= length // 2) * c.masking.next_sentence).astype(np.int32)
        foreign = rng.integers(0, 2, lead, np.int32) if c.masking.next_sentence else np.full(lead, PADDING, np.int32)
        return MaskedRows(tokens, zeros, second, places, targets, foreign)

    def _examples(self, source: TextSource) -> MaskedWindows:
        c = self.config
        return open_masked(c.data, c.masking, source, self.known_tokenizer, c.model.seq_len, self.report)

    def facts(self) -> str:
        """What it learns, in words."""
        found = self.training
        share = found.packing.efficiency(self.config.model.seq_len)
        return f"{len(found):,} training windows in {found.num_rows:,} rows, {share:.1%} full"

    # Loss

    @property
    def learning(self) -> tuple[Reading, ...]:
        asked = {"predicts": False, "places": self.row.places.shape[0]}
        own = Reading(self.config.model, **asked, pooled=POOLER in self.head_names)
        if self.taught is None:
            return (own,)
        return own, Reading(self.teacher.config.model, TEACHER, trained=False, **asked)

    def counts(self, rows: MaskedRows) -> dict[str, Array]:
        """The hidden tokens; the rows of which is asked whether their texts follow each other; with a teacher the
        tokens."""
        asked = {"masked": rows.targets != IGNORED}
        if self.config.distill.teacher:
            asked["tokens"] = rows.segments == 0
        if self.config.masking.next_sentence:
            asked["pairs"] = rows.foreign != IGNORED
        return {name: jnp.sum(each, dtype=jnp.float32) for name, each in asked.items()}

    def loss(self, params: Any, rows: MaskedRows, counts: Any, key: Array | None) -> Array:
        """rows [b, ...] -> their part in the mean nats of hidden tokens, plus that of pairs; with a teacher see
        DistillConfig."""
        return self.loss_and_figures(params, rows, counts, key)[0]

    def loss_and_figures(
        self, params: Any, rows: MaskedRows, counts: Any, key: Array | None
    ) -> tuple[Array, dict[str, Array]]:
        c = self.config.model
        read, head, hidden = self.heard(params, rows, key)
        with jax.named_scope("loss"):
            parts = {"masked_loss": cross_entropy(read, head, rows.targets, c.vocab_size, c.loss_chunk)}
            parts["masked_loss"] /= counts["masked"]
            if self.config.masking.next_sentence:
                parts["next_loss"] = jnp.sum(_next_nats(params, hidden, rows)[0]) / counts["pairs"]
            if self.config.distill.teacher:
                parts |= self._from_teachers_view(params[TEACHER], (read, head, hidden), rows, counts)
            return sum((self._weight(name) * part for name, part in parts.items()), jnp.zeros(())), parts

    def _weight(self, name: str) -> float:
        distill = self.config.distill
        weights = {"masked_loss": distill.masked_weight, "soft_loss": distill.soft_weight * distill.temperature**2}
        return (weights | {"cosine_loss": distill.cosine_weight}).get(name, 1.0) if distill.teacher else 1.0

    def _from_teachers_view(self, teacher: Any, own: Heard, rows: MaskedRows, counts: Any) -> dict[str, Array]:
        """How far from it the probabilities of hidden words are, and the last hidden states of tokens."""
        c, heat = self.config.model, self.config.distill.temperature
        read, head, hidden = own
        theirs, their_head, their_hidden = jax.lax.stop_gradient(_heard(self.teacher, teacher, rows, None))
        nats = divergence(read, head, theirs, their_head, rows.targets, c.vocab_size, c.loss_chunk, heat)
        apart = jnp.where(rows.segments == 0, 1 - _cosine(hidden, their_hidden), 0)
        return {"soft_loss": jnp.sum(nats) / counts["masked"], "cosine_loss": jnp.sum(apart) / counts["tokens"]}

    def heard(self, params: Any, rows: MaskedRows, key: Array | None) -> Heard:
        """rows [b, ...]; a key of None switches dropout off."""
        return _heard(self.network, params, rows, key)

    # Evaluation

    def evaluate(self, params: Any, place: Callable[[MaskedRows], MaskedRows], rows: Sequence[int]) -> dict[str, float]:
        """loss: nats of a hidden token, and of a pair where that is asked, as it is trained; masked_loss and
        masked_accuracy, next_loss and next_accuracy of each; the same words are hidden each time."""
        c = self.config
        batches = eval_batches(self.evaluation, c.micro_batch_size, rows, c.train.eval_batches)
        sums = [self._evaluate_batch(params, place(batch)) for batch in batches]
        each = {name: math.fsum(part[name] for part in jax.device_get(sums)) for name in sums[0]}
        found = {f"masked_{name}": each[f"masked_{name}"] / each["masked"] for name in ("loss", "accuracy")}
        if c.masking.next_sentence:
            found |= {f"next_{name}": each[f"next_{name}"] / each["pairs"] for name in ("loss", "accuracy")}
        return {"loss": sum(found[name] for name in found if name.endswith("loss"))} | found

    @cached_property
    def _evaluate_batch(self) -> Callable[[Any, MaskedRows], dict[str, Array]]:
        """jit of (params, rows [b, ...]) -> sums of nats and of right answers, and counts."""
        c = self.config.model

        def sums(params: Any, rows: MaskedRows) -> dict[str, Array]:
            read, head, hidden = self.heard(params, rows, None)
            values, right = judged(read, head, rows.targets, c.vocab_size, c.loss_chunk)
            found = {"masked_loss": -values, "masked_accuracy": right}
            if self.config.masking.next_sentence:
                found["next_loss"], found["next_accuracy"] = _next_nats(params, hidden, rows)
            return self.counts(rows) | {name: jnp.sum(each, dtype=jnp.float32) for name, each in found.items()}

        return jax.jit(sums)


def _heard(network: Network, params: Any, rows: MaskedRows, key: Array | None) -> Heard:
    hidden, head = encoded(network, params, rows, key)
    at_places = jnp.take_along_axis(hidden, rows.places[..., None], axis=1)
    return transformed(network.config.model, params, at_places), head, hidden


def _cosine(one: Array, other: Array) -> Array:
    """[..., D] -> float32 [...]."""
    one, other = (x.astype(jnp.float32) for x in (one, other))
    norms = jnp.linalg.norm(one, axis=-1) * jnp.linalg.norm(other, axis=-1)
    return jnp.sum(one * other, axis=-1) / jnp.maximum(norms, 1e-8)


def _next_nats(params: Any, hidden: Array, rows: MaskedRows) -> tuple[Array, Array]:
    """Nats [b] of the answer whether two texts follow each other, and whether it is right; 0 where it is not asked."""
    scores = jax.nn.log_softmax(told(params, NEXT_SENTENCE, pooled(params, hidden)))
    asked, answer = rows.foreign != IGNORED, jnp.maximum(rows.foreign, 0)
    nats = -jnp.take_along_axis(scores, answer[:, None], axis=1)[:, 0]
    return jnp.where(asked, nats, 0), asked & (jnp.argmax(scores, axis=1) == answer)
