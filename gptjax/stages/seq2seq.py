"""Pairs: an encoder-decoder learns to write the second text of each for the first, a translation or a summary."""

import numpy as np

from gptjax.config import Seq2SeqConfig, WritingConfig
from gptjax.data.paired import Pairs, framed, open_pairs
from gptjax.data.sources import TextSource
from gptjax.stages.encoder_decoder import ReadsAndWrites


class Seq2Seq(ReadsAndWrites[Pairs]):
    """Batches and evaluation of an encoder-decoder on pairs."""

    config: Seq2SeqConfig
    grows = True

    @property
    def how(self) -> WritingConfig:
        return self.config.writing

    def read(self, text: str) -> np.ndarray:
        tokenizer = self.known_tokenizer
        return framed(tokenizer.encode(self.config.data.prefix + text), tokenizer.begin, tokenizer.eot)

    def _examples(self, source: TextSource) -> Pairs:
        c, tokenizer = self.config, self.known_tokenizer
        about = tokenizer, self.start, tokenizer.eot, tokenizer.begin, c.encoder.seq_len, c.model.seq_len
        return open_pairs(c.data, source, *about, self.report)

    def facts(self) -> str:
        """What it learns, in words."""
        found = self.training
        share = found.packing.efficiency(self.config.row_tokens)
        return f"{len(found):,} training pairs, one a row, {share:.1%} full{found.losses}"
