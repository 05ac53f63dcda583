"""Figures of classes and numbers that were told, and of texts that were written, against their definitions and other
libraries. Run: pytest tests/test_told.py"""

import sys
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from gptjax.classes import of_classes, of_numbers
from gptjax.errors import UserError
from gptjax.evaluate import texts

# Classes


def test_two_classes_by_hand() -> None:
    """3 true and told 1, 1 missed, 2 told for nothing, 4 rightly 0."""
    truth, told = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 1, 1, 0, 0, 0, 0]
    found = of_classes(truth, told, 2)
    matthews = (3 * 4 - 2 * 1) / np.sqrt((3 + 2) * (3 + 1) * (4 + 2) * (4 + 1))
    wanted = {"accuracy": 0.7, "precision": 3 / 5, "recall": 3 / 4, "f1": 2 / 3, "matthews": matthews}
    assert found == pytest.approx(wanted) and all(type(value) is float for value in found.values())


def test_three_classes_by_hand() -> None:
    """Of a fourth that does not occur nothing is said."""
    found = of_classes([0, 0, 1, 2], [0, 1, 1, 1], 4)
    wanted = {"accuracy": 1 / 2, "precision": (1 + 1 / 3 + 0) / 3, "recall": (1 / 2 + 1 + 0) / 3}
    matthews = (2 * 4 - (1 * 2 + 3 * 1)) / np.sqrt((16 - (1 + 9)) * (16 - (4 + 1 + 1)))
    assert found == pytest.approx(wanted | {"f1": (2 / 3 + 1 / 2 + 0) / 3, "matthews": matthews})


@pytest.mark.parametrize(
    ("told", "accuracy", "matthews"), [([0, 1, 0, 1], 1, 1), ([1, 0, 1, 0], 0, -1), ([0] * 4, 0.5, 0)]
)
def test_the_ends_of_matthews_correlation(told: list[int], accuracy: float, matthews: float) -> None:
    found = of_classes([0, 1, 0, 1], told, 2)
    assert (found["accuracy"], found["matthews"]) == pytest.approx((accuracy, matthews))


CLASSES = st.integers(2, 5).flatmap(
    lambda count: st.tuples(
        st.just(count), st.lists(st.tuples(*[st.integers(0, count - 1)] * 2), min_size=1, max_size=30)
    )
)


@settings(deadline=None)
@given(CLASSES)
def test_matthews_is_the_correlation_of_the_classes(drawn: tuple[int, list[tuple[int, int]]]) -> None:
    """Of what stands for each as a row of zeros and a one: the covariances of both, summed over the classes."""
    count, pairs = drawn
    truth, told = np.array(pairs).T
    one, other = (np.eye(count)[each] - np.eye(count)[each].mean(0) for each in (truth, told))
    spread = (one**2).sum() * (other**2).sum()
    found = of_classes(truth, told, count)
    assert found["matthews"] == pytest.approx((one * other).sum() / np.sqrt(spread) if spread > 1e-12 else 0)
    assert found["accuracy"] == pytest.approx(np.mean(truth == told))


@settings(deadline=None)
@given(CLASSES)
def test_classes_as_scikit_learn_has_them(drawn: tuple[int, list[tuple[int, int]]]) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    count, pairs = drawn
    truth, told = np.array(pairs).T
    average = "binary" if count == 2 else "macro"
    shares = metrics.precision_recall_fscore_support(truth, told, average=average, zero_division=0)[:3]
    found = of_classes(truth, told, count)
    assert [found[name] for name in ("precision", "recall", "f1")] == pytest.approx(shares)


# Numbers


def test_numbers_by_hand() -> None:
    found = of_numbers([1, 2, 3, 4], [2, 2, 5, 4])
    assert found["mse"] == (1 + 0 + 4 + 0) / 4
    assert found["pearson"] == pytest.approx((1.5 * 1.25 + 0.5 * 1.25 + 0.5 * 1.75 + 1.5 * 0.75) / np.sqrt(5 * 6.75))
    # ranks 1 2 3 4 and 1.5 1.5 4 3
    assert found["spearman"] == pytest.approx((1.5 * 1 + 0.5 * 1 + 0.5 * 1.5 + 1.5 * 0.5) / np.sqrt(5 * 4.5))
    assert of_numbers([1, 2, 3], [-10, -100, -1000]) == pytest.approx(
        {
            "mse": np.mean([121, 102**2, 1003**2]),
            "pearson": stats.pearsonr([1, 2, 3], [-1, -10, -100])[0],
            "spearman": -1,
        }
    )
    assert of_numbers([1, 2, 3], [5, 5, 5]) == pytest.approx({"mse": (16 + 9 + 4) / 3, "pearson": 0, "spearman": 0})


NUMBERS = st.lists(st.tuples(*[st.integers(-8, 8).map(lambda i: i / 2)] * 2), min_size=2, max_size=30)


@settings(deadline=None)
@given(NUMBERS)
def test_correlations_as_scipy_has_them(pairs: list[tuple[float, float]]) -> None:
    truth, told = np.array(pairs).T
    found = of_numbers(truth, told)
    if np.ptp(truth) == 0 or np.ptp(told) == 0:
        assert found["pearson"] == found["spearman"] == 0
        return
    assert found["pearson"] == pytest.approx(stats.pearsonr(truth, told)[0])
    assert found["spearman"] == pytest.approx(stats.spearmanr(truth, told)[0])


# Texts

WRITTEN = ["The cat sat on the mat .", "There is a house ."]
REFERENCES = ["The cat sat on a red mat .", "There is a small house ."]


def test_bleu_by_hand() -> None:
    pytest.importorskip("sacrebleu")
    assert texts.bleu(REFERENCES, REFERENCES) == pytest.approx(100)
    # Of 12 words 11 are there, of 10 pairs 7, of 8 threes 3, of 6 fours 1; 12 words for 14.
    shares = [11 / 12, 7 / 10, 3 / 8, 1 / 6]
    assert texts.bleu(WRITTEN, REFERENCES) == pytest.approx(100 * np.prod(shares) ** 0.25 * np.exp(1 - 14 / 12))


def test_chrf_by_hand() -> None:
    pytest.importorskip("sacrebleu")
    assert texts.chrf(["abcdef"], ["abcdef"]) == pytest.approx(100)
    # Orders up to the three that there are, precision and recall each a mean over them: 2/3, 1/2 and 0 of 3, 2 and 1.
    share = (2 / 3 + 1 / 2 + 0) / 3
    assert texts.chrf(["abc"], ["abd"]) == pytest.approx(100 * share)


def test_rouge_by_hand() -> None:
    pytest.importorskip("rouge_score")
    assert texts.rouge(REFERENCES, REFERENCES) == {"rouge_1": 100, "rouge_2": 100, "rouge_l": 100}
    # the cats sat | a cat sat down: the stems cat and sat are shared, and the one pair of them
    found = texts.rouge(["The cats sat"], ["a cat sat down"])
    assert found == pytest.approx({"rouge_1": 100 * 4 / 7, "rouge_2": 100 * 2 / 5, "rouge_l": 100 * 4 / 7})
    found = texts.rouge(["one two three"], ["three two one"])
    assert found == pytest.approx({"rouge_1": 100, "rouge_2": 0, "rouge_l": 100 / 3})
    both = texts.rouge(["one two three", "no"], ["three two one", "yes"])
    assert both == pytest.approx({name: value / 2 for name, value in found.items()})


def test_the_share_that_is_the_reference() -> None:
    assert texts.exact(["a", " b\n", "c", "D"], ["a", "b", "c c", "d"]) == 50


FIGURES = {"bleu": "sacrebleu", "chrf": "sacrebleu", "rouge": "rouge_score", "exact": ""}


@pytest.mark.parametrize(("figure", "library"), FIGURES.items())
def test_wrong_texts_and_a_missing_extra(figure: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    measure: Callable[[list[str], list[str]], object] = getattr(texts, figure)
    with pytest.raises(ValueError, match="2 texts for 1 references"):
        measure(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="0 texts for 0 references"):
        measure([], [])
    if library:
        monkeypatch.setitem(sys.modules, library, None)
        monkeypatch.delitem(sys.modules, "rouge_score.rouge_scorer", raising=False)
        with pytest.raises(
            UserError, match=rf"^figures of texts: no module {library}.*; pip install 'gptjax\[eval\]'$"
        ):
            measure(["a"], ["a"])
