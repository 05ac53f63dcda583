"""An encoder-decoder: what it writes of texts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from gptjax.api.writes import Writes
from gptjax.config import WritingConfig
from gptjax.errors import UserError
from gptjax.infer.request import Request
from gptjax.stages.encoder_decoder import ReadsAndWrites

ROWS = 16  # texts that are written at once


@dataclass(frozen=True)
class Translator(Writes):
    """An encoder-decoder that writes one text of another; make one with `load`."""

    stage: ReadsAndWrites[Any]
    kind, use = "an encoder-decoder", "gptjax sample takes it"

    def prompt(self, text: str, suffix: str | None = None) -> list[int]:
        """The ids that its encoder reads of a text."""
        if suffix is not None:
            raise UserError("suffix: an encoder-decoder writes no middle; leave it out")
        found: list[int] = self.stage.read(text).tolist()
        return found

    def _asked(self, ids: list[int], how: dict[str, Any]) -> Request:
        return Request([self.stage.start], source=ids, **how)

    def how(self, beams: int = 0, length_penalty: float | None = None) -> WritingConfig:
        """How it writes if these are asked."""
        own = self.stage.how
        penalty = own.length_penalty if length_penalty is None else length_penalty
        return replace(own, beams=beams or own.beams, length_penalty=penalty)

    def write(
        self,
        texts: Sequence[str],
        *,
        beams: int = 0,
        length_penalty: float | None = None,
        max_tokens: int = 0,
        cut: bool = False,
    ) -> list[tuple[str, float]]:
        """What is written for each text, by beam search, or greedily with one beam; and its score, the sum of
        log-probabilities in nats over length^length_penalty, which is never below what greedy writing would have. 0
        beams, and no length_penalty, are those of the run's config (section writing), 4 and 1 where it has none.
        max_tokens: of a text; 0 is what the context holds. cut: texts that are longer than the encoder reads lose their
        end, as in training; else they are refused."""
        writing = self.stage.writing(self.how(beams, length_penalty), max_tokens)
        found: list[tuple[str, float]] = []
        for first in range(0, len(texts), ROWS):
            some = [self.prompt(text) for text in texts[first : first + ROWS]]
            if cut:
                room = self.stage.config.encoder.seq_len
                some = [ids if len(ids) <= room else [*ids[: room - 1], ids[-1]] for ids in some]
            found += writing.texts(self.params, some, ROWS, self.tokenizer)
        return found
