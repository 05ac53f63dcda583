"""What encoders and encoder-decoders need beside a text's ids: marks, sentinels, where words and sentences are."""

import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gptjax.data.tokenizers.tokenizer import MARKS, MODES, Tokenizer
from gptjax.errors import UserError

UL2_MODES = ("[NLU]", "[S2S]", "[NLG]")  # what UL2's publisher calls MODES
WORD_BYTES = np.array([b >= 128 or chr(b).isalnum() for b in range(256)])
ENDS = (b".", b"!", b"?")
CLOSERS = b"\"')]"


@dataclass(frozen=True)
class Marks:
    """The ids of an encoder's marks, and how they frame one text or two."""

    cls: int
    sep: int
    mask: int
    pad: int
    lead: tuple[int, ...]
    """Before a text: BERT's [CLS], RoBERTa's and BART's <s>, nothing of T5."""
    double_sep: bool
    """Whether two separators stand between two texts, as RoBERTa has it."""
    types: bool
    """Whether the second of two texts has a type of its own, as BERT has it."""


def marks(tokenizer: Tokenizer) -> Marks:
    """The marks of a tokenizer. Raises UserError where the vocabulary has no room for one."""
    if missing := [name for role, name in MARKS.items() if role not in tokenizer.roles]:
        needed = tokenizer.vocab_size + len(tokenizer.beyond) + len(missing)
        raise UserError(
            f"data.tokenizer: the vocabulary has no {' '.join(missing)}; give model.vocab_size >= {needed}, "
            "so that they are reserved"
        )
    roles, framed = tokenizer.roles, bool(tokenizer.begin or tokenizer.between)
    return Marks(
        **roles,
        lead=tokenizer.begin if framed else (roles["cls"],),
        double_sep=len(tokenizer.between) > 1,
        types=tokenizer.types or not framed,
    )


def sentinels(tokenizer: Tokenizer) -> np.ndarray:
    """Ids of <extra_id_0>, <extra_id_1>.. in order of use, int32 [S]. T5's descend from the end of the vocabulary."""
    ids: list[int] = []
    while (i := tokenizer.special.get(f"<extra_id_{len(ids)}>")) is not None:
        ids.append(i)
    return np.array(ids, np.int32)


def modes(tokenizer: Tokenizer) -> np.ndarray:
    """Ids of MODES, by the names of UL2 where it has those, int32 [3]; [0] where it has none."""
    names = next((names for names in (UL2_MODES, MODES) if tokenizer.special.keys() >= set(names)), ())
    return np.array([tokenizer.special[name] for name in names], np.int32)


def word_starts(tokenizer: Tokenizer) -> Callable[[np.ndarray], np.ndarray]:
    """Ids [N] to bool [N]: places that begin a word. Of WordPiece those without its prefix; else those that begin with
    a blank or a sign, and those whose letter, digit or other byte follows one, for which the id before is looked at."""
    rules = json.loads(tokenizer.files.get("tokenizer.json", b"{}"))
    model = rules.get("model", {})
    if model.get("type") == "WordPiece":
        whole = np.ones(tokenizer.vocab_size, bool)
        whole[[i for name, i in model["vocab"].items() if name.startswith(model["continuing_subword_prefix"])]] = False
        return lambda ids: whole[ids]
    first = np.array([bool(piece) and WORD_BYTES[piece[0]] for piece in tokenizer.pieces])
    last = np.array([bool(piece) and WORD_BYTES[piece[-1]] for piece in tokenizer.pieces])
    first[list(tokenizer.special.values())] = last[list(tokenizer.special.values())] = False
    return lambda ids: ~(first[ids] & np.concatenate([[False], last[ids[:-1]]])[: len(ids)])


def sentence_ends(tokenizer: Tokenizer) -> Callable[[np.ndarray], np.ndarray]:
    """Ids [N] to bool [N]: places whose text ends a sentence: . ! or ?, perhaps with a quote or bracket behind in the
    same token, or a newline. Abbreviations count as ends: good enough to cut at, not to count sentences."""

    def ends(piece: bytes) -> bool:
        return piece.endswith(b"\n") or piece.rstrip(b" ").rstrip(CLOSERS).endswith(ENDS)

    table = np.array([ends(piece) for piece in tokenizer.pieces])
    table[list(tokenizer.special.values())] = False
    return lambda ids: table[ids]
