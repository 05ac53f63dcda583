"""A decoder: what it writes, how likely texts are to it, and where it looks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.api.writes import Writes
from gptjax.data.infill import infill_prompt
from gptjax.errors import UserError
from gptjax.infer.look import Look, require_room
from gptjax.infer.prepare import apart, unrolled
from gptjax.infer.request import Request
from gptjax.model.attention import Mask, visible
from gptjax.model.block import Parallelism, layer_mask
from gptjax.model.gpt import GPT, forward
from gptjax.model.int8 import widened
from gptjax.model.loss import logits
from gptjax.stages import SFT, Pretrain


@dataclass(frozen=True)
class Model(Writes):
    """A decoder that goes on or answers; make one with `load`."""

    stage: Pretrain | SFT

    @property
    def chats(self) -> bool:
        """Whether it has learned conversations."""
        return isinstance(self.stage, SFT)

    def prompt(self, text: str, suffix: str | None = None) -> list[int]:
        """The ids of a text that is continued, or, by a model that has learned conversations, answered; with a suffix
        those after which a model that has learned it writes what stands between the two."""
        ids = self.stage.prompt(text) if suffix is None else infill_prompt(self.tokenizer, text, suffix)
        found: list[int] = ids.tolist()
        return found

    def logits(self, token_ids: Any, attention_mask: Any = None) -> np.ndarray:
        """float32 [B, T, V] of ids [B, T] (or [T]). attention_mask [B, T]: 0 for padding, on either side, which then
        changes nothing; its own rows mean nothing."""
        ids = np.asarray(token_ids, np.int32)
        mask = np.ones_like(ids) if attention_mask is None else np.asarray(attention_mask)
        rows = np.atleast_2d(ids), np.atleast_2d(mask).astype(bool)
        self._check_length(rows[0].shape[1])
        made = np.zeros((*rows[0].shape, self.stage.config.model.vocab_size), np.float32)
        for i, (row, real) in enumerate(zip(*rows, strict=True)):
            if real.any():
                made[i, real] = self._row_logits(row[real])
        return made if ids.ndim == 2 else made[0]

    def score(self, text: str) -> list[tuple[str, float]]:
        """Each token of a text, and its log-probability in nats after those before it; the first token's stands after
        the end of another text."""
        ids = self.tokenizer.encode(text)
        before = self.before
        (reply,) = self.engine.run([Request([*before, *ids], 0, prompt_logprobs=True)])
        values = reply.prompt_logprobs[len(before) - 1 :]
        return [(self.tokenizer.decode([i], inside=True), value) for i, value in zip(ids, values, strict=True)]

    @property
    def before(self) -> list[int]:
        """What a text of its own stands after."""
        return [*self.tokenizer.begin] or [self.tokenizer.eot]

    def attention(self, text: str | Sequence[int], layer: int, head: int) -> np.ndarray:
        """float32 [T, T]: what each token (row) takes from each of those before it and itself, of a text's T tokens as
        the model sees them, or of token ids."""
        self.require_head(layer, head)
        ids = self.stage.prompt(text) if isinstance(text, str) else np.asarray(text, np.int32)
        self._check_length(len(ids))
        return np.asarray(self._attention(self.params, self._padded(ids))[layer, head, : len(ids), : len(ids)])

    def require_head(self, layer: int, head: int) -> None:
        """Raises UserError for a layer or a head that it has not."""
        model = self.stage.config.model
        for name, value, size in (("layer", layer, model.num_layers), ("head", head, model.num_heads)):
            if not 0 <= value < size:
                raise UserError(f"{name} = {value}: the model has {size}, 0 to {size - 1}")

    def look(self, text: str | Sequence[int]) -> Look:
        """What it makes of each token of a text, which stands after the end of another as for `score`, or of token ids,
        which are taken as they are and of which nothing says how likely the first was: for `gptjax.infer.look.page`.
        Raises UserError for an empty text, and for one that is too long for a page."""
        model = self.stage.config.model
        if isinstance(text, str):
            ids, before = [*self.before, *self.tokenizer.encode(text).tolist()], len(self.before)
        else:
            ids, before = [int(i) for i in text], 1
        if len(ids) <= before:
            raise UserError("text: empty; give some to look at")
        self._check_length(len(ids))
        require_room(len(ids), model.num_layers, model.num_heads)
        seen = np.asarray(self._attention(self.params, self._padded(np.asarray(ids, np.int32))))
        windows = [layer_mask(model, kind).window for kind in model.layer_kinds]
        return Look(ids, before, self.logits(ids), seen[:, :, : len(ids), : len(ids)], windows)

    def _check_length(self, length: int) -> None:
        if not 0 < length <= self.context:
            raise UserError(f"{length} tokens: the context holds 1 to {self.context}")

    def _padded(self, ids: np.ndarray) -> np.ndarray:
        """[1, T'] with zeros behind, which nothing before them sees; of a few lengths, so that there are few
        programs."""
        length = min(max(16, 1 << (len(ids) - 1).bit_length()), self.context)
        return np.pad(ids, (0, length - len(ids)))[None]

    def _row_logits(self, ids: np.ndarray) -> np.ndarray:
        size = self.stage.config.model.vocab_size
        return np.asarray(self._logits(self.params, self._padded(ids))[0, : len(ids), :size])

    @cached_property
    def _logits(self) -> Callable[..., Any]:
        stage, size = self.stage, self.stage.config.model.vocab_size

        def whole(params: Any, ids: Any) -> Any:
            hidden, head, _ = forward(stage.network.decoder, widened(params, stage.network.decoder.dtype), ids)
            return logits(hidden, head, size)

        return jax.jit(whole)

    @cached_property
    def _attention(self) -> Callable[..., Any]:
        """jit of (params, ids [1, T]) -> [L, H, T, T]."""
        config, dtype = self.stage.config.model, self.stage.network.decoder.dtype
        plain = replace(unrolled(config), remat="none")  # so that what a layer sees can be handed out

        def whole(params: Any, ids: Any) -> Any:
            seen: list[Any] = []
            model = GPT(plain, dtype, Parallelism(partial(_shown, seen)))
            forward(model, widened(apart(params, config), dtype), ids)
            return jnp.concatenate(seen)

        return jax.jit(whole)


def _shown(seen: list[Any], q: Any, k: Any, v: Any, mask: Mask, scale: float, segments: Any) -> Any:
    """Plain attention that keeps its weights [B, H, T, T]."""
    places = jnp.arange(q.shape[1])
    scores = jnp.einsum("bthk,bshk->bhts", q * scale, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(visible(mask, places, places), scores, -jnp.inf), axis=-1)
    seen.append(weights)
    return jnp.einsum("bhts,bshk->bthk", weights.astype(v.dtype), v)
