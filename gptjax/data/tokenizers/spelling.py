"""No text yields a reserved id, even where the library's model takes the token's name for a word."""

from collections.abc import Callable
from typing import Any

import numpy as np

from gptjax.data.tokenizers.byte_level import byte_names


def guarded(
    encode: Callable[[str], np.ndarray],
    special: dict[str, int],
    vocab_size: int,
    spell: Callable[[str], list[int]],
) -> Callable[[str], np.ndarray]:
    """`encode`, with every reserved id that it makes replaced by the letters of the name that the text spelled."""
    reserved = np.zeros(vocab_size, bool)
    reserved[list(special.values())] = True
    names = {i: name for name, i in special.items()}

    def clean(text: str) -> np.ndarray:
        ids = encode(text)
        if not reserved[ids].any():
            return ids
        return np.array([j for i in ids.tolist() for j in (spell(names[i]) if i in names else [i])], np.int32)

    return clean


def letters(name: str, library: Any, rules: dict[str, Any], unknown: int | None) -> list[int]:
    """The ids of a name's letters: as bytes of byte-level pairs, else as they are, as bytes, or the unknown; what has
    none of these is left out, as the library leaves it out."""
    if library.token_to_id(name) == unknown:
        return []
    if "ByteLevel" in str(rules["decoder"]):
        each = byte_names()
        return [i for byte in name.encode() if (i := library.token_to_id(each[byte])) is not None]
    ids: list[int | None] = []
    for letter in name:
        parts = [library.token_to_id(letter)]
        if parts == [None]:
            parts = [library.token_to_id(f"<0x{byte:02X}>") for byte in letter.encode()]
        ids += [unknown if i is None else i for i in parts]
    return [i for i in ids if i is not None]
