"""What other engines got wrong (half characters, stop strings, seeds, limits), each as a test of this one. Run:
pytest tests/test_engine_known_bugs.py"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax import api
from gptjax.config import Config, LayoutConfig, ModelConfig, TrainConfig
from gptjax.data.tokenizers import Tokenizer, load_tokenizer
from gptjax.errors import UserError
from gptjax.infer.engine import Engine
from gptjax.infer.programs import key_of
from gptjax.infer.request import Reply, Request
from gptjax.infer.sampling import Sampling
from gptjax.infer.text import TextStream
from gptjax.model.gpt import GPT
from gptjax.stages.weights import on_device

CONTEXT, SLOTS = 64, 4
BYTES = load_tokenizer("bytes").fit(261)
GREEDY = Sampling(temperature=0)
SMALL = ModelConfig(2, 2, 64, seq_len=CONTEXT, vocab_size=261, scan_layers=False)
BANDED = replace(SMALL, attention_pattern=("dense", "banded"), window=8)


def engine_of(model: ModelConfig, tokenizer: Tokenizer, **how: Any) -> Engine:
    """One program for prompts, which go in by 16 tokens."""
    how = {"slots": SLOTS, "chunk": 16} | how
    return Engine(GPT(model, jnp.dtype("float32")), None, tokenizer=tokenizer, **how)


def abstract(model: ModelConfig) -> Any:
    return on_device(Config("x", model), jax.devices()[0])


def random_params(model: ModelConfig) -> Any:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.15, leaf.shape), jnp.float32), abstract(model))


def scripted(model: ModelConfig, script: Sequence[int]) -> Any:
    """Parameters of a model that says a script whatever it is given: the token at position p is script[p].

    Its layers do nothing; the embedding of each position is that of the token that comes next.
    """
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), abstract(model))
    rng = np.random.default_rng(0)
    size = model.vocab_size
    params["embedding"][:size] = rng.normal(0, model.embed_dim**-0.5, (size, model.embed_dim))
    places = list(script[1 : model.seq_len + 1])
    params["positions"][: len(places)] = 30 * params["embedding"][places]
    params["norm_final"]["scale"][:] = 1
    return jax.tree.map(jnp.asarray, params)


@pytest.fixture(scope="module")
def small() -> Engine:
    """Random weights, a dense layer and a banded one."""
    engine = engine_of(BANDED, BYTES)
    engine.params = random_params(BANDED)
    return engine


@pytest.fixture(scope="module")
def by_bytes() -> Engine:
    return engine_of(replace(SMALL, num_layers=1), BYTES)


@pytest.fixture(scope="module")
def by_pairs(shared: Path) -> Engine:
    """With GPT-2's tokenizer."""
    model = replace(SMALL, num_layers=1, vocab_size=50257)
    return engine_of(model, load_tokenizer(f"gpt2:{shared / 'gpt2-bpe'}").fit(50257), slots=1)


@pytest.fixture(params=["bytes", "pairs"])
def says(request: pytest.FixtureRequest) -> Any:
    """(text, stop strings, prompt) -> (pieces as they come, reply) of a model that says that text."""
    engine: Engine = request.getfixturevalue(f"by_{request.param}")
    tokenizer = engine.tokenizer
    assert tokenizer

    def run(text: str, *stop: str, prompt: Sequence[int] = (), limit: int = 0) -> tuple[list[str], Reply]:
        before = list(prompt) or [tokenizer.eot]
        ids = tokenizer.encode(text).tolist()
        engine.params = scripted(engine.model.config, [*before, *ids, tokenizer.eot])
        return followed(engine, Request(before, limit or len(ids) + 1, GREEDY, stop=stop, stop_tokens=(tokenizer.eot,)))

    run.tokenizer = tokenizer  # type: ignore[attr-defined]
    return run


def followed(engine: Engine, request: Request) -> tuple[list[str], Reply]:
    """What comes token by token, through the rounds of an engine; none of it is ever taken back."""
    reply, seen = engine.submit(request), [""]
    while not reply.reason:
        engine.step()
        assert reply.text.startswith(seen[-1])
        seen.append(reply.text)
    return [new[len(old) :] for old, new in pairwise(seen)], reply


# Characters

MANY = "é ß 東京 naïve 😀🎉 👩‍👧 e\u0301 \u00a0ﬁ"


def test_characters_of_many_bytes_come_whole(says: Any) -> None:
    pieces, reply = says(MANY)
    assert "".join(pieces) == reply.text == MANY and reply.reason == "stop"
    assert not any("\ufffd" in piece for piece in pieces) and len(pieces) > 3


@pytest.mark.parametrize("character", ["é", "東", "😀"])
def test_a_prompt_that_ends_inside_a_character(character: str, by_bytes: Engine) -> None:
    """The reply completes it, and shows it whole; or it does not, and shows nothing of it."""
    whole = character.encode()
    for cut in range(1, len(whole)):
        prompt = [65, *whole[:cut]]
        for rest, text in ((whole[cut:] + b"!", f"{character}!"), (b"!", "!"), (b"", "")):
            by_bytes.params = scripted(by_bytes.model.config, [*prompt, *rest, BYTES.eot])
            asked = Request(prompt, len(rest) + 1, GREEDY, stop_tokens=(BYTES.eot,))
            pieces, reply = followed(by_bytes, asked)
            assert "".join(pieces) == reply.text == text
        assert by_bytes.run([Request(prompt, 0)])[0].text == ""


def test_a_reply_that_ends_inside_a_character_shows_nothing_of_it(says: Any) -> None:
    size = len(says.tokenizer.encode("hi 😀"))
    _, reply = says("hi 😀", limit=size - 1)
    assert (reply.text, reply.reason) == ("hi " if len(reply.tokens) > 1 else "hi", "length")


def test_a_text_over_two_contexts_is_whole_wherever_the_first_ends() -> None:
    whole = MANY.encode()
    for cut in range(1, len(whole)):
        first, second = TextStream(BYTES, [BYTES.eot]), TextStream(BYTES, whole[:cut])
        shown = [*map(first.add, whole[:cut]), first.end(), *map(second.add, whole[cut:]), second.end()]
        assert "".join(shown) == MANY


def test_bytes_that_are_no_character_are_shown_as_such(by_bytes: Engine) -> None:
    by_bytes.params = scripted(by_bytes.model.config, [65, 255, 66, 0x80, 67])
    _, reply = followed(by_bytes, Request([65], 4, GREEDY))
    assert reply.text == "\ufffdB\ufffdC"


def joined(ids: list[int]) -> str:
    """As libraries with a byte fallback do it: one byte that is no UTF-8 spoils all of its run."""
    data = bytes(ids)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "".join(chr(i) if i < 128 else "\ufffd" for i in ids)


@pytest.mark.parametrize(
    ("prompt", "reply", "text"),
    [
        (b"a", "é 東 😀!".encode(), "é 東 😀!"),
        (b"a\xf0\x9f", b"\x98\x80!", "😀!"),
        (b"a\xf0\x9f", b"!", "!"),
        (b"a\xf0\x9f", b"", ""),
        (b"a", b"b\xf0\x9f", "b"),
        (b"a", b"b\xff c", "b\ufffd c"),
        (b"a", "😀".encode() + b"\xff c d", "😀" + 5 * "\ufffd" + " c d"),  # nothing is taken back, and it goes on
    ],
)
def test_ids_that_only_a_library_turns_into_text(prompt: bytes, reply: bytes, text: str) -> None:
    stream = TextStream(replace(BYTES, join=joined), prompt)
    assert "".join([*map(stream.add, reply), stream.end()]) == stream.text == text


# Stop strings


@pytest.mark.parametrize(
    ("text", "stop", "left"),
    [
        ("one two three", ("o th",), "one tw"),  # over two tokens
        ("one two three", ("hre",), "one two t"),  # inside one
        ("one two three", ("one",), ""),  # the first
        ("one two three", ("o",), ""),
        ("one two three", ("xyz", "three", "two"), "one "),  # of several the first in the text
        ("one two three", ("two four", "e two", "threes"), "on"),
        ("one two three", ("threes",), "one two three"),  # never whole: given out at the end
        ("aabaabaac", ("aabaac",), "aab"),  # begins anew inside its own beginning
        ("über 😀 done", ("😀",), "über "),
        ("über 😀 done", ("r 😀 d",), "übe"),
        ("one", ("", "xyz"), "one"),
    ],
)
def test_stop_strings(text: str, stop: tuple[str, ...], left: str, says: Any) -> None:
    pieces, reply = says(text, *stop)
    assert "".join(pieces) == reply.text == left
    assert reply.reason == "stop"


def test_a_stop_string_ends_the_work_and_is_cut_off_at_once(by_bytes: Engine) -> None:
    """Of tokens that were decoded beyond it none is told."""
    by_bytes.params = scripted(by_bytes.model.config, [65, *b"ab.cdefghijklmn"])
    (reply,) = by_bytes.run([Request([65], 14, GREEDY, stop=(".",))])
    assert bytes(reply.tokens) == b"ab." and len(reply.logprobs) == 3 and not by_bytes.busy
    by_bytes.params = scripted(by_bytes.model.config, [65, *b"ab.cdefghijklmn"])
    (after,) = by_bytes.run([Request([65], 14, GREEDY)])  # the row is whole again
    assert after.text == "ab.cdefghijklmn"[:14]


def test_the_prompt_is_not_searched(by_bytes: Engine) -> None:
    by_bytes.params = scripted(by_bytes.model.config, [*b"stop", *b"stopped"])
    (reply,) = by_bytes.run([Request([*b"sto"], 8, GREEDY, stop=("stop",))])
    assert reply.text == "p"


pieces_of_text = st.text(st.sampled_from("ab.é東😀\ufffd"), max_size=12)


def test_half_a_surrogate_is_no_half_character() -> None:
    """No byte can complete it, for which Python's decoder waits all the same."""
    stream = TextStream(BYTES)
    assert [stream.add(byte) for byte in b"a\xed\xa0"] == ["a", "", ""]
    assert stream.end() == "\ufffd\ufffd" and stream.text == "a\ufffd\ufffd"


@settings(max_examples=300)
@given(st.data())
def test_any_text_in_any_pieces(data: st.DataObject) -> None:
    """What is shown is the text before its first stop string, whatever bytes the tokens cut it into, and from whatever
    prompt on; nothing is taken back, and nothing is shown of a stop string."""
    prompt, reply = data.draw(pieces_of_text).encode(), data.draw(pieces_of_text).encode()
    if data.draw(st.booleans()):
        reply += data.draw(st.binary(max_size=3))
    cut = data.draw(st.integers(0, len(prompt)))
    prompt, reply = prompt[:cut], data.draw(st.sampled_from([prompt[cut:], b""])) + reply
    stop = data.draw(st.lists(pieces_of_text, max_size=3))
    tokens = list(split(data, reply))
    before = list(split(data, prompt))
    table = sorted({*tokens, *before})
    tokenizer = replace(BYTES, pieces=table, special={})
    stream = TextStream(tokenizer, [table.index(piece) for piece in before], stop)
    shown, so_far, want = "", b"", ""
    for piece in tokens:
        if stream.stopped:
            break
        so_far += piece
        shown += stream.add(table.index(piece))
        want = beyond(prompt, so_far)
        places = [at for word in stop if word and (at := want.find(word)) >= 0]
        assert stream.text == shown and stream.stopped == bool(places)
        if places:
            want = want[: min(places)]
    assert shown + stream.end() == stream.text == want


def split(data: st.DataObject, whole: bytes) -> Iterator[bytes]:
    while whole:
        size = data.draw(st.integers(1, min(5, len(whole))))
        yield whole[:size]
        whole = whole[size:]


def beyond(prompt: bytes, reply: bytes) -> str:
    """What a reply adds to the text of a prompt; both without the unfinished character at the end."""

    def known(data: bytes) -> str:
        cut = next((size for size in range(1, 1 + min(3, len(data))) if unfinished(data[-size:])), 0)
        return data[: len(data) - cut].decode("utf-8", "replace")

    text, whole = known(prompt), known(prompt + reply)
    more = whole[len(text) :]
    return more.removeprefix("\ufffd") if text != prompt.decode("utf-8", "replace") else more


def unfinished(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.start == 0 and error.reason == "unexpected end of data"
    return False


# Random numbers


def texts_of(replies: Sequence[Reply]) -> list[list[int]]:
    return [reply.tokens for reply in replies]


def test_a_seed_gives_the_same_alone_and_in_any_batch(small: Engine) -> None:
    """Same tokens, and log-probabilities to 1e-5, whatever runs beside it: others of other lengths, greedy ones, ones
    with filters, and those that share its prompt."""
    asked = [
        Request([*b"the same prompt, longer than a part"], 12, Sampling(0.9, top_p=0.95), seed=7),
        Request([*b"short"], 20, Sampling(1.2), seed=2**64 - 1),
        Request([*b"the same prompt, longer than a part"], 5, GREEDY, seed=9),
        Request([*b"x"], 1, Sampling(0.5, top_k=3), seed=7),
        Request([*b"with penalties"], 9, Sampling(repetition_penalty=1.5, logit_bias={65: 3.0}), seed=1),
        Request([*b"the same prompt, but another end"], 12, Sampling(min_p=0.1), seed=3, tops=4),
    ]
    alone = [small.run([request])[0] for request in asked]
    for batch in (asked, asked[::-1], asked[2:] + asked[:2]):
        for request, reply in zip(batch, small.run(batch), strict=True):
            other = alone[asked.index(request)]
            assert reply.tokens == other.tokens and reply.reason == other.reason
            np.testing.assert_allclose(reply.logprobs, other.logprobs, atol=1e-5)


def test_seeds_and_samples_differ(small: Engine) -> None:
    asked = [Request([*b"a"], 12, seed=seed, sample=sample) for seed in (0, 1, 2**32, 2**63) for sample in range(4)]
    drawn = texts_of(small.run(asked))
    assert len({tuple(tokens) for tokens in drawn}) == len(asked)
    assert drawn == texts_of(small.run(asked))


def test_no_two_seeds_and_samples_share_random_numbers() -> None:
    """Seeds of more than 32 bits are words of 32, as the number of the sample is."""
    pairs = [(low + (high << 32), sample) for low in (0, 5) for high in range(4) for sample in range(4)]
    assert len({tuple(key_of(*pair).tolist()) for pair in pairs}) == len(pairs)


# Settings


@pytest.mark.parametrize("top_k", [-1, 0, 1, 261, 300, 2**31 - 1])
def test_any_top_k(top_k: int, small: Engine) -> None:
    """Of one token it is the likeliest; of at least all it is none."""
    asked = [Request([*b"ab"], 12, Sampling(top_k=top_k), seed=5)]
    plain = Request([*b"ab"], 12, GREEDY if top_k == 1 else Sampling(), seed=5)
    assert texts_of(small.run(asked)) == texts_of(small.run([plain]))


def test_log_probabilities_do_not_depend_on_how_tokens_are_drawn(small: Engine) -> None:
    """The same tokens, forced in several ways, are worth the same; and a prompt's are."""
    ways = [
        Sampling(0, logit_bias={90: 1e4}),
        Sampling(2.0, logit_bias={90: 100}),
        Sampling(0.3, 1, 0.1, 0.9, logit_bias={90: 200}),
        Sampling(repetition_penalty=1.3, presence_penalty=1.0, frequency_penalty=1.0, logit_bias={90: 1e4}),
    ]
    asked = [Request([*b"prompt"], 6, how, tops=3, prompt_logprobs=True) for how in ways]
    first, *others = small.run(asked)
    assert first.tokens == [90] * 6
    for other in others:
        assert other.tokens == first.tokens
        np.testing.assert_allclose(other.logprobs, first.logprobs, atol=1e-5)
        np.testing.assert_allclose(other.prompt_logprobs, first.prompt_logprobs, atol=1e-5)
        assert [[i for i, _ in pairs] for pairs in other.tops] == [[i for i, _ in pairs] for pairs in first.tops]


def test_a_bias_forces_and_bans(small: Engine) -> None:
    (free,) = small.run([Request([*b"abc"], 8, GREEDY)])
    banned = dict.fromkeys(free.tokens, -math.inf)
    (other,) = small.run([Request([*b"abc"], 8, Sampling(0, logit_bias=banned))])
    assert not set(other.tokens) & set(free.tokens)
    bans = dict.fromkeys(range(256), -math.inf)
    (only,) = small.run([Request([*b"abc"], 8, Sampling(5.0, 7, 0.9, logit_bias=bans))])
    assert set(only.tokens) <= set(range(256, 261))
    with pytest.raises(UserError, match="logit_bias: of -inf for every token; leave one that may be drawn"):
        small.submit(Request([*b"abc"], 8, Sampling(logit_bias=dict.fromkeys(range(261), -math.inf))))


def programs(engine: Engine) -> int:
    """How many were compiled."""
    known = engine.programs
    return sum(one._cache_size() for one in (known.admit, known.rest, known.copy, known.fill, known.decode))


def test_no_value_of_a_request_compiles_anything(small: Engine) -> None:
    """After a batch of every size, with and without scores of prompts."""
    for scored in (False, True):
        for count in (1, 2, 3, SLOTS):
            small.run([Request([*b"to warm up", i], 5, tops=1, prompt_logprobs=scored) for i in range(count)])
    small.cancel(small.submit(Request([1])))
    before = programs(small)
    rng = np.random.default_rng(0)
    small.run(
        Request(
            rng.integers(0, 256, rng.integers(1, CONTEXT)).tolist(),
            int(rng.integers(1, 20)),
            Sampling(
                temperature=float(rng.choice([0, 0.5, 1.5])),
                top_k=int(rng.integers(-1, 300)),
                top_p=float(rng.uniform(0.1, 1)),
                min_p=float(rng.uniform(0, 0.3)),
                repetition_penalty=float(rng.uniform(0.5, 2)),
                presence_penalty=float(rng.normal()),
                frequency_penalty=float(rng.normal()),
                logit_bias={int(token): 1.0 for token in rng.integers(0, 261, i % 5)},
            ),
            seed=int(rng.integers(0, 2**63)),
            sample=i,
            stop=("a",) * (i % 3),
            stop_tokens=(BYTES.eot, i),
            tops=i % 21,
            prompt_logprobs=i % 4 == 0,
        )
        for i in range(24)
    )
    assert programs(small) == before


@pytest.mark.parametrize("temperature", [1e-38, 1e-45, 1e-6])
def test_the_smallest_temperatures_take_the_likeliest(temperature: float, small: Engine) -> None:
    asked = [Request([*b"ab"], 12, Sampling(value, top_p=0.9), seed=5) for value in (temperature, 0)]
    one, other = texts_of(small.run(asked))
    assert one == other


def test_greedy_takes_no_notice_of_a_seed(small: Engine) -> None:
    asked = [Request([*b"ab"], 12, GREEDY, seed=seed, sample=seed) for seed in (0, 1, 2)]
    assert len({tuple(tokens) for tokens in texts_of(small.run(asked))}) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sampling(math.nan), r"^temperature = nan: must lie in 0 to inf$"),
        (lambda: Sampling(math.inf), r"^temperature = inf: must lie in 0 to inf$"),
        (lambda: Sampling(-1), r"^temperature = -1: must lie in 0 to inf; nearest 0$"),
        (lambda: Sampling(top_k=-2), r"top_k = -2: must lie in -1 to 2,147,483,647; nearest -1"),
        (lambda: Sampling(top_p=0), r"top_p = 0: must lie in \(0, 1\]"),
        (lambda: Sampling(top_p=math.nan), r"top_p = nan"),
        (lambda: Sampling(min_p=math.inf), r"min_p = inf: must lie in 0 to 1; nearest 1"),
        (lambda: Sampling(repetition_penalty=0), r"repetition_penalty = 0: must be above 0"),
        (lambda: Sampling(presence_penalty=math.nan), r"presence_penalty = nan: must lie in -10,000 to 10,000$"),
        (lambda: Sampling(logit_bias={3: math.inf}), r"logit_bias = \{3: inf\}: must be at most 10,000; -inf bans"),
        (lambda: Sampling(logit_bias={3: math.nan}), r"logit_bias = \{3: nan\}: must be at most 10,000"),
        (lambda: Request([1], seed=-1), r"seed = -1: must lie in 0 to 18,446,744,073,709,551,615; nearest 0"),
        (lambda: Request([1], seed=2**64), r"seed = 18446744073709551616: .*; nearest 18,446,744,073,709,551,615"),
        (lambda: Request([1], seed=10**400), r"seed = 10+: must lie in"),
        (lambda: Request([1], max_tokens=-1), r"max_tokens = -1: must lie in 0 to 2,147,483,647; nearest 0"),
        (lambda: Request([1], tops=21), r"logprobs = 21: must lie in 0 to 20; nearest 20"),
        (lambda: Request([]), r"prompt: empty; give at least one token"),
    ],
)
def test_what_cannot_be_is_one_line(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize("seed", [0, 2**63, 2**64 - 1])
def test_the_largest_seeds(seed: int, small: Engine) -> None:
    assert len(small.run([Request([1], 3, seed=seed)])[0].tokens) == 3


# Limits


def test_a_prompt_as_long_as_the_context(small: Engine) -> None:
    """Has room for one token more; and one that is longer has none."""
    (reply,) = small.run([Request([65] * CONTEXT, 9, prompt_logprobs=True)])
    assert (len(reply.tokens), reply.reason, len(reply.prompt_logprobs)) == (1, "length", CONTEXT - 1)
    with pytest.raises(UserError, match=r"prompt: 65 tokens; the context holds 64"):
        small.submit(Request([65] * (CONTEXT + 1)))
    with pytest.raises(UserError, match=r"token 261: outside the vocabulary, 0 to 260"):
        small.submit(Request([261]))
    assert small.run([Request([65], 2)])[0].tokens  # a wrong request harms no other


@pytest.mark.parametrize("length", [1, 2, 17, 40, CONTEXT])
@pytest.mark.parametrize("limit", [0, 1])
def test_no_token_or_one(length: int, limit: int, small: Engine) -> None:
    """With the prompt's log-probabilities and without; that one token is the first of a longer reply."""
    prompt = [*b"a prompt of some length that is long enough for them all" * 2][:length]
    plain, scored, longer = small.run(
        [Request(prompt, limit), Request(prompt, limit, tops=2, prompt_logprobs=True), Request(prompt, 4)]
    )
    assert [len(reply.tokens) for reply in (plain, scored)] == [limit, limit] and plain.reason == "length"
    assert plain.tokens == scored.tokens == longer.tokens[:limit] and scored.reason == "length"
    assert len(scored.prompt_logprobs) == len(scored.prompt_tops) == length - 1
    assert all(len(pairs) == 2 for pairs in scored.prompt_tops) and not plain.prompt_logprobs


def test_an_ending_token_that_comes_first(by_bytes: Engine) -> None:
    by_bytes.params = scripted(by_bytes.model.config, [65, BYTES.eot])
    pieces, reply = followed(by_bytes, Request([65], 5, GREEDY, stop_tokens=(BYTES.eot,)))
    assert (reply.tokens, reply.text, reply.reason, "".join(pieces)) == ([BYTES.eot], "", "stop", "")


# Rows


def test_a_short_request_ends_before_a_long_neighbour(small: Engine) -> None:
    long = small.submit(Request([*b"a prompt that is longer than a part of one"], 22))
    small.step()
    short = small.submit(Request([*b"hi"], 3))
    while not short.reason:
        small.step()
    assert not long.reason and len(long.tokens) < 22
    after = small.submit(Request([*b"me too"], 3))  # in the row that is free now
    while not after.reason:
        small.step()
    assert not long.reason
    small.clear()


@pytest.mark.parametrize("rounds", [0, 1, 2, 4])
def test_a_cancelled_request_frees_its_row_and_harms_no_other(rounds: int, small: Engine) -> None:
    """Waiting, in the middle of its prompt (3 parts), and while it is decoded."""
    others = [Request([*b"other", i], 24, seed=i) for i in range(SLOTS - 1)]
    want = texts_of(small.run(others))
    small.clear()
    doomed = small.submit(Request([*b"a prompt that goes into the cache in 3 parts"], 20))
    doomed_too = small.submit(Request([*b"x"], 60))
    replies = [small.submit(request) for request in others]  # the last waits for a row
    for _ in range(rounds):
        small.step()
    for one in (doomed, doomed_too):
        small.cancel(one)
        small.cancel(one)  # a second time changes nothing
    made = len(doomed_too.tokens)
    assert doomed.reason == doomed_too.reason == "cancelled" and len(small._free) == SLOTS - len(small._taken)
    small.step()
    assert not small._waiting  # the last has one of their rows
    while small.busy:
        small.step()
    assert texts_of(replies) == want and len(doomed_too.tokens) == made
    assert sorted(small._free) == [*range(SLOTS)]


def test_a_stream_that_nobody_reads_on_frees_its_row(small: Engine) -> None:
    stream = small.stream(Request([*b"abc"], 40))
    next(stream)
    assert small.busy
    stream.close()
    assert not small.busy


# Models


def test_a_layout_of_one_device_takes_one_and_that_of_training_has_no_say() -> None:
    """Eight are attached."""
    config = Config("x", replace(SMALL, num_heads=4), train=TrainConfig(batch_size=1))
    assert api._layout(config, LayoutConfig(fsdp=1)) is None
    two = api._layout(config, LayoutConfig(fsdp=1, tensor=2))
    assert two and two.mesh.size == two.mesh.shape["tensor"] == 2
    every = api._layout(config, None)
    assert every and every.mesh.size == 8 and every.mesh.shape["tensor"] == 4
    with pytest.raises(UserError, match=r"layout.tensor = 16: tensor 16 does not match 8 device"):
        api._layout(config, LayoutConfig(fsdp=1, tensor=16))
