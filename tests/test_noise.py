"""Texts to be restored: nothing is lost, as much is taken as the papers say, and what is promised to fit does."""

from collections import Counter
from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.config import NoiseConfig
from gptjax.data.noise import Infill, Marks, Mixture, Noise, Spans, Suffix, corrupted, denoiser, room, ul2

EOS, MASK = 1, 4
MODES = (5, 6, 7)
FIRST = 1000  # sentinels go down from it, as T5's do
TEXT = 2000
MARKS = Marks(EOS, np.arange(FIRST, FIRST - 400, -1, dtype=np.int32), MODES, MASK)
SEEDS = st.integers(0, 2**32 - 1)
RATES, MEANS = st.floats(0.01, 0.99), st.floats(1, 70)
NONE = np.zeros(0, bool)


def text(length: int) -> np.ndarray:
    """Ids that are all different, so that each tells its place."""
    return np.arange(TEXT, TEXT + length, dtype=np.int32)


def made(noise: Noise, length: int, seed: int) -> tuple[list[int], list[int]]:
    """What it makes of a text of one sentence, without the two ends."""
    inputs, targets = noise(text(length), np.zeros(length, bool), np.random.default_rng(seed))
    assert inputs.dtype == targets.dtype == np.int32 and inputs[-1] == targets[-1] == EOS
    return inputs[:-1].tolist(), targets[:-1].tolist()


def spans(targets: list[int]) -> dict[int, list[int]]:
    """What follows each sentinel."""
    found: dict[int, list[int]] = {}
    for each in targets:
        if each <= FIRST:
            assert each not in found
            found[each] = []
        else:
            found[list(found)[-1]].append(each)
    return found


def restored(inputs: list[int], targets: list[int]) -> list[int]:
    """The text, and a test that its sentinels come in their order."""
    hidden = spans(targets)
    used = [each for each in inputs if each <= FIRST]
    assert used == [FIRST - k for k in range(len(used))] == list(hidden)[: len(used)]
    return [token for each in inputs for token in (hidden[each] if each <= FIRST else [each])]


# Spans


def words(line: str) -> np.ndarray:
    return np.array([int.from_bytes(word.encode()[:3], "little") for word in line.split()], np.int32)


@pytest.mark.parametrize(
    ("whole", "noised", "inputs", "targets"),
    [
        # figure 2 of the paper, and the example of transformers' page on T5
        (
            "Thank you for inviting me to your party last week .",
            [2, 3, 8],
            "Thank you <X> me to your party <Y> week . </s>",
            "<X> for inviting <Y> last <Z> </s>",
        ),
        (
            "The cute dog walks in the park",
            [1, 2, 5],
            "The <X> walks in <Y> park </s>",
            "<X> cute dog <Y> the <Z> </s>",
        ),
        ("a b c d", [0, 3], "<X> b c <Y> </s>", "<X> a <Y> d </s>"),
        ("a b", [], "a b </s>", "<X> </s>"),
    ],
)
def test_published_examples(whole: str, noised: list[int], inputs: str, targets: str) -> None:
    marks = Marks(int(words("</s>")[0]), words("<X> <Y> <Z>"))
    ids = words(whole)
    found = corrupted(ids, np.isin(np.arange(len(ids)), noised), marks)
    np.testing.assert_array_equal(found[0], words(inputs))
    np.testing.assert_array_equal(found[1], words(targets))


@given(st.integers(2, 300), RATES, MEANS, SEEDS)
def test_spans_come_back_and_are_as_many_as_asked(length: int, rate: float, mean: float, seed: int) -> None:
    inputs, targets = made(Spans(rate, mean, MARKS), length, seed)
    assert (inputs, targets) == made(Spans(rate, mean, MARKS), length, seed)
    assert restored(inputs, targets) == text(length).tolist()
    hidden = list(spans(targets).values())
    noised = min(max(round(length * rate), 1), length - 1)
    assert sum(map(len, hidden)) == noised and all(hidden)
    assert len(hidden) == min(max(round(noised / mean), 1), noised, length - noised)
    assert inputs[0] > FIRST >= inputs[-1]


def test_all_divisions_are_as_likely() -> None:
    """4 of 8 tokens in 2 spans, behind 2 others: each 4 is 1 + 3, 2 + 2 or 3 + 1."""
    rng = np.random.default_rng(0)
    count = 9000
    found = Counter(tuple(Spans(0.5, 2, MARKS)(text(8), NONE, rng)[0].tolist()) for _ in range(count))
    assert len(found) == 9
    assert all(abs(each - count / 9) < 4.5 * (count * 8 / 81) ** 0.5 for each in found.values())


def test_too_few_sentinels_are_refused() -> None:
    few = Marks(EOS, MARKS.sentinels[:4])
    Spans(0.5, 2, few)(text(16), NONE, np.random.default_rng(0))
    with pytest.raises(ValueError, match="4 sentinels for 5 spans"):
        Spans(0.5, 2, few)(text(20), NONE, np.random.default_rng(0))


# The mixture


def test_seven_denoisers_as_often() -> None:
    """Table 1: of 512 tokens 77 or 256, in as many spans as the means make of them, behind each mode."""
    regular, sequential, extreme = MODES
    expected = {
        (regular, 77, 26): 1,
        (regular, 77, 10): 1,
        (extreme, 256, 85): 1,
        (extreme, 256, 32): 1,
        (extreme, 77, 1): 1,
        (extreme, 256, 4): 1,
    }
    noise = ul2(Spans(0.15, 3, MARKS))
    rng = np.random.default_rng(1)
    count = 3500
    found: Counter[tuple[int, int, int]] = Counter()
    suffixes = []
    for _ in range(count):
        (mode, *inputs), targets = (each.tolist()[:-1] for each in noise(text(512), NONE, rng))
        assert restored(inputs, targets) == text(512).tolist()
        hidden = spans(targets)
        if mode == sequential:
            assert inputs[-1] == FIRST and list(hidden) == [FIRST]
            suffixes.append(len(hidden[FIRST]))
        else:
            found[mode, sum(map(len, hidden.values())), len(hidden)] += 1
    assert found.keys() == expected.keys()
    assert all(abs(each - count / 7) < 4 * (count * 6 / 49) ** 0.5 for each in (*found.values(), len(suffixes)))
    assert min(suffixes) < 20 and 235 < max(suffixes) < 256
    assert abs(np.mean(suffixes) - 128) < 4 * 256 / 12**0.5 / len(suffixes) ** 0.5


# Infilling


@given(st.integers(2, 200), RATES, st.floats(1, 9), SEEDS)
def test_one_mask_for_each_span(length: int, rate: float, mean: float, seed: int) -> None:
    """What stays is in order, there is a mask wherever something is missing, and as much is missing as asked."""
    inputs, targets = made(Infill(rate, mean, MASK, EOS), length, seed)
    assert (inputs, targets) == made(Infill(rate, mean, MASK, EOS), length, seed)
    assert targets == text(length).tolist() and len(inputs) <= length
    kept = [each for each in inputs if each != MASK]
    assert len(kept) == length - max(round(length * rate), 1) and kept == sorted(set(kept))
    last, masks = TEXT - 1, 0
    for each in [*inputs, TEXT + length]:
        if each == MASK:
            masks += 1
            continue
        assert TEXT <= each <= TEXT + length and (each == last + 1 or masks)
        last, masks = each, 0


def test_spans_have_poisson_lengths() -> None:
    """Of a long text the masks are as many as lengths of Poisson(3) that sum to its share, those of 0 among them."""
    rng = np.random.default_rng(2)
    length, draws = 3000, 60
    noise = Infill(0.3, 3, MASK, EOS)
    masks, inserted, together = [], 0, 0
    for _ in range(draws):
        inputs = noise(text(length), np.zeros(length, bool), rng)[0][:-1]
        masks.append(int((inputs == MASK).sum()))
        runs = np.split(inputs, np.flatnonzero(inputs != MASK))
        for before, after in pairwise(runs):
            if len(before) == 2 and before[0] != MASK:  # one mask between two tokens that stay
                together += 1
                inserted += int(after[0] == before[0] + 1)
    assert abs(np.mean(masks) - 300) < 4 * (300 / 3 / draws) ** 0.5 + 1
    share = np.exp(-3)
    assert abs(inserted / together - share) < 4 * (share / together) ** 0.5


def test_sentences_come_in_every_order() -> None:
    """Of three, of which the last has no end: each stays together, and each order is as likely."""
    ends = np.isin(np.arange(30), [9, 19])
    rng = np.random.default_rng(3)
    count = 3000
    found: Counter[tuple[int, ...]] = Counter()
    for _ in range(count):
        inputs, targets = Infill(0.1, 3, MASK, EOS)(text(30), ends, rng)
        np.testing.assert_array_equal(targets[:-1], text(30))
        kept = inputs[:-1][inputs[:-1] != MASK] - TEXT
        order = tuple(dict.fromkeys((kept // 10).tolist()))
        np.testing.assert_array_equal(kept, sorted(kept, key=lambda place: (order.index(place // 10), place)))
        found[order] += 1
    assert found.keys() == set(permutations(range(3)))
    assert all(abs(each - count / 6) < 4 * (count * 5 / 36) ** 0.5 for each in found.values())


# Room


def test_room_is_that_of_t5() -> None:
    """Which splits texts into 568 tokens for inputs of 512, and has targets of 114."""
    noise = Spans(0.15, 3, MARKS)
    assert room(noise, 512, 114) == 568 and room(noise, 512, 113) < 568
    assert [len(side) + 1 for side in made(noise, 568, 0)] == [512, 114]


@given(st.integers(4, 90), st.integers(4, 90), RATES, MEANS, st.integers(1, 20), SEEDS)
def test_all_texts_fit_up_to_the_room_of_spans_and_none_beyond(
    inputs: int, targets: int, rate: float, mean: float, sentinels: int, seed: int
) -> None:
    noise = Spans(rate, mean, Marks(EOS, MARKS.sentinels[:sentinels]))
    most = room(noise, inputs, targets)
    assert most >= 2
    for length in range(2, most + 1):
        found = made(noise, length, seed)
        assert len(found[0]) < inputs and len(found[1]) < targets
    more = made(Spans(rate, mean, MARKS), most + 1, seed)
    assert len(more[0]) >= inputs or len(more[1]) >= targets or len(spans(more[1])) > sentinels


@pytest.mark.parametrize(
    "noise", [Suffix(MARKS), Infill(0.5, 1, MASK, EOS), ul2(Spans(0.15, 3, MARKS))], ids=["suffix", "infill", "ul2"]
)
@pytest.mark.parametrize(("inputs", "targets"), [(12, 12), (12, 9), (9, 12), (40, 9), (9, 40)])
def test_the_room_of_what_varies_is_never_too_large_and_cannot_be_larger(
    noise: Noise, inputs: int, targets: int
) -> None:
    most = room(noise, inputs, targets)
    assert most >= 2

    def longest(length: int) -> list[int]:
        return np.max([[len(side) + 1 for side in made(noise, length, seed)] for seed in range(150)], 0).tolist()

    for length in range(2, most + 1):
        found = longest(length)
        assert found[0] <= inputs and found[1] <= targets
    more = longest(most + 1)
    assert more[0] > inputs or more[1] > targets


def test_no_room() -> None:
    assert room(Spans(0.15, 3, MARKS), 2, 9) < 2
    assert room(Spans(0.15, 3, Marks(EOS)), 99, 99) < 2
    for noise in (Spans(0.15, 3, MARKS), Suffix(MARKS), Infill(0.3, 3, MASK, EOS)):
        with pytest.raises(ValueError, match="a text of 1 tokens"):
            noise(text(1), np.zeros(1, bool), np.random.default_rng(0))


# A config


def test_each_kind_is_what_its_config_says() -> None:
    assert denoiser(NoiseConfig(), MARKS) == Spans(0.15, 3.0, MARKS)
    assert denoiser(NoiseConfig("infill", 0.3, 3.5), MARKS) == Infill(0.3, 3.5, MASK, EOS)
    mixed = denoiser(NoiseConfig("ul2", 0.2, 4.0), MARKS)
    assert isinstance(mixed, Mixture) and mixed.denoisers[0] == (MODES[0], Spans(0.2, 4.0, MARKS))
    for kind, missing in (("ul2", "modes"), ("infill", "mask")):
        with pytest.raises(ValueError, match=f"{kind}: no {missing}"):
            denoiser(NoiseConfig(kind), Marks(EOS, MARKS.sentinels))
