"""A task made of any text: was a sentence written so, or have two neighbouring words changed places? Who has learned
the language can tell.

`python -m gptjax.recipe.swapped TEXT FILE.jsonl` writes labelled sentences, each as it was (1) or changed (0).
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

WORDS = range(6, 25)  # of a sentence


def labelled(text: str, seed: int = 0) -> Iterator[tuple[str, int]]:
    """Different sentences of a text, about half of them changed."""
    rng = np.random.default_rng(seed)
    for sentence in dict.fromkeys(part.strip() for part in re.split(r"(?<=[.!?])\s|\n", text)):
        words = sentence.split()
        if len(words) not in WORDS:
            continue
        if rng.random() < 0.5:
            yield " ".join(words), 1
            continue
        at = int(rng.integers(0, len(words) - 1))
        words[at], words[at + 1] = words[at + 1], words[at]
        yield " ".join(words), int(" ".join(words) == sentence)


def write(text: Path, out: Path) -> None:
    """A line of JSON for each sentence, with `text` and `label`."""
    lines = (json.dumps({"text": sentence, "label": label}) for sentence, label in labelled(text.read_text()))
    out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
