"""Data and rules of the tasks beside this file, from files that lie in a folder; nothing is fetched."""

import json
import random
import re
from pathlib import Path
from typing import Any

from gptjax.errors import UserError

EXAMPLES = 8  # of GSM8K, that may stand before a question
TITLE = re.compile(r"^ = [^=\n]+ = $", re.MULTILINE)
WORD = re.compile(r"[a-z]{4,}")
LEAST_WORDS = 8  # of a sentence, before its last
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def gsm8k(data: str = "", **_: Any) -> dict[str, Any]:
    """Questions with answers that end in `#### number`."""
    files = _files(data, "gsm8k*.jsonl")
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines() if line]
    pairs = [{"question": row["question"], "answer": row["answer"]} for row in rows]
    return {"examples": _set(pairs[:EXAMPLES]), "test": _set(pairs[EXAMPLES:])}


def last_number(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """Whether the last number of a reply is that of the answer."""
    wanted, given = number(doc["answer"]), number(results[0])
    return {"exact_match": float(wanted is not None and wanted == given)}


def number(text: str) -> float | None:
    """The number after `####`, or else the last one; None without any."""
    marked = text.rpartition("####")[2] if "####" in text else text
    found = NUMBER.findall(marked)
    if not found:
        return None
    return float((found[0] if "####" in text else found[-1]).replace(",", ""))


def articles(data: str = "", **_: Any) -> dict[str, Any]:
    """Whole articles."""
    return {"test": _set([{"page": page} for page in _pages(data)])}


def cloze(data: str = "", **_: Any) -> dict[str, Any]:
    """Sentences without their last word, and four words, of which one is right: always the same for the same text."""
    found = [
        (" ".join(words[:-1]), words[-1])
        for page in _pages(data)
        for sentence in re.split(r" \. |\n", page)
        if (words := sentence.split()) and len(words) > LEAST_WORDS and WORD.fullmatch(words[-1])
        if "<unk>" not in words
    ]
    others, rng = sorted({word for _, word in found}), random.Random(0)
    if len(others) < 4:
        raise UserError(f"--data {data}: too few sentences for a cloze test; give a longer wikitext*.txt")
    rows = []
    for sentence, word in found:
        words = [word, *(other for other in rng.sample(others, 4) if other != word)][:4]
        rng.shuffle(words)
        rows.append({"sentence": sentence, "words": words, "right": words.index(word)})
    return {"test": _set(rows)}


def _pages(data: str) -> list[str]:
    """Articles of all files, in order; a title begins each."""
    pages = []
    for file in _files(data, "wikitext*.txt"):
        text = file.read_text(encoding="utf-8")
        starts = [match.start() for match in TITLE.finditer(text)] or [0]
        pages += [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]
    return pages


def _files(data: str, pattern: str) -> list[Path]:
    if not data:
        raise UserError(f"--data: empty; name the folder that holds {pattern}")
    files = sorted(Path(data).glob(pattern))
    if not files:
        raise UserError(f"--data {data}: no {pattern} in it; name the folder that holds it")
    return files


def _set(rows: list[dict[str, Any]]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(rows)
