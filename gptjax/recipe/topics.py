"""A task made of encyclopaedia text as WikiText has it: of which article is a sentence?

`python -m gptjax.recipe.topics TEXT FILE.jsonl` writes the sentences of the eight longest articles, each with the
title of its own, such as ward-churchill, and prints the titles for a config's labels.names.
"""

import json
import random
import re
import sys
from collections import defaultdict
from pathlib import Path

ARTICLES, MIN_WORDS = 8, 6


def articles(text: str) -> dict[str, list[str]]:
    """By title the sentences of each article, headings left out; of several with one title the sentences of all."""
    found, title = defaultdict[str, list[str]](list), ""
    for line in map(str.strip, text.splitlines()):
        if heading := re.fullmatch(r"= ([^=]+) =", line):
            title = "-".join(re.findall(r"[a-z0-9]+", heading[1].replace("<unk>", "").lower()))
        elif title and not line.startswith("="):
            found[title] += [part for part in re.split(r"(?<=[.!?])\s", line) if len(part.split()) >= MIN_WORDS]
    return found


def labelled(text: str, seed: int = 0) -> list[tuple[str, str]]:
    """Sentences and titles of the longest articles, shuffled."""
    found = articles(text)
    longest = sorted(found, key=lambda title: -len(found[title]))[:ARTICLES]
    rows = [(sentence, title) for title in longest for sentence in found[title]]
    random.Random(seed).shuffle(rows)
    return rows


def write(text: Path, out: Path) -> None:
    """A line of JSON for each sentence, with `text` and `label`."""
    rows = labelled(text.read_text())
    out.write_text("".join(json.dumps({"text": sentence, "label": title}) + "\n" for sentence, title in rows))
    print(",".join(sorted({title for _, title in rows})))


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
