"""Documents with their middle last: nothing of a text is lost, and the stream draws it by position alone."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.config import Config
from gptjax.data.infill import MIDDLE, PREFIX, SUFFIX, infill_prompt, rearranged
from gptjax.data.rows import Rows
from gptjax.data.store import Record, cut
from gptjax.data.stream import TokenStream
from gptjax.data.tokenizers import Tokenizer, load_tokenizer, train_sentencepiece
from gptjax.data.tokenizers.tokenizer import INFILL
from gptjax.errors import UserError
from gptjax.stages.pretrain import Pretrain

BYTES = load_tokenizer("fim:bytes")
PRE, SUF, MID = (BYTES.special[name] for name in INFILL)
T = 32


def parts(ids: list[int], special: dict[str, int]) -> tuple[list[int], list[int], list[int]]:
    """What follows each of the three marks, which stand in this order."""
    first, second, third = (ids.index(special[name]) for name in (PREFIX, SUFFIX, MIDDLE))
    assert first == 0 and first < second < third
    return ids[1:second], ids[second + 1 : third], ids[third + 1 :]


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("pieces") / "tokenizer.model"
    train_sentencepiece(["the quick brown fox, the lazy dog: " * 9, "\n    return ünïcode 東京"], 300, path)
    return load_tokenizer(f"fim:{path}")


@settings(max_examples=200, deadline=None)
@given(st.text(), st.integers(0, 2**32 - 1), st.booleans())
def test_every_character_is_there_once(pieces: Tokenizer, text: str, seed: int, by_bytes: bool) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    tokenizer = BYTES if by_bytes else pieces
    prefix, suffix, middle = parts(rearranged(text, tokenizer, np.random.default_rng(seed)).tolist(), tokenizer.special)
    assert tokenizer.decode([*prefix, *middle, *suffix]) == text


def test_a_text_that_spells_a_mark_yields_none() -> None:
    ids = infill_prompt(BYTES, PREFIX, MIDDLE).tolist()
    assert parts(ids, BYTES.special) == ([*PREFIX.encode()], [*MIDDLE.encode()], [])


def test_a_tokenizer_comes_back_with_its_marks(pieces: Tokenizer, tmp_path: Path) -> None:
    for tokenizer in (BYTES, BYTES.with_template("x"), pieces):
        again = load_tokenizer(tokenizer.save(tmp_path))
        assert again.special == tokenizer.special and again.infills and again.with_infill() is again
        assert load_tokenizer(again.spec.removeprefix("fim:").format(tmp_path)).vocab_size + 3 == again.vocab_size


# The stream


def corpus(longest: int) -> list[Record]:
    """Documents of which those above 25 characters are several records."""
    texts = ["".join(chr(97 + (7 * i + k) % 26) for k in range(5 + i % (longest - 4))) for i in range(40)]
    return [record for text in texts for record in cut([text], 25)]


def stream(
    rate: float, rows: list[int] | None = None, positions: list[int] | None = None, longest: int = 50
) -> TokenStream:
    how = {"lanes": 2, "seed": 3, "micro_batch": 4, "rows": rows, "positions": positions}
    return TokenStream(corpus(longest), BYTES, T, fim_rate=rate, **how)


def batches(made: TokenStream, count: int) -> list[Rows]:
    return [made.batch(2) for _ in range(count)]


def documents(lane: int, made: list[Rows]) -> Iterator[list[int]]:
    """What stands between two ends of text in a lane."""
    ids = np.concatenate([batch.tokens[:, 2 * lane : 2 * lane + 2].ravel() for batch in made])
    for document in np.split(ids, np.flatnonzero(ids == BYTES.eot) + 1):
        yield document.tolist()


def test_without_a_rate_nothing_changes() -> None:
    plain = TokenStream(corpus(50), load_tokenizer("bytes"), T, lanes=2, seed=3, micro_batch=4)
    for a, b in zip(batches(plain, 20), batches(stream(0.0), 20), strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)


def test_a_stream_goes_on_anywhere_and_on_two_processes() -> None:
    whole = stream(0.7)
    begun, stood = batches(whole, 3), whole.positions
    rest = batches(whole, 30)
    for a, b in zip(rest, batches(stream(0.7, positions=stood), 30), strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
    each = [batches(stream(0.7, rows=rows), 33) for rows in ([0, 1], [2, 3])]
    for batch, *halves in zip([*begun, *rest], *each, strict=True):
        np.testing.assert_array_equal(batch.targets, np.concatenate([half.targets for half in halves], axis=1))


def test_the_share_is_as_asked_in_both_orders_and_drawn_anew_in_each_epoch() -> None:
    made = batches(stream(0.5, longest=25), 200)
    found = [document for lane in (0, 1) for document in documents(lane, made)][1:-1]
    marked = [document for document in found if PRE in document]
    share = len(marked) / len(found)
    assert abs(share - 0.5) < 4 * 0.5 / len(found) ** 0.5
    suffix_first = sum(document[document.index(PRE) + 1] == SUF for document in marked) / len(marked)
    assert 0.4 < suffix_first < 0.65  # an empty prefix looks like one
    assert len({tuple(document) for document in marked}) > 4 * 40  # more than there are documents


# The stage


def test_room_for_the_marks(tiny: Config) -> None:
    config = replace(tiny, data=replace(tiny.data, fim_rate=0.5))
    with pytest.raises(
        UserError, match=r"model.vocab_size = 261: no room for the tokens of data.fim_rate, .*nearest 264"
    ):
        Pretrain.fit_tokenizer(replace(config, model=replace(config.model, vocab_size=261)), load_tokenizer("bytes"))
    fitted = Pretrain.fit_tokenizer(
        replace(config, model=replace(config.model, vocab_size=264)), load_tokenizer("bytes")
    )
    assert fitted.infills and fitted.vocab_size == 264


def test_a_model_that_has_not_learned_it_says_so() -> None:
    with pytest.raises(UserError, match=r"suffix: this model has not learned to fill in"):
        infill_prompt(load_tokenizer("bytes"), "a", "b")
