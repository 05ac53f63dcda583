"""Pretraining of an encoder-decoder: it restores texts that were damaged (T5, UL2, BART)."""

import numpy as np

from gptjax.config import Config, DenoiseConfig
from gptjax.data.restored import DamagedWindows, ids_of, open_damaged, with_ids
from gptjax.data.sources import TextSource
from gptjax.data.tokenizers import Tokenizer
from gptjax.data.tokenizers.marks import spelled
from gptjax.stages.encoder_decoder import ReadsAndWrites


class Denoise(ReadsAndWrites[DamagedWindows]):
    """Batches of texts and what is missing of them."""

    config: DenoiseConfig

    @classmethod
    def fit_tokenizer(cls, config: Config, tokenizer: Tokenizer) -> Tokenizer:
        assert isinstance(config, DenoiseConfig)
        fitted = super().fit_tokenizer(config, with_ids(config.noise, tokenizer))
        ids_of(config.noise, fitted)  # refused here where the model has no room for them
        return fitted

    def read(self, text: str) -> np.ndarray:
        """A text with the names of sentinels, or of the mask, where something is missing."""
        tokenizer = self.known_tokenizer
        return np.append(spelled(tokenizer, text), tokenizer.eot).astype(np.int32)

    def _examples(self, source: TextSource) -> DamagedWindows:
        c, tokenizer = self.config, self.known_tokenizer
        about = tokenizer, self.start, c.encoder.seq_len, c.model.seq_len, self.report
        return open_damaged(c.data, c.noise, source, *about)

    def facts(self) -> str:
        """What it learns, in words."""
        found, spans = self.training, len(ids_of(self.config.noise, self.known_tokenizer).sentinels)
        sentinels = f", {spans} sentinels" * (self.config.noise.kind != "infill")
        return f"{len(found):,} training windows of at most {found.sizes.max():,} tokens{sentinels}"
