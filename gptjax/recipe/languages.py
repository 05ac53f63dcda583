"""Two made-up languages with the same meanings, so that every translation has one right answer.

Plain puts the verb between subject and object, and adjectives before their noun: `the old miller gives the bread to a
small dog today`. Hill puts the time first and the verb last, adjectives behind the noun, says by an ending who does
what, and leaves the articles out: a definite noun is said by `-o`. A model has to move words, not only to replace them.

`python -m gptjax.recipe.languages FOLDER` writes pairs and a tokenizer.
"""

import json
import sys
from pathlib import Path

import numpy as np

NOUNS = {
    "miller": "dakur",
    "dog": "wem",
    "bread": "pila",
    "queen": "sonat",
    "river": "gorim",
    "letter": "ketu",
    "child": "mibe",
    "horse": "tarok",
    "apple": "lufi",
    "tower": "ondar",
    "smith": "brugan",
    "song": "zeli",
    "bird": "cipu",
    "lamp": "yotem",
    "friend": "nasil",
    "boat": "hopra",
}
ADJECTIVES = {
    "old": "gar",
    "small": "nin",
    "red": "sup",
    "quiet": "lom",
    "tall": "dren",
    "kind": "ave",
    "wet": "muk",
    "new": "fes",
}
VERBS = {
    "sees": "rin",
    "finds": "kado",
    "paints": "vul",
    "carries": "beth",
    "loves": "oma",
    "hears": "tis",
    "gives": "pren",
    "sells": "juk",
}
TWICE = ("gives", "sells")  # verbs that say to whom
TIMES = {"today": "ish", "yesterday": "eru", "tomorrow": "wato", "often": "mem", "never": "zul"}
OBJECT, RECEIVER, DEFINITE = "ka", "ti", "o"
SENTENCES, PIECES = 20_000, 300


def pair(rng: np.random.Generator) -> tuple[str, str]:
    """A sentence in Plain, and in Hill."""
    verb = str(rng.choice([*VERBS]))
    subject, thing = _noun(rng, ""), _noun(rng, OBJECT)
    plain, hill = [subject[0], verb, thing[0]], [subject[1], thing[1]]
    if verb in TWICE:
        receiver = _noun(rng, RECEIVER)
        plain += ["to", receiver[0]]
        hill.insert(1, receiver[1])
    if rng.random() < 0.6:
        time = str(rng.choice([*TIMES]))
        plain.append(time)
        hill.insert(0, TIMES[time])
    return " ".join(plain), " ".join([*hill, VERBS[verb]])


def _noun(rng: np.random.Generator, ending: str) -> tuple[str, str]:
    """A noun with its article and up to two adjectives, and the same in Hill with the ending of its part."""
    noun, definite = str(rng.choice([*NOUNS])), rng.random() < 0.5
    words = rng.choice([*ADJECTIVES], int(rng.integers(0, 3)), replace=False).tolist()
    plain = " ".join(["the" if definite else "a", *words, noun])
    hill = NOUNS[noun] + DEFINITE * definite + (f"-{ending}" if ending else "")
    return plain, " ".join([hill, *(ADJECTIVES[word] for word in reversed(words))])


def write(folder: Path) -> None:
    """Writes `pairs.jsonl`, SENTENCES different pairs, and `tokenizer.model`."""
    from gptjax.data.tokenizers import train_sentencepiece

    rng, made = np.random.default_rng(0), dict[str, str]()
    while len(made) < SENTENCES:
        source, target = pair(rng)
        made[source] = target
    folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"source": source, "target": target}) for source, target in made.items())
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    train_sentencepiece((text for both in made.items() for text in both), PIECES, folder / "tokenizer.model")


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "languages"))
