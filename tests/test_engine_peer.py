"""The engine against `transformers` on the same random weights: texts, log-probabilities, and how often each token is
drawn. Run: pytest tests/test_engine_peer.py"""

import codecs
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from gptjax import api
from gptjax.config import LayoutConfig
from gptjax.convert.tokenizer import write_tokenizer
from gptjax.data.tokenizers import load_tokenizer
from gptjax.infer.engine import Engine
from gptjax.infer.request import Request
from gptjax.infer.sampling import Knobs, Sampling, draw

torch: Any = pytest.importorskip("torch", reason="needs the peers extra")
transformers: Any = pytest.importorskip("transformers", reason="needs the peers extra")

VOCAB, EOT, CONTEXT, WINDOW = 261, 256, 48, 8
SHARED = {"vocab_size": VOCAB, "bos_token_id": EOT, "eos_token_id": EOT}
PEERS = {
    "gpt2": lambda: transformers.GPT2Config(n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=4, **SHARED),
    "gpt-neo": lambda: transformers.GPTNeoConfig(
        max_position_embeddings=CONTEXT,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=WINDOW,
        **SHARED,
    ),
}


pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module", params=PEERS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, api.Model, Engine]:
    """A model of transformers, ours of its files, and an engine with fewer rows than there will be requests."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(1)
    peer = transformers.AutoModelForCausalLM.from_config(PEERS[request.param]()).eval()
    with torch.no_grad():  # wide enough that the likeliest token stands apart, and that attention attends to something
        for parameter in peer.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    peer.save_pretrained(folder)
    write_tokenizer(load_tokenizer("bytes"), folder, VOCAB, CONTEXT)
    model = api.load(str(folder), layout=LayoutConfig(fsdp=1), slots=2)
    assert model.stage.layout is None
    # Prompts in small parts, so that there is one program for them.
    engine = Engine(model.stage.network.decoder, model.params, slots=2, chunk=16, tokenizer=model.tokenizer)
    return peer, model, engine


def prompts(count: int) -> list[list[int]]:
    """Of 1 to CONTEXT - 8 letters."""
    rng = np.random.default_rng(0)
    return [rng.integers(32, 127, 1 + i % (CONTEXT - 8)).tolist() for i in range(count)]


def peer_logits(peer: Any, ids: Iterable[int]) -> Any:
    """float64 [T, V]."""
    with torch.no_grad():
        return peer(torch.tensor([list(ids)])).logits[0].double()


def test_greedy_texts_of_50_prompts_are_those_of_transformers(pair: tuple[Any, api.Model, Engine]) -> None:
    """All at once through two rows, against one by one."""
    peer, model, engine = pair
    asked = [Request(ids, 12, Sampling(temperature=0), stop_tokens=(EOT,)) for ids in prompts(50)]
    replies = engine.run(asked)
    lengths = set()
    for ids, reply in zip(prompts(50), replies, strict=True):
        room = min(12, CONTEXT - len(ids) + 1)
        out = peer.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            do_sample=False,
            max_new_tokens=room,
            pad_token_id=EOT,
        )[0, len(ids) :].tolist()
        assert reply.tokens == out
        assert reply.text == shown(b"".join(model.tokenizer.pieces[i] for i in out if i != EOT))
        lengths.add(len(out))
    assert len(lengths) > 3


def shown(data: bytes) -> str:
    """The text less the beginning of a character at its end. For the first two bytes of a surrogate, which begin none,
    Python's decoder waits all the same."""
    text = codecs.getincrementaldecoder("utf-8")("replace").decode(data)
    return text + "\ufffd\ufffd" if data[-2:-1] == b"\xed" and data[-1] in range(0xA0, 0xC0) else text


def test_log_probabilities_of_prompt_and_reply_are_those_of_transformers(pair: tuple[Any, api.Model, Engine]) -> None:
    peer, _, engine = pair
    asked = [
        Request(ids, 6, Sampling(temperature=1.3, top_k=40), seed=i, tops=5, prompt_logprobs=True)
        for i, ids in enumerate(prompts(40)[::5])
    ]
    for request, reply in zip(asked, engine.run(asked), strict=True):
        ids = [*request.prompt, *reply.tokens]
        scores = torch.log_softmax(peer_logits(peer, ids[:-1]), -1)
        want = scores[torch.arange(len(ids) - 1), ids[1:]].numpy()
        np.testing.assert_allclose([*reply.prompt_logprobs, *reply.logprobs], want, atol=1e-4)
        values, tokens = scores.topk(5)
        tops = [*reply.prompt_tops, *reply.tops]
        assert [[token for token, _ in pairs] for pairs in tops] == tokens.tolist()
        np.testing.assert_allclose([[value for _, value in pairs] for pairs in tops], values.numpy(), atol=1e-4)


# How often each token is drawn

CASES = {
    "plain": Sampling(),
    "cold": Sampling(temperature=0.6),
    "hot": Sampling(temperature=1.7),
    "top-k": Sampling(top_k=5),
    "top-p": Sampling(top_p=0.8),
    "min-p": Sampling(min_p=0.1),
    "repetition": Sampling(repetition_penalty=1.8),
    "presence and frequency": Sampling(presence_penalty=0.9, frequency_penalty=0.4),
    "bias": Sampling(logit_bias={3: 2.5, 8: -1.5, 11: -np.inf}),
    "all": Sampling(0.8, 12, 0.85, 0.05, 1.4, 0.5, 0.3, {2: 1.0, 5: -100.0}),
}
DRAWS = 8192


def distribution(logits: np.ndarray, how: Sampling, prompt: list[int], reply: list[int]) -> np.ndarray:
    """float64 [V], exactly, of logits [V]: by transformers' own processors, in its order, and by OpenAI's formula for
    what it has not."""
    ids, scores = torch.tensor([[*prompt, *reply]]), torch.tensor(logits)[None].double()
    if how.repetition_penalty != 1:
        scores = transformers.RepetitionPenaltyLogitsProcessor(how.repetition_penalty)(ids, scores)
    counts = np.bincount(reply, minlength=len(logits))
    scores = scores - how.presence_penalty * torch.tensor(counts > 0) - how.frequency_penalty * torch.tensor(counts)
    for token, value in how.logit_bias.items():
        scores[0, token] += value
    for warper, value in (
        (transformers.TemperatureLogitsWarper, how.temperature),
        (transformers.TopKLogitsWarper, how.top_k or len(logits)),
        (transformers.TopPLogitsWarper, how.top_p),
        (transformers.MinPLogitsWarper, how.min_p),
    ):
        scores = warper(value)(ids, scores)
    return torch.softmax(scores, -1)[0].numpy()


def assert_drawn_from(tokens: np.ndarray, exact: np.ndarray) -> None:
    """By chi-square; tokens too rare for it together. The draws are the same each time, so this never fails by
    chance."""
    counts = np.bincount(tokens, minlength=len(exact))
    assert not counts[exact == 0].any()
    often = exact * len(tokens) >= 5
    bins = [*zip(counts[often], exact[often], strict=True), (counts[~often].sum(), exact[~often].sum())]
    seen, expected = np.array([(c, p) for c, p in bins if p > 0]).T
    assert len(seen) > 2
    assert stats.chisquare(seen, expected / expected.sum() * len(tokens)).pvalue > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_drawn_as_often_as_transformers_would(case: str) -> None:
    how, size = CASES[case], 30
    logits = np.random.default_rng(3).normal(0, 1, size).astype(np.float32)
    prompt, reply = [1, 4, 9], [2, 2, 2, 7, 9]
    exact = distribution(logits, how, prompt, reply)
    tokens = drawn(logits, how, prompt, reply)
    assert_drawn_from(tokens, exact)


def drawn(logits: np.ndarray, how: Sampling, prompt: list[int], reply: list[int]) -> np.ndarray:
    """DRAWS tokens, each of a row and a key of its own."""
    bias, seen = np.zeros(len(logits), np.float32), np.zeros(len(logits), bool)
    seen[prompt] = True
    for token, value in how.logit_bias.items():
        bias[token] += value
    counts = np.bincount(reply, minlength=len(logits)).astype(np.int32)
    row = logits, Knobs.of(how), bias, counts, seen
    rows = jax.tree.map(lambda x: jnp.broadcast_to(x, (DRAWS, *np.shape(x))), row)
    return np.asarray(_draw(*rows, jax.random.split(jax.random.key(0), DRAWS)))


_draw = jax.jit(draw)


@pytest.mark.parametrize(("pair", "case"), [("gpt2", "plain"), ("gpt-neo", "all")], indirect=["pair"])
def test_samples_and_seeds_of_the_engine_are_drawn_as_often(case: str, pair: tuple[Any, api.Model, Engine]) -> None:
    """Of one prompt: 20 samples of each of 60 seeds, through two rows."""
    peer, _, engine = pair
    how, prompt = CASES[case], [101]
    asked = [Request(prompt, 1, how, seed=seed, sample=sample) for seed in range(60) for sample in range(20)]
    tokens = np.array([reply.tokens[0] for reply in engine.run(asked)])
    logits = peer_logits(peer, prompt)[-1].numpy()
    logits[~engine.tokenizer.possible] = -np.inf
    assert_drawn_from(tokens, distribution(logits, how, prompt, []))
