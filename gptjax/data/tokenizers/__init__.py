"""Text to token ids and back: bytes, the tokenizer of a Hugging Face directory, or a SentencePiece model.

All are one `Tokenizer`: an encoder, a table of the bytes behind every id, and what no text yields. `load_tokenizer`
reads one, `train_sentencepiece` makes one.
"""

from gptjax.data.tokenizers.load import load_tokenizer
from gptjax.data.tokenizers.sentencepiece import load_model
from gptjax.data.tokenizers.tokenizer import SPECIALS, Tokenizer
from gptjax.data.tokenizers.training import train_sentencepiece

__all__ = ["SPECIALS", "Tokenizer", "load_model", "load_tokenizer", "train_sentencepiece"]
