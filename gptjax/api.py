"""A trained model in Python: what `gptjax.load` gives, and what the terminal's verbs are made of."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import Config, LayoutConfig, TrainConfig
from gptjax.data.chat import is_chat, require_no_other
from gptjax.data.infill import infill_prompt
from gptjax.data.tokenizers import Tokenizer
from gptjax.errors import UserError
from gptjax.infer.engine import Engine, Request
from gptjax.infer.look import Look, require_room
from gptjax.infer.prepare import DTYPES, apart, held, unrolled
from gptjax.infer.sampling import Sampling
from gptjax.model.attention import Mask, visible
from gptjax.model.block import Parallelism, layer_mask
from gptjax.model.gpt import GPT, forward
from gptjax.model.int8 import widened
from gptjax.model.loss import logits
from gptjax.parallel.network import Network
from gptjax.sharding.mesh import MESH_AXES, make_mesh
from gptjax.sharding.rules import Layout, rule_table
from gptjax.stages import SFT, Pretrain
from gptjax.stages.launch import prepare
from gptjax.stages.weights import open_weights, places

SLOTS = 8


def load(path: str, *, layout: LayoutConfig | None = None, weights: str = "auto", slots: int = SLOTS) -> "Model":
    """The model of a run folder, or of a Hugging Face directory with GPT-2, GPT-Neo, LLaMA or Falcon.

    layout: how it lies on the attached devices; None is the only one, or of several the heads over as many as divide
    them; one without a -1 takes the first so many, so that LayoutConfig(fsdp=1) is a single one. weights: auto (the
    type that it computes in), float32, bfloat16 or int8. slots: replies in progress at once.

    Raises gptjax.errors.UserError, in one line, for what is neither or is broken.
    """
    if weights not in DTYPES:
        raise UserError(f"weights = {weights}: choose from {', '.join(DTYPES)}")
    source = open_weights(path)
    config, tokenizer = source.config, source.tokenizer()
    prepare(config)
    if config.stage == "sft":
        require_no_other(tokenizer)
    kind = SFT if is_chat(tokenizer) else Pretrain
    place = _layout(config, layout)
    config = replace(config, layout=layout or config.layout)
    network = Network(config, jax.default_backend(), place)
    params = source.load(config.model, places(network.init, place))
    stage = kind(config, network.platform, place, kind.fit_tokenizer(config, tokenizer))
    return Model(path, stage, held(params, weights, network.plain_model.dtype), slots)


def _layout(config: Config, layout: LayoutConfig | None) -> Layout | None:
    devices, heads = jax.devices(), config.model.kv_heads
    if layout is None:
        layout = LayoutConfig(data=-1, fsdp=1, tensor=math.gcd(len(devices), heads))
    degrees = [getattr(layout, name) for name in MESH_AXES]
    if -1 not in degrees:
        devices = devices[: math.prod(degrees)]
    train = TrainConfig(batch_size=len(devices))  # that of the training has no say here
    mesh = make_mesh(replace(config, layout=layout, train=train), devices)
    return Layout(mesh, rule_table(layout)) if len(devices) > 1 else None


@dataclass(frozen=True)
class Model:
    """A model that answers; make one with `load`."""

    path: str
    stage: Pretrain | SFT
    params: Any
    slots: int

    @property
    def tokenizer(self) -> Tokenizer:
        """`encode(text)`, `decode(ids)` and the table of pieces."""
        return self.stage.known_tokenizer

    @property
    def context(self) -> int:
        """Tokens T that it sees at most."""
        return self.stage.config.model.seq_len

    @property
    def chats(self) -> bool:
        """Whether it has learned conversations."""
        return isinstance(self.stage, SFT)

    @cached_property
    def engine(self) -> Engine:
        """What generates, shared by all calls."""
        network = self.stage.network
        return Engine(
            network.decoder, self.params, slots=self.slots, tokenizer=self.tokenizer, layout=self.stage.layout
        )

    def prompt(self, text: str, suffix: str | None = None) -> list[int]:
        """The ids of a text that is continued, or, by a model that has learned conversations, answered; with a suffix
        those after which a model that has learned it writes what stands between the two."""
        ids = self.stage.prompt(text) if suffix is None else infill_prompt(self.tokenizer, text, suffix)
        found: list[int] = ids.tolist()
        return found

    def request(self, prompt: str | Sequence[int], seed: int = 0, sample: int = 0, **how: Any) -> Request:
        """A prompt as a request: a text as `prompt` reads it; token ids are taken as they are. `how` as for
        `generate`."""
        suffix = how.pop("suffix", None)
        ids = self.prompt(prompt, suffix) if isinstance(prompt, str) else [int(i) for i in prompt]
        own = {
            name: how.pop(name) for name in ("max_tokens", "stop", "tops", "prompt_logprobs", "drawn") if name in how
        }
        stop = own.pop("stop", ())
        words = (stop,) if isinstance(stop, str) else tuple(stop)
        sampling = Sampling(**how)
        return Request(ids, sampling=sampling, seed=seed, sample=sample, stop=words, stop_tokens=self.stage.ends, **own)

    def generate(self, prompt: str | Sequence[Any], *, seed: int = 0, **how: Any) -> Any:
        """The text that follows a prompt, or of several prompts (a list of texts or of token ids) a list of texts.

        max_tokens, 16 unless given; stop, a string or several; temperature (1; 0 takes the likeliest), top_k, top_p,
        min_p, repetition_penalty, presence_penalty, frequency_penalty, logit_bias; suffix, a text that it ends before,
        of a model that has learned to fill in. The same seed gives the same text, whatever is asked beside it. Raises
        UserError for a prompt or a value that cannot be.
        """
        one = isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], (int, np.integer)))
        prompts = [prompt] if one else prompt
        texts = [reply.text for reply in self.engine.run([self.request(p, seed, **how) for p in prompts])]
        return texts[0] if one else texts

    def stream(self, prompt: str | Sequence[int], **how: Any) -> Iterator[str]:
        """The same text piece by piece, as it comes."""
        return self.engine.stream(self.request(prompt, **how))

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
