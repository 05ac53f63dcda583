"""The forms of `data.tokenizer`."""

import re
from pathlib import Path

from gptjax.data.tokenizers.huggingface import FILES, load_directory, rules_of
from gptjax.data.tokenizers.sentencepiece import FILE, load_model
from gptjax.data.tokenizers.tokenizer import TEMPLATE, Tokenizer, bytes_tokenizer
from gptjax.errors import UserError

FORMS = "use bytes, a folder with a Hugging Face tokenizer (tokenizer.json, or vocab.json and merges.txt), or a .model"


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer named by `data.tokenizer`: bytes, DIR or gpt2:DIR (a Hugging Face directory, GPT-2's own files, or
    a folder with tokenizer.model alone), or a SentencePiece .model file; and bytes:DIR, bytes with the chat template of
    a folder. Before any of them fim: reserves the tokens to fill in the middle of a text, marks: those of an encoder,
    sentinels:N: and modes: those of text to restore.

    Raises UserError where files are missing or are not what they should be, and for a .model that loses characters.
    """
    if spec.startswith("fim:"):
        return load_tokenizer(spec.removeprefix("fim:")).with_infill()
    if spec.startswith("marks:"):
        return load_tokenizer(spec.removeprefix("marks:")).with_marks()
    if spec.startswith("modes:"):
        return load_tokenizer(spec.removeprefix("modes:")).with_modes()
    if found := re.match(r"sentinels:(\d+):", spec):
        return load_tokenizer(spec[found.end() :]).with_sentinels(int(found[1]))
    if spec == "bytes":
        return bytes_tokenizer()
    if spec.startswith("bytes:"):
        return _with_template(spec, bytes_tokenizer(), Path(spec.removeprefix("bytes:")).expanduser())
    if spec.startswith("sentencepiece:"):
        raise UserError(f"data.tokenizer = {spec}: is made of a text; name a config that has one, or a run folder")
    path = Path(spec.removeprefix("gpt2:")).expanduser()
    if spec.startswith("gpt2:") or path.is_dir():
        return _load_folder(spec, path)
    return load_model(spec, _read(spec, path))


def _load_folder(spec: str, folder: Path) -> Tokenizer:
    if not folder.is_dir():
        why = "Not a directory" if folder.exists() else "No such file or directory"
        raise UserError(f"data.tokenizer = {spec}: {folder}: {why}; {FORMS}")
    present = {name for name in FILES if (folder / name).is_file()}
    if rules_of(present):
        return load_directory(spec, {name: _read(spec, folder / name) for name in FILES if name in present}, folder)
    if (folder / FILE).is_file():
        tokenizer = load_model(spec, _read(spec, folder / FILE))
        return _with_template(spec, tokenizer, folder) if TEMPLATE in present else tokenizer
    raise UserError(f"data.tokenizer = {spec}: a directory without a tokenizer; {FORMS}")


def _with_template(spec: str, tokenizer: Tokenizer, folder: Path) -> Tokenizer:
    try:
        return tokenizer.with_template(_read(spec, folder / TEMPLATE).decode())
    except UnicodeDecodeError:
        raise UserError(f"data.tokenizer = {spec}: {folder / TEMPLATE}: not UTF-8; put it back from a copy") from None


def _read(spec: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"data.tokenizer = {spec}: {path}: {error.strerror}; {FORMS}") from None
