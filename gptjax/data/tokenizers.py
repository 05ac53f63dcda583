"""Text to token ids and back, exactly: bytes, GPT-2's byte pairs, or a SentencePiece model.

All three are one `Tokenizer`: a table of the bytes behind every id, five reserved ids, and an
encoder. Decoding joins the table, so `decode(encode(text)) == text` for any text, whatever the library.
"""

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.errors import UserError
from gptjax.files import write_whole

SPECIALS = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
"""Reserved tokens: end of text, the three chat roles, end of turn."""

BYTE_LEVEL_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"), ("tokenizer.json",))
"""Names under which byte-level BPE is found: Hugging Face's two, GPT-2's own, and Hugging Face's one."""

TRAINING_CHUNK = 4000  # characters; SentencePiece's BPE trainer counts symbols of a sentence in 16 bits


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """Ids 0..vocab_size-1; load one with `load_tokenizer`."""

    pieces: list[bytes]
    """The UTF-8 bytes of each id; a reserved id has its name, an id that no text yields has none."""
    special: dict[str, int]
    """The id of each of SPECIALS."""
    encode: Callable[[str], list[int]]
    """Text to ids, never a reserved one, even where the text spells its name. Raises
    UnicodeEncodeError for lone surrogates, which have no UTF-8 form."""
    spec: str
    """What loads this tokenizer again, with {} for the folder of its files."""
    files: dict[str, bytes]
    """The files that `save` writes."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, the reserved ones included."""
        return len(self.pieces)

    @property
    def eot(self) -> int:
        """The id that ends a document."""
        return self.special["<|endoftext|>"]

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text; reserved ids show their names, bytes that are not UTF-8 show as U+FFFD.

        Raises IndexError for an id outside the vocabulary.
        """
        ids = list(ids)
        if any(i < 0 for i in ids):
            raise IndexError(f"token id {min(ids)} is negative")
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", "replace")

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes behind each id, int32 [vocab_size]; 0 for reserved ids. For bits per byte."""
        lengths = np.array([len(piece) for piece in self.pieces], np.int32)
        lengths[list(self.special.values())] = 0
        return lengths

    def save(self, folder: Path) -> str:
        """Write the tokenizer's files into `folder`; return the spec that loads it from there."""
        for name, data in self.files.items():
            write_whole(folder / name, data)
        return self.spec.format(folder)


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer named by `data.tokenizer`: bytes, gpt2:DIR (byte-level BPE), or a SentencePiece .model file.

    Raises UserError where files are missing or are not what they should be.
    """
    if spec == "bytes":
        pieces, special = _reserve([bytes([b]) for b in range(256)], {})
        return Tokenizer(pieces, special, lambda text: list(text.encode()), "bytes", {})
    if spec.startswith("gpt2:"):
        return _load_gpt2(spec)
    return _load_sentencepiece(spec)


def _reserve(pieces: list[bytes], special: dict[str, int]) -> tuple[list[bytes], dict[str, int]]:
    """Give each of SPECIALS that has no id yet the next one after the vocabulary."""
    special = dict(special)
    pieces = list(pieces)
    for name in SPECIALS:
        if name in special:
            pieces[special[name]] = name.encode()
        else:
            special[name] = len(pieces)
            pieces.append(name.encode())
    return pieces, special


def byte_names() -> list[str]:
    """The visible character that byte-level BPE files write for each byte: itself, or the next one from U+0100 on."""
    visible = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    hidden = [b for b in range(256) if b not in visible]
    names = {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}
    return [names[b] for b in range(256)]


def byte_pairs(files: dict[str, bytes]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Ids by token and merges in order, of one of BYTE_LEVEL_FILES.

    Raises ValueError, KeyError, TypeError or AttributeError where that is not what the files hold.
    """
    if "tokenizer.json" in files:
        return _fast_byte_pairs(json.loads(files["tokenizer.json"]))
    vocab, merges = files.values()
    lines = [line for line in merges.decode().split("\n") if line and not line.startswith("#version")]
    return json.loads(vocab), [(left, right) for left, right in (line.split(" ") for line in lines)]


def _fast_byte_pairs(values: dict[str, Any]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """`byte_pairs` of a tokenizer.json, the one file that transformers 5 saves."""
    model, split = values["model"], values["pre_tokenizer"]
    plain = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    if model["type"] != "BPE" or values.get("normalizer") or {name: split.get(name, True) for name in plain} != plain:
        raise ValueError("not GPT-2's kind: byte-level pairs, no normalizer, no space put first")
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    added = {token["content"]: token["id"] for token in values.get("added_tokens", [])}
    return model["vocab"] | added, [(left, right) for left, right in merges]


def _load_gpt2(spec: str) -> Tokenizer:
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    folder = Path(spec.removeprefix("gpt2:")).expanduser()
    found = [names for names in BYTE_LEVEL_FILES if all((folder / name).is_file() for name in names)]
    files = {name: _read(spec, folder / name) for name in (found or BYTE_LEVEL_FILES)[0]}
    names = byte_names()
    to_byte = {name: byte for byte, name in enumerate(names)}
    try:
        vocab, merges = byte_pairs(files)
        if sorted(vocab.values()) != list(range(len(vocab))):
            raise ValueError("the ids have gaps")
        merged = [vocab[left + right] for left, right in merges]
        # tiktoken merges in the order of ids, so the ids must be the order of the merges.
        if merged != sorted(set(merged)):
            raise ValueError("the order of the ids is not that of the merges")
        tokens = [*names, *(left + right for left, right in merges)]
        ranks = {bytes(to_byte[c] for c in token): vocab[token] for token in tokens}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"data.tokenizer = {spec}: not GPT-2's {' and '.join(files)}: {error}") from None
    pieces = [b""] * len(vocab)
    for piece, i in ranks.items():
        pieces[i] = piece
    made = set(tokens)  # text can yield these, so they are not reserved whatever they spell
    pieces, special = _reserve(pieces, {name: vocab[name] for name in SPECIALS if name in vocab and name not in made})
    encoding = tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)

    def encode(text: str) -> list[int]:
        text.encode()  # tiktoken would replace lone surrogates in silence
        return encoding.encode_ordinary(text)

    return Tokenizer(pieces, special, encode, "gpt2:{}", files)


def _load_sentencepiece(spec: str) -> Tokenizer:
    import sentencepiece

    data = _read(spec, Path(spec).expanduser())
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=data)
    except RuntimeError:
        raise UserError(
            f"data.tokenizer = {spec}: not a SentencePiece model; use bytes, gpt2:DIR or a .model"
        ) from None

    def piece(i: int) -> bytes:
        if model.is_control(i) or model.is_unknown(i):
            return b""
        text: str = model.id_to_piece(i)
        return bytes([int(text[1:-1], 16)]) if model.is_byte(i) else text.replace("▁", " ").encode()

    size = model.get_piece_size()
    pieces, special = _reserve(
        [piece(i) for i in range(size)],
        {name: model.piece_to_id(name) for name in SPECIALS if model.is_control(model.piece_to_id(name))},
    )
    bar = [model.piece_to_id(f"<0x{byte:02X}>") for byte in "▁".encode()]

    def encode(text: str) -> list[int]:
        text.encode()
        # SentencePiece writes a space as U+2581, so a U+2581 of the text must go in as bytes.
        first, *rest = text.split("▁")
        ids: list[int] = model.encode(first)
        for part in rest:
            ids += bar
            ids += model.encode(part)
        return ids

    tokenizer = Tokenizer(pieces, special, encode, "{}/tokenizer.model", {"tokenizer.model": data})
    probe = "  a\tb\r\n\n ▁é\0\U0001f600½ﬁ " + "".join(SPECIALS)
    ids = encode(probe)
    if tokenizer.decode(ids) != probe or not special.keys().isdisjoint(map(model.id_to_piece, ids)):
        raise UserError(
            f"data.tokenizer = {spec}: loses characters (no byte fallback, or it normalises text); "
            "train one with `gptjax tokenizer train`"
        )
    return tokenizer


def train_sentencepiece(texts: Iterable[str], vocab_size: int, model_path: Path) -> None:
    """Train a lossless SentencePiece BPE model of exactly `vocab_size` ids, reserved ones and 256 bytes included.

    The trainer holds all the texts in memory. Raises UserError for an empty corpus, or a `vocab_size`
    that the corpus cannot fill or that is smaller than its alphabet; both name the bound.
    """
    import sentencepiece

    failures: list[Exception] = []  # the trainer would turn an error of `texts` into its own

    def chunks() -> Iterator[str]:
        try:
            for text in texts:
                for part in re.split("[▁▅]", text):  # both mean something else to the trainer
                    yield from (part[i : i + TRAINING_CHUNK] for i in range(0, len(part), TRAINING_CHUNK))
        except Exception as error:
            failures.append(error)
            raise

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=chunks(),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            control_symbols=list(SPECIALS),
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            max_sentence_length=4 * TRAINING_CHUNK,  # bytes; a longer one would be dropped in silence
            minloglevel=3,
        )
    except RuntimeError as error:
        if failures:
            raise failures[0] from None
        if found := re.search(r"value <= (\d+)", str(error)):
            raise UserError(f"vocab_size = {vocab_size}: the corpus fills at most {found[1]} ids") from None
        if found := re.search(r"required_chars\. \d+ vs (\d+)", str(error)):
            raise UserError(f"vocab_size = {vocab_size}: bytes and alphabet need at least {found[1]} ids") from None
        if "sentences_.empty()" in str(error):
            raise UserError("the corpus to train a tokenizer on is empty; give it some text") from None
        raise
    write_whole(model_path, model.getvalue())


def _read(spec: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        remedy = "use bytes, gpt2:DIR with vocab.json and merges.txt, or a SentencePiece .model file"
        raise UserError(f"data.tokenizer = {spec}: {path}: {error.strerror}; {remedy}") from None
