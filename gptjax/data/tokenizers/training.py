"""Training a SentencePiece model that gives every text back."""

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from gptjax.data.tokenizers.tokenizer import SPECIALS
from gptjax.errors import UserError
from gptjax.files import write_whole

TRAINING_CHUNK = 4000  # characters; SentencePiece's BPE trainer counts symbols of a sentence in 16 bits


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
            required_chars="▁",  # a text without spaces, or with few, would make a model that cannot write one
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
