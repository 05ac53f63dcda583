"""Tokens to text as they come: never half a character, nothing that may still become a stop string."""

import codecs
from collections.abc import Sequence
from itertools import takewhile

import numpy as np

from gptjax.data.tokenizers import Tokenizer


class TextStream:
    """The text of one reply. What was given out is never taken back."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] | np.ndarray = (), stop: Sequence[str] = ()) -> None:
        self.text = ""
        """All that was given out."""
        self.stopped = False
        """Whether a stop string ended it."""
        self._stop = [word for word in stop if word]
        self._held = ""
        self._bytes = None if tokenizer.join else _Bytes(tokenizer, prompt)
        self._joined = _Joined(tokenizer, prompt) if tokenizer.join else None

    def add(self, token: int) -> str:
        """What may be shown after one more token."""
        source = self._bytes or self._joined
        assert source
        return self._give(source.add(int(token)))

    def end(self) -> str:
        """What is left when no token follows."""
        source = self._bytes or self._joined
        assert source
        return self._give(source.end(), last=True)

    def _give(self, more: str, last: bool = False) -> str:
        if self.stopped:
            return ""
        text = self._held + more
        found = min((at for word in self._stop if (at := text.find(word)) >= 0), default=-1)
        if found >= 0:
            self.stopped, self._held, shown = True, "", text[:found]
        else:
            keep = 0 if last else max((_overlap(text, word) for word in self._stop), default=0)
            shown, self._held = text[: len(text) - keep], text[len(text) - keep :]
        self.text += shown
        return shown


def _overlap(text: str, word: str) -> int:
    """Characters at the end of the text that a stop string may begin with."""
    return next((n for n in range(min(len(word) - 1, len(text)), 0, -1) if text.endswith(word[:n])), 0)


class _Bytes:
    """Pieces that are bytes of UTF-8."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] | np.ndarray) -> None:
        self._pieces = tokenizer.pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        # A prompt of ids may end inside a character, which the reply then completes.
        self._decoder.decode(b"".join(self._pieces[int(i)] for i in prompt[-4:])[-3:])
        self._cut = self._decoder.getstate()[0] != b""

    def add(self, token: int) -> str:
        return self._own(self._decoder.decode(self._pieces[token]))

    def end(self) -> str:
        """Of what is left nothing, where it is a part of a character. The first two bytes of a surrogate are none, for
        which the decoder nevertheless waits."""
        left = self._decoder.getstate()[0]
        try:
            left.decode()
        except UnicodeDecodeError as error:
            if error.reason != "unexpected end of data":
                return self._own(left.decode(errors="replace"))
        return ""

    def _own(self, text: str) -> str:
        """Less what stands for a character that the prompt began."""
        if self._cut and text:
            self._cut = False
            return text.removeprefix("\ufffd")  # the reply did not complete it, and it is the prompt's
        return text


class _Joined:
    """Ids that only their library turns into text: the text of a few tokens more, less that of those before."""

    BEFORE = 8  # tokens that the text of one may depend on

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] | np.ndarray) -> None:
        self._decode = tokenizer.decode
        self._ids = [int(i) for i in prompt[-self.BEFORE :]]
        self._shown = self._decode(self._ids, inside=True)

    def add(self, token: int) -> str:
        self._ids.append(token)
        text = self._decode(self._ids, inside=True)
        if text.endswith("\ufffd"):  # perhaps the beginning of a character
            return ""
        more = self._after(text)
        self._ids = self._ids[-self.BEFORE :]
        self._shown = self._decode(self._ids, inside=True)
        return more

    def end(self) -> str:
        return self._after(self._decode(self._ids, inside=True).rstrip("\ufffd"))

    def _after(self, text: str) -> str:
        """What a text has beyond the one before; the two part earlier where a character of that is whole only now."""
        same = takewhile(lambda pair: pair[0] == pair[1], zip(self._shown, text, strict=False))
        return text[len([*same]) :]
