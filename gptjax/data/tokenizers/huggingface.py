"""The tokenizer of a Hugging Face directory, by the library that made it.

tokenizer.json holds the rules; where there is none, vocabulary and merges are GPT-2's kind. tokenizer_config.json and
the files before it may name tokens that the rules do not know. What `transformers` reads in them is read here.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.data.tokenizers.byte_level import PAIRS, byte_pairs, fast_encoder
from gptjax.data.tokenizers.changes import changes
from gptjax.data.tokenizers.spelling import guarded, letters
from gptjax.data.tokenizers.table import table
from gptjax.data.tokenizers.tokenizer import SPECIALS, TEMPLATE, Tokenizer, reserve
from gptjax.errors import UserError

RULES, CONFIG, MAP, ADDED = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
MODEL_CONFIG = "config.json"
FILES = (RULES, *PAIRS[0], *PAIRS[1], CONFIG, MAP, ADDED, TEMPLATE)
NAMED = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
GPT2_CLASSES = (None, "GPT2Tokenizer", "GPT2TokenizerFast")
FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
EOT = SPECIALS[0]


def rules_of(names: set[str]) -> tuple[str, ...]:
    """Which of the files present hold ids and splits, () if none does."""
    return next((rules for rules in ((RULES,), *PAIRS) if names >= set(rules)), ())


def load_directory(spec: str, files: dict[str, bytes], folder: Path) -> Tokenizer:
    """The tokenizer in `files`; `folder` is where they were, and may hold the model's config.

    Text that spells a special token never yields it; added tokens that are not special are vocabulary, and it does.
    Raises UserError for files that are not what they should be.
    """
    where = f"data.tokenizer = {spec}"
    config = _config(where, files)
    library = _library(where, config, files)
    _add_tokens(where, library, config, _json(where, files, ADDED))
    eot = _text(config.get("eos_token"))
    if not config["has_end"] and (end := _end_of_model(where, folder, library)) and end != eot:
        eot, files = end, files | {CONFIG: json.dumps(_json(where, files, CONFIG) | {"eos_token": end}).encode()}
        library.add_special_tokens([end])
    library.encode_special_tokens = True
    rules = json.loads(library.to_str())
    unknown = _unknown(rules["model"], library)
    pieces, blank_first, join = table(library, rules, unknown)
    own_size = len(pieces)
    ours = SPECIALS if eot is None else SPECIALS[1:]
    pieces, special = reserve(pieces, _reserved(library, unknown, eot), ours)

    def clean(encode: Callable[[str], np.ndarray]) -> Callable[[str], np.ndarray]:
        return guarded(encode, special, len(pieces), lambda name: letters(name, library, rules, unknown))

    between, types = _pair(library)
    fast, inner = fast_encoder(rules, library.model.tokenize), _inner(rules)
    tokenizer = Tokenizer(
        pieces,
        special,
        special[eot or EOT],
        clean(fast or _encoder(library)),
        "{}",
        files,
        own_size,
        begin=_begin(library, config, files),
        blank_first=blank_first,
        join=join,
        inner=inner and clean(_encoder(inner)),
        roles=_roles(config, special),
        between=between,
        types=types,
    )
    return replace(tokenizer, changes="; ".join(changes(tokenizer, rules)))


def _encoder(library: Any) -> Callable[[str], np.ndarray]:
    def encode(text: str) -> np.ndarray:
        text.encode()  # the library would call a lone surrogate an error of type
        # As `encode`, without the places of tokens in the text: less than half the time.
        return np.array(library.encode_batch_fast([text], add_special_tokens=False)[0].ids, np.int32)

    return encode


def _inner(rules: dict[str, Any]) -> Any:
    """The library for what stands after a reserved token, None where it is the same: the blank of the scheme "first"
    comes before a whole text alone."""
    from tokenizers import Tokenizer as Library

    def never(node: dict[str, Any]) -> dict[str, Any]:
        return node | {"prepend_scheme": "never"} if node.get("prepend_scheme") == "first" else node

    split = json.loads(json.dumps(rules["pre_tokenizer"]), object_hook=never)
    if split == rules["pre_tokenizer"]:
        return None
    library = Library.from_str(json.dumps(rules | {"pre_tokenizer": split}))
    library.encode_special_tokens = True
    return library


def _reserved(library: Any, unknown: int | None, eot: str | None) -> dict[str, int]:
    """Its own reserved tokens: the special ones, those with the name of a chat token, and entries of the vocabulary
    with one of our names that no text yields."""
    added = library.get_added_tokens_decoder().items()
    ends = {eot, *SPECIALS[1:]}
    found = {one.content: i for i, one in added if (one.special and i != unknown) or one.content in ends}
    for name in SPECIALS:
        i = library.token_to_id(name)
        if name not in found and i is not None and i not in library.encode(name, add_special_tokens=False).ids:
            found[name] = i
    return found


def _json(where: str, files: dict[str, bytes], name: str) -> dict[str, Any]:
    try:
        values = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise UserError(f"{where}: {name}: not whole JSON ({error}); fetch it again") from None
    if not isinstance(values, dict):
        raise UserError(f"{where}: {name}: not a JSON object; fetch it again")
    return values


def _config(where: str, files: dict[str, bytes]) -> dict[str, Any]:
    """tokenizer_config.json, with what `transformers` adds to it: the older files, where it has no table of added
    tokens, and the end of text of GPT-2's class. `has_end` says whether a file names an end."""
    config = _json(where, files, CONFIG)
    if "added_tokens_decoder" not in config:
        config |= _json(where, files, MAP)
    config["has_end"] = bool(_text(config.get("eos_token")))
    if config.get("tokenizer_class") in (GPT2_CLASSES if RULES not in files else GPT2_CLASSES[1:]):
        config = dict.fromkeys(("bos_token", "eos_token", "unk_token"), EOT) | config
    return config


def _text(token: Any) -> str | None:
    """The text of a token as the files write it: a string, or an object with flags."""
    return (token.get("content") if isinstance(token, dict) else token) or None


def _extra(config: dict[str, Any]) -> list[Any]:
    """The special tokens without a role. A table of them has roles of its own."""
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    return [*extra.values()] if isinstance(extra, dict) else extra


def _library(where: str, config: dict[str, Any], files: dict[str, bytes]) -> Any:
    """A `tokenizers.Tokenizer` that neither cuts nor pads."""
    from tokenizers import Tokenizer as Library
    from tokenizers.pre_tokenizers import ByteLevel

    if RULES in files:
        try:
            library = Library.from_str(files[RULES].decode())
        except Exception as error:  # the library raises no narrower one
            raise UserError(f"{where}: {RULES}: not what the tokenizers library reads ({error})") from None
    else:
        library = _from_pairs(where, config, files)
    library.no_truncation()
    library.no_padding()
    if config.get("tokenizer_class") in GPT2_CLASSES[1:] and isinstance(library.pre_tokenizer, ByteLevel):
        library.pre_tokenizer.add_prefix_space = bool(config.get("add_prefix_space"))  # as this class does
    return library


def _from_pairs(where: str, config: dict[str, Any], files: dict[str, bytes]) -> Any:
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers

    if config.get("tokenizer_class") not in GPT2_CLASSES:
        raise UserError(
            f"{where}: tokenizer_class = {config['tokenizer_class']!r}: only GPT-2's is known by vocabulary and merges "
            f"alone; save its {RULES} with transformers"
        )
    try:
        vocab, merges = byte_pairs(files)
        library = Library(models.BPE(vocab=vocab, merges=merges))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: not GPT-2's {' and '.join(rules_of(set(files)))}: {error}") from None
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space")))
    library.decoder = decoders.ByteLevel()
    return library


def _add_tokens(where: str, library: Any, config: dict[str, Any], older: dict[str, Any]) -> None:
    """Add the tokens that the config names and the rules do not know, in the order of `transformers`; `older` is the
    table that stands where the config has none."""
    from tokenizers import AddedToken

    def token(value: Any, special: bool) -> Any:
        if isinstance(value, dict):
            flags = {flag: value[flag] for flag in FLAGS if flag in value}
            return AddedToken(value["content"], **(flags | {"special": special or bool(value.get("special"))}))
        return AddedToken(value, special=special)

    try:
        table = {int(i): token(value, False) for i, value in config.get("added_tokens_decoder", {}).items()}
        roles = [name for name, value in config.items() if name.endswith("_token") and isinstance(value, str)]
        named = [token(config[name], True) for name in dict.fromkeys([*NAMED, *roles]) if config.get(name)]
        named += [token(value, True) for value in _extra(config)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: {CONFIG}: not the form of added tokens ({error!r}); fetch it again") from None
    if "added_tokens_decoder" not in config:
        names, there = {one.content for one in named}, library.get_added_tokens_decoder()
        table = {i: token(name, name in names) for name, i in older.items() if i not in there}
    known = set(map(repr, library.get_added_tokens_decoder().values()))
    library.add_tokens([table[i] for i in sorted(table) if repr(table[i]) not in known])
    for i, one in table.items():
        if (found := library.token_to_id(one.content)) != i:
            raise UserError(f"{where}: {CONFIG} gives {one.content!r} the id {i}, the rules {found}; they do not agree")
    known = {one.content for one in library.get_added_tokens_decoder().values()}
    library.add_tokens([one for one in named if one.content not in known])


def _end_of_model(where: str, folder: Path, library: Any) -> str | None:
    """The token that the model's own config ends a text with."""
    file = folder / MODEL_CONFIG
    values = _json(where, {MODEL_CONFIG: file.read_bytes()} if file.is_file() else {}, MODEL_CONFIG)
    ends = values.get("eos_token_id")
    end = ends[0] if isinstance(ends, list) and ends else ends
    return library.id_to_token(end) if isinstance(end, int) and end >= 0 else None


def _unknown(model: dict[str, Any], library: Any) -> int | None:
    """The id of text that the vocabulary lacks."""
    name = model.get("unk_token")
    return model.get("unk_id") if name is None else library.token_to_id(name)


def _begin(library: Any, config: dict[str, Any], files: dict[str, bytes]) -> tuple[int, ...]:
    """What the template puts before a text."""
    if RULES not in files:
        bos = library.token_to_id(_text(config.get("bos_token")) or "")
        return (bos,) if config.get("add_bos_token") and bos is not None else ()
    made = library.encode("a")
    count = next((at for at, put in enumerate(made.special_tokens_mask) if not put), 0)
    return tuple(made.ids[:count])


def _roles(config: dict[str, Any], special: dict[str, int]) -> dict[str, int]:
    """The ids of an encoder's marks: as the files name them, else by the names that BERT, and RoBERTa and BART have."""
    plain = {"cls": ("[CLS]", "<s>"), "sep": ("[SEP]", "</s>"), "mask": ("[MASK]", "<mask>"), "pad": ("[PAD]", "<pad>")}
    found = {}
    for role, names in plain.items():
        name = next((name for name in (_text(config.get(f"{role}_token")), *names) if name in special), None)
        if name is not None:
            found[role] = special[name]
    return found


def _pair(library: Any) -> tuple[tuple[int, ...], bool]:
    """What the template puts between two texts, and whether it tells their tokens apart."""
    made = library.encode("a", "a")
    texts = made.sequence_ids
    if 0 not in texts or 1 not in texts:
        return (), False
    first, second = len(texts) - texts[::-1].index(0), texts.index(1)
    return tuple(made.ids[first:second]), any(made.type_ids)
