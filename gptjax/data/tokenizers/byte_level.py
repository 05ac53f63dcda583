"""Byte-level BPE as GPT-2 has it: its files, and the fast encoder where that is proved equal."""

import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np

PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
"""Names under which ids and merges are found: Hugging Face's, and GPT-2's own."""

LONG_RUN = 100_000  # characters of white space; GPT-2's rule for them backtracks, and gives up near a million
# Rust's white space, which is Python's without four separators. Only at its start can a run match: linear.
BLANK = r"[^\S\x1c-\x1f]"
RUN = re.compile(rf"(?<!{BLANK}){BLANK}{{{LONG_RUN},}}")


def byte_names() -> list[str]:
    """The visible character that byte-level BPE files write for each byte: itself, or the next one from U+0100 on."""
    visible = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    hidden = [b for b in range(256) if b not in visible]
    names = {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}
    return [names[b] for b in range(256)]


def byte_pairs(files: dict[str, bytes]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Ids by token and merges in order, of the first of PAIRS that is there.

    Raises ValueError, KeyError, TypeError or AttributeError where that is not what the files hold.
    """
    vocab, merges = next((files[a], files[b]) for a, b in PAIRS if a in files and b in files)
    lines = [line for line in merges.decode().split("\n") if line and not line.startswith("#version")]
    ids = json.loads(vocab)
    if missing := set(byte_names()) - ids.keys():
        raise ValueError(f"no token for {len(missing)} of the 256 bytes")
    if any(not isinstance(i, int) or i < 0 for i in ids.values()) or len(set(ids.values())) < len(ids):
        raise ValueError("the ids are not different numbers")
    pairs = [(left, right) for left, right in (line.split(" ") for line in lines)]
    if unknown := next((a + b for a, b in pairs if not {a, b, a + b} <= ids.keys()), None):
        raise ValueError(f"the merge to {unknown!r} names a token that has no id")
    return ids, pairs


def fast_encoder(rules: dict[str, Any], tokenize: Callable[[str], Any]) -> Callable[[str], np.ndarray] | None:
    """tiktoken's encoder for the rules of a tokenizer.json, several times as fast as the library's, if both must agree;
    else None. `tokenize` is the library's model: a word's tokens.

    tiktoken knows no merges: it joins two neighbours if what they make is a token, the lowest id first. That is the
    same where ids have the order of the merges, and every token that a merge makes comes out of its own text whole:
    two neighbours that make it are then always the two of its merge.
    """
    if not _is_gpt2(rules):
        return None
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    vocab, names = rules["model"]["vocab"], byte_names()
    merges = ["".join(pair) for pair in rules["model"]["merges"]]
    order = {token: rank for rank, token in enumerate(merges)}
    ids = [vocab[token] for token in merges]
    if not vocab.keys() >= set(names) or ids != sorted(set(ids)):
        return None
    for rank, pair in enumerate(rules["model"]["merges"]):
        if any(order.get(part, -1) >= rank for part in pair) or len(tokenize("".join(pair))) != 1:
            return None
    to_byte = {name: byte for byte, name in enumerate(names)}
    ranks = {bytes(to_byte[c] for c in token): vocab[token] for token in [*names, *merges]}
    some = {"<|endoftext|>": 1 + max(vocab.values())}  # never made; without any, tiktoken takes half as long again
    encoding = tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=some)

    def encode(text: str) -> np.ndarray:
        parts = [encoding.encode_to_numpy(part, disallowed_special=()) for part in _parts(text)]
        return (parts[0] if len(parts) == 1 else np.concatenate(parts)).view(np.int32)

    return encode


def _is_gpt2(rules: dict[str, Any]) -> bool:
    """Whether a tokenizer.json is GPT-2's in all but vocabulary and merges."""
    model, split = rules["model"], rules["pre_tokenizer"] or {}
    plain = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
    return (
        (model["type"], rules["normalizer"]) == ("BPE", None)
        and {name: split.get(name) for name in plain} == plain
        and not any(model[name] for name in odd)
        and all(token["special"] for token in rules["added_tokens"])
    )


def _parts(text: str) -> list[str]:
    """The text, cut before the last character of every long run of blanks that does not end it: GPT-2's rule splits it
    there, and takes what is left by the branch that does not backtrack."""
    half = LONG_RUN // 2  # a long run fills one of these windows
    if len(text) < LONG_RUN or not any(text[at : at + half].isspace() for at in range(0, len(text), half)):
        return [text]
    cuts = [run.end() - 1 for run in RUN.finditer(text) if run.end() < len(text)]
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
