"""The tokenizer of a config: one that is there, or a vocabulary of N pieces that is made of the text that a run is to
learn (`data.tokenizer` = sentencepiece:N) and kept beside it in the cache."""

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from gptjax.config import DataConfig
from gptjax.data.order import shuffled
from gptjax.data.sources import Corpus, TextSource
from gptjax.data.tokenizers import Tokenizer, load_tokenizer, train_sentencepiece
from gptjax.errors import UserError

MOST_CHARS = 1 << 26  # of text to learn from: the trainer holds all of it, and more of it changes little


def model_file(config: DataConfig, corpus: Corpus) -> Path:
    """Where the model of a made tokenizer is kept, or will be."""
    what = [corpus.digest, config.train_split, config.split_by, str(config.made_pieces)]
    key = hashlib.sha256("\n".join(what).encode()).hexdigest()[:16]
    return Path(config.cache_dir).expanduser() / "tokenizers" / f"{key}.model"


def make(config: DataConfig, corpus: Corpus) -> Path:
    """The model of a made tokenizer, trained now unless it is there.

    Raises UserError for more pieces than the text can fill.
    """
    path = model_file(config, corpus)
    with suppress(UserError):  # not there, or damaged
        load_tokenizer(str(path))
        return path
    try:
        train_sentencepiece(_texts(corpus.split(config.train_split, config.split_by)), config.made_pieces, path)
    except UserError as error:
        raise UserError(f"data.tokenizer = {config.tokenizer}: {error}") from None
    except OSError as error:
        raise UserError(f"data.cache_dir = {config.cache_dir}: cannot write {path} ({error.strerror})") from None
    return path


def open_tokenizer(config: DataConfig, corpus: Corpus) -> Tokenizer:
    """What `data.tokenizer` names, made now if need be."""
    return load_tokenizer(str(make(config, corpus)) if config.made_pieces else config.tokenizer)


def _texts(source: TextSource) -> Iterator[str]:
    """Records of all parts of a text, up to MOST_CHARS."""
    number_of, left = shuffled(len(source), 0), MOST_CHARS
    for place in range(len(source)):
        text = source[number_of(place)].text[:left]
        yield text
        left -= len(text)
        if not left:
            return
