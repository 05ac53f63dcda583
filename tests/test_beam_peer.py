"""Beam search against `transformers`, token by token: ours reads the logits of its decoders.
Run: pytest tests/test_beam_peer.py"""

from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.infer.beam import Found, beam_search

torch: Any = pytest.importorskip("torch", reason="needs the peers extra")
transformers: Any = pytest.importorskip("transformers", reason="needs the peers extra")

pytestmark = pytest.mark.usefixtures("one_torch_thread")

V, T, SOURCES, END, PAD, OTHER_END = 37, 9, 3, 2, 1, 11
ROWS = {"vocab_size": V, "eos_token_id": END, "pad_token_id": PAD}


def t5(ending: float) -> Any:
    config = transformers.T5Config(
        d_model=24,
        d_kv=8,
        d_ff=40,
        num_layers=1,
        num_heads=3,
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        **ROWS,
    )
    model = transformers.T5ForConditionalGeneration(config)
    model.lm_head = torch.nn.Linear(24, V)
    torch.nn.init.zeros_(model.lm_head.bias)
    return widened(model, model.lm_head.bias, ending)


def bart(ending: float) -> Any:
    sizes = {
        f"{part}_{what}": n
        for part in ("encoder", "decoder")
        for what, n in (("layers", 1), ("attention_heads", 3), ("ffn_dim", 40))
    }
    config = transformers.BartConfig(
        d_model=24,
        max_position_embeddings=40,
        bos_token_id=0,
        decoder_start_token_id=END,
        forced_eos_token_id=None,
        **sizes,
        **ROWS,
    )
    model = transformers.BartForConditionalGeneration(config)
    return widened(model, model.final_logits_bias[0], ending)


def widened(model: Any, bias: Any, ending: float) -> Any:
    """With weights from which likely and unlikely tokens come, and a bias of the token that ends a text."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        bias[END] += ending
    return model.eval()


def build(maker: Any, ending: float) -> tuple[Any, Any]:
    """A model and its sources."""
    torch.manual_seed(7)
    return maker(ending), torch.randint(3, V, (SOURCES, 6))


class Decoder:
    """What a step calls: the logits behind a prefix, of the model that is set."""

    def use(self, model: Any, sources: Any, beams: int) -> None:
        self.model = model
        with torch.no_grad():
            states = model.get_encoder()(input_ids=sources).last_hidden_state
        self.states = states.repeat_interleave(beams, dim=0)

    def __call__(self, prefix: Any, place: Any) -> np.ndarray:
        ids = torch.tensor(np.asarray(prefix)[:, : int(place) + 1], dtype=torch.int64)
        with torch.no_grad():
            result = self.model(encoder_outputs=(self.states,), decoder_input_ids=ids, use_cache=False)
        return result.logits[:, -1].float().numpy()


DECODER = Decoder()


@partial(jax.jit, static_argnames=("beams", "early_stopping"))
def ours(first: Any, end: Any, penalty: Any, *, beams: int, early_stopping: Any) -> Found:
    """The cache is the prefix itself, so that a wrong reorder gives other logits."""

    def step(prefix: Any, tokens: Any, place: Any) -> Any:
        prefix = prefix.at[:, place].set(tokens)
        shape = jax.ShapeDtypeStruct((len(tokens), V), jnp.float32)
        return jax.pure_callback(DECODER, shape, prefix, place), prefix

    return beam_search(
        step,
        lambda prefix, rows: prefix[rows],
        jnp.zeros((len(first) * beams, T), jnp.int32),
        first,
        beams=beams,
        max_tokens=T,
        end=end,
        length_penalty=penalty,
        early_stopping=early_stopping,
        allowed=jnp.zeros(V),
    )


def theirs(model: Any, sources: Any, ends: list[int], penalty: float, beams: int, early_stopping: Any) -> Any:
    return model.generate(
        sources,
        attention_mask=torch.ones_like(sources),
        num_beams=beams,
        num_return_sequences=beams,
        do_sample=False,
        max_new_tokens=T,
        eos_token_id=ends,
        length_penalty=penalty,
        early_stopping=early_stopping,
        return_dict_in_generate=True,
        output_scores=True,
    )


def up_to(row: np.ndarray, ends: list[int]) -> list[int]:
    """A text, its end included, without what pads it."""
    hits = np.flatnonzero(np.isin(row, ends))
    return row[: hits[0] + 1 if len(hits) else T].tolist()


def compare(model: Any, sources: Any, ends: list[int], penalty: float, beams: int, early_stopping: Any) -> list[int]:
    """Texts and scores of both alike; how long the texts are."""
    DECODER.use(model, sources, beams)
    first = jnp.full(SOURCES, model.config.decoder_start_token_id)
    end = jnp.array(ends + [-1] * (2 - len(ends)))
    found = jax.device_get(ours(first, end, penalty, beams=beams, early_stopping=early_stopping))
    peer = theirs(model, sources, ends, penalty, beams, early_stopping)
    expected = [up_to(row, ends) for row in peer.sequences[:, 1:].numpy()]
    rows, lengths = found.tokens.reshape(-1, T), found.lengths.reshape(-1)
    assert [row[:length].tolist() for row, length in zip(rows, lengths, strict=True)] == expected
    assert all((row[length:] == -1).all() for row, length in zip(rows, lengths, strict=True))
    np.testing.assert_allclose(found.scores.reshape(-1), peer.sequences_scores.numpy(), atol=1e-4)
    np.testing.assert_allclose(found.totals, found.scores * found.lengths.astype(float) ** penalty, rtol=1e-5)
    return lengths.tolist()


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("beams", [2, 5])
def test_texts_and_scores_are_those_of_transformers(beams: int, early_stopping: Any) -> None:
    seen: set[int] = set()
    for maker, ending in product((t5, bart), (0.0, 3.0, 6.0)):
        model, sources = build(maker, ending)
        for penalty in (-1.0, 0.0, 1.0, 3.0):
            seen |= set(compare(model, sources, [END], penalty, beams, early_stopping))
    assert len(seen) > 4  # hypotheses end at different lengths


def test_several_ids_may_end_a_text() -> None:
    model, sources = build(bart, 2.0)
    lengths = compare(model, sources, [END, OTHER_END], 1.0, 4, False)
    assert len(set(lengths)) > 1


def test_one_beam_is_the_greedy_decoding_of_transformers() -> None:
    for maker, ending in product((t5, bart), (0.0, 4.0)):
        model, sources = build(maker, ending)
        DECODER.use(model, sources, 1)
        first = jnp.full(SOURCES, model.config.decoder_start_token_id)
        found = ours(first, jnp.array([END, -1]), 1.0, beams=1, early_stopping="never")
        peer = model.generate(sources, attention_mask=torch.ones_like(sources), do_sample=False, max_new_tokens=T)
        expected = [up_to(row, [END]) for row in peer[:, 1:].numpy()]
        assert [
            row[0][: n[0]].tolist() for row, n in zip(np.asarray(found.tokens), np.asarray(found.lengths), strict=True)
        ] == expected
