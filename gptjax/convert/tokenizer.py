"""Tokenizer files as `transformers` wants them beside a model, and the way back."""

import json
from pathlib import Path

from gptjax.data.tokenizers import BYTE_LEVEL_FILES, Tokenizer, byte_names, byte_pairs

SENTENCEPIECE = "tokenizer.model"


def tokenizer_spec(folder: Path) -> str:
    """The `data.tokenizer` that reads a directory's own files; loading it names what is missing."""
    names = {name for names in BYTE_LEVEL_FILES for name in names}
    if (folder / SENTENCEPIECE).is_file() and not any((folder / name).is_file() for name in names):
        return str(folder / SENTENCEPIECE)
    return f"gpt2:{folder}"


def write_tokenizer(tokenizer: Tokenizer, folder: Path, vocab_size: int, seq_len: int) -> str:
    """Write what `transformers.AutoTokenizer` reads: the same ids for any text that spells no reserved name.

    Reserved ids beyond `vocab_size` are left out, for the exported model has no rows for them. Returns what a user
    has to know, "" if nothing.
    """
    special = {name: i for name, i in tokenizer.special.items() if i < vocab_size}
    first, *rest = special
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "model_max_length": seq_len,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), first),
        "additional_special_tokens": rest,
        "clean_up_tokenization_spaces": False,
    }
    note = ""
    if SENTENCEPIECE in tokenizer.files:
        tokenizer.save(folder)
        settings |= {"tokenizer_class": "TokenizersBackend", "unk_token": "<unk>"}
        note = f"transformers reads {SENTENCEPIECE} from version 5 on; text with U+2581 gets other ids there"
    else:
        vocab, merges = byte_pairs(tokenizer.files) if tokenizer.files else (bytes_vocab(), [])
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
        (folder / "vocab.json").write_text(json.dumps(vocab | special, ensure_ascii=False), encoding="utf-8")
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    return note


def bytes_vocab() -> dict[str, int]:
    """The `bytes` tokenizer as byte-level BPE without merges: each byte's visible name and its id, the byte."""
    return {name: byte for byte, name in enumerate(byte_names())}
