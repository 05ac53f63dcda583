"""What an encoder-decoder writes for pairs that it has not learned, beside what people wrote."""

from collections.abc import Callable

from gptjax.api import Translator
from gptjax.config import PairConfig, WritingConfig
from gptjax.data.dialogues import why_dropped
from gptjax.data.pairs import parse
from gptjax.data.sources import TextSource
from gptjax.errors import UserError
from gptjax.evaluate.figures import Figure, Measure, mean
from gptjax.evaluate.texts import bleu, chrf, rouge

Report = Callable[[str, int, int], None]
AT_ONCE = 256  # pairs between two reports


def pairs(
    model: Translator,
    source: TextSource,
    how: WritingConfig,
    limit: int = 0,
    report: Report = lambda *_: None,
) -> Measure:
    """Measure what is written for the first texts of pairs; limit: how many, 0 for all. BLEU, chrF and ROUGE from 0 to
    100. Raises UserError without the extra `eval`, and where there is no pair."""
    records = (source[number].text for number in range(len(source)))
    every = [parse(text) for text in records if not why_dropped(text)][: limit or None]
    if not every:
        raise UserError(f"--pairs {source.name}: none in the split; name another with --split")
    texts, references = list[str](), [target for _, target in every]
    for first in range(0, len(every), AT_ONCE):
        some = [asked for asked, _ in every[first : first + AT_ONCE]]
        texts += [text for text, _ in model.write(some, beams=how.beams, length_penalty=how.length_penalty, cut=True)]
        report("writing", len(texts), len(every))
    right = [float(text.strip() == wanted.strip()) for text, wanted in zip(texts, references, strict=True)]
    figures = {"exact": mean(right), "bleu": Figure(bleu(texts, references)), "chrf": Figure(chrf(texts, references))}
    figures |= {name: Figure(value) for name, value in rouge(texts, references).items()}
    about = {
        "source": source.name,
        "pairs": len(every),
        "beams": how.beams,
        "length_penalty": how.length_penalty,
        "interval": "95% of exact alone, Wilson's",
    }
    return Measure(about, figures)


def config_of(source: str, split: str, fields: tuple[str, ...], cache_dir: str) -> PairConfig:
    """What reads them."""
    return PairConfig(
        source=source, fields=fields, train_split=split, eval_split=split, cache_dir=cache_dir, invalid="drop"
    )
