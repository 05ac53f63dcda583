"""Windows that are damaged, for an encoder-decoder to restore."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gptjax.config import NoiseConfig, WindowConfig
from gptjax.data.examples import Report
from gptjax.data.noise import Marks, Noise, denoiser, room
from gptjax.data.packing import apart
from gptjax.data.rows import PairRows, pair_row
from gptjax.data.sources import TextSource
from gptjax.data.tokenizers import Tokenizer
from gptjax.data.tokenizers.marks import marks, modes, sentinels
from gptjax.data.tokenizers.tokenizer import MODES
from gptjax.data.windows import Windows, cut_windows
from gptjax.errors import UserError

SENTINELS = 100  # as T5 has


@dataclass(frozen=True, eq=False)
class DamagedWindows(Windows):
    """Windows, one a row."""

    noise: Noise
    start: int
    """Id that begins what is written."""
    target_len: int

    def made(self, indices: Sequence[int], rng: np.random.Generator) -> PairRows:
        pairs = [(text, self.ends_sentence(text)) for text in map(self.window, indices)]
        source, target = self.noise(*pairs[0], rng) if pairs else (np.zeros(0, np.int32),) * 2
        return pair_row(source, target, self.start, self.seq_len, self.target_len)


def open_damaged(
    config: WindowConfig,
    noise: NoiseConfig,
    source: TextSource,
    tokenizer: Tokenizer,
    start: int,
    source_len: int,
    target_len: int,
    report: Report = lambda *_: None,
) -> DamagedWindows:
    """The windows of a split, as long as both sides of the model take. Raises UserError for too little text."""
    damage = denoiser(noise, ids_of(noise, tokenizer))
    size = room(damage, source_len, target_len)
    if size < 2:
        raise UserError(f"encoder.seq_len = {source_len}, model.seq_len = {target_len}: no room for a damaged text")
    fields = cut_windows(config, source, tokenizer, source_len, 2, size, apart, report)
    return DamagedWindows(**fields, noise=damage, start=start, target_len=target_len)


def ids_of(noise: NoiseConfig, tokenizer: Tokenizer) -> Marks:
    """The ids that a kind of noise takes. Raises UserError for a vocabulary without them."""
    if noise.kind == "infill":
        return Marks(tokenizer.eot, mask=marks(tokenizer).mask)
    found, of_mode = sentinels(tokenizer), modes(tokenizer).tolist() if noise.kind == "ul2" else None
    if not len(found) or of_mode == []:
        missing = " ".join(MODES) if len(found) else "<extra_id_0>"
        raise UserError(
            f"data.tokenizer: the vocabulary has no {missing}, which noise.kind = {noise.kind} takes; give "
            f"model.vocab_size and encoder.vocab_size >= {tokenizer.vocab_size + SENTINELS + len(MODES)}"
        )
    return Marks(tokenizer.eot, found, tuple(of_mode) if of_mode else None)


def with_ids(noise: NoiseConfig, tokenizer: Tokenizer) -> Tokenizer:
    """With these ids reserved, where it has none of its own."""
    if noise.kind == "infill":
        return tokenizer.with_marks()
    made = tokenizer.with_sentinels(SENTINELS)
    return made.with_modes() if noise.kind == "ul2" and not len(modes(made)) else made
