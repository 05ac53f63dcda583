"""Tokenizer files as `transformers` wants them beside a model, and the way back."""

import json
from pathlib import Path
from typing import Any

from gptjax.data.chat import is_chat
from gptjax.data.tokenizers import SPECIALS, Tokenizer
from gptjax.data.tokenizers.byte_level import PAIRS, byte_names, byte_pairs
from gptjax.data.tokenizers.huggingface import CONFIG, RULES, rules_of
from gptjax.data.tokenizers.sentencepiece import FILE as SENTENCEPIECE
from gptjax.data.tokenizers.tokenizer import INFILL, TEMPLATE
from gptjax.errors import UserError

NAMED = (*SPECIALS, *INFILL)  # what an exported directory can have beside its own tokens


def tokenizer_spec(folder: Path) -> str:
    """The `data.tokenizer` that reads a directory's own files; loading it names what is missing."""
    return f"gpt2:{folder}" if str(folder) == "bytes" else str(folder)


def write_tokenizer(tokenizer: Tokenizer, folder: Path, vocab_size: int, seq_len: int) -> str:
    """Write what `transformers.AutoTokenizer` reads: the same ids for any text that spells no reserved name. What was a
    Hugging Face directory is one again, file by file; our chat tokens, where the model has room, are named to it. Of a
    tokenizer that carries our chat template `apply_chat_template` gives the ids and the mask of `ChatFormat`.

    Raises UserError for marks, sentinels or modes that were reserved beside a directory's own tokens.
    Reserved ids beyond `vocab_size` are left out, for the exported model has no rows for them. Returns what a user
    has to know, "" if nothing.
    """
    special = {name: i for name, i in tokenizer.special.items() if i < vocab_size}
    if RULES in tokenizer.files or set(PAIRS[0]) <= tokenizer.files.keys():
        if other := [name for name, i in special.items() if i >= tokenizer.own_size and name not in NAMED]:
            raise UserError(f"data.tokenizer: {other[0]} is no token of the directory; its export is not supported")
        tokenizer.save(folder)
        _name_chat_tokens(tokenizer, special, folder / CONFIG)
        return ""
    eot = next(name for name, i in special.items() if i == tokenizer.eot)
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "model_max_length": seq_len,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), eot),
        "additional_special_tokens": [name for name in special if name != eot],
        "clean_up_tokenization_spaces": False,
    }
    names = {i: name for name, i in special.items()}
    settings |= {f"{role}_token": names[i] for role, i in tokenizer.roles.items() if i in names}
    note = ""
    if SENTENCEPIECE in tokenizer.files:
        tokenizer.save(folder)
        settings |= {"tokenizer_class": "TokenizersBackend", "unk_token": "<unk>"}
        note = f"transformers reads {SENTENCEPIECE} from version 5 on; text with U+2581 gets other ids there"
    else:
        vocab, merges = byte_pairs(tokenizer.files) if rules_of(set(tokenizer.files)) else (bytes_vocab(), [])
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
        (folder / "vocab.json").write_text(json.dumps(vocab | special, ensure_ascii=False), encoding="utf-8")
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        if TEMPLATE in tokenizer.files:
            (folder / TEMPLATE).write_bytes(tokenizer.files[TEMPLATE])
    (folder / CONFIG).write_text(json.dumps(settings, indent=2))
    return note


def _name_chat_tokens(tokenizer: Tokenizer, special: dict[str, int], file: Path) -> None:
    """Add to a directory's config the tokens that we reserved after its last id: there they get the same ids. Where
    they are to be used, those that it has itself are named too: its vocabulary may have one that no file calls special.
    """
    first = 0 if is_chat(tokenizer) else tokenizer.own_size
    ours = [name for name in NAMED if special.get(name, -1) >= first]
    if not ours:
        return
    made_by = "PreTrainedTokenizerFast" if RULES in tokenizer.files else "GPT2Tokenizer"
    settings: dict[str, Any] = json.loads(file.read_bytes()) if file.is_file() else {"tokenizer_class": made_by}
    if special.get(SPECIALS[0]) == tokenizer.eot and SPECIALS[0] in ours:
        settings["eos_token"] = ours.pop(0)
    key = "extra_special_tokens" if settings.get("extra_special_tokens") else "additional_special_tokens"
    if isinstance(settings.get(key), dict):
        settings[key] |= {f"{name.strip('<|>')}_token": name for name in ours}
    else:
        named = settings.get(key) or []
        settings[key] = [*named, *(name for name in ours if name not in named)]
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")


def bytes_vocab() -> dict[str, int]:
    """The `bytes` tokenizer as byte-level BPE without merges: each byte's visible name and its id, the byte."""
    return {name: byte for byte, name in enumerate(byte_names())}
