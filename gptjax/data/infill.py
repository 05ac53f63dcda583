"""Documents in another order, so that a decoder learns to write what stands between two texts: fill-in-the-middle
(arXiv 2207.14255)."""

import numpy as np

from gptjax.data.tokenizers.tokenizer import INFILL, Tokenizer
from gptjax.errors import UserError

PREFIX, SUFFIX, MIDDLE = INFILL


def rearranged(text: str, tokenizer: Tokenizer, rng: np.random.Generator) -> np.ndarray:
    """A document's ids, int32 [N], its middle last, which an end of text is to follow.

    Cut at two characters, for a middle that begins or ends within a token is what an editor asks for (section 4.1);
    one half prefix, suffix, middle, the other suffix first and the prefix just before its middle (section 3).
    """
    first, second = sorted(rng.integers(0, len(text) + 1, 2).tolist())
    prefix, middle, suffix = text[:first], text[first:second], text[second:]
    if rng.random() < 0.5:
        return _joined(tokenizer, (PREFIX, prefix), (SUFFIX, suffix), (MIDDLE, middle))
    return _joined(tokenizer, (PREFIX,), (SUFFIX, suffix), (MIDDLE, prefix, middle))


def infill_prompt(tokenizer: Tokenizer, prefix: str, suffix: str) -> np.ndarray:
    """Ids after which a model that has learned it writes what stands between two texts, int32 [N]. Raises UserError
    for the tokenizer of one that has not."""
    if not tokenizer.infills:
        raise UserError("suffix: this model has not learned to fill in; pretrain one with --data.fim_rate 0.5")
    return _joined(tokenizer, (PREFIX, prefix), (SUFFIX, suffix), (MIDDLE,))


def _joined(tokenizer: Tokenizer, *parts: tuple[str, ...]) -> np.ndarray:
    """Each a reserved name and texts that follow it."""
    ids = []
    for name, *texts in parts:
        ids += [np.array([tokenizer.special[name]], np.int32), *map(tokenizer.encode_inside, texts)]
    return np.concatenate(ids)
