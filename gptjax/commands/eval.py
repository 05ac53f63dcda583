"""`gptjax eval PATH...`."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from gptjax.commands.arguments import Positional
from gptjax.config import DataConfig
from gptjax.config.fields import Count, Positive, frozen
from gptjax.errors import UserError

if TYPE_CHECKING:
    from gptjax.data.sources import TextSource
    from gptjax.evaluate.figures import Measure

COUNTS = ("documents", "tokens", "questions", "shots", "pairs")


@frozen
class Command:
    """Measure trained models by a text, by tasks or by pairs of texts, and compare them on one page."""

    paths: Annotated[tuple[str, ...], Positional("PATH")]
    """Run folders, checkpoints in them (RUN/checkpoints/STEP) or Hugging Face directories."""
    text: str = ""
    """A text for loss, perplexity, bits per byte and next-token accuracy: what data.source takes."""
    split: str = "train"
    """Part of it, such as train[95%:]; tfds:NAME has other splits, too."""
    text_field: Annotated[str, Field(min_length=1)] = DataConfig.text_field
    """Field that holds the text in records."""
    cache_dir: Annotated[str, Field(min_length=1)] = DataConfig.cache_dir
    """Where the built text lives."""
    stride: Count = 0
    """Tokens that each further window of a long document scores, the others being context; 0 is half the context."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness with commas between, or of our own: local_gsm8k, local_wikitext, local_cloze."""
    data: str = ""
    """The folder with the data of tasks that begin with local_."""
    pairs: str = ""
    """Pairs of texts, of which an encoder-decoder writes the second for the first: what data.source takes."""
    fields: tuple[str, ...] = ()
    """Fields of the pairs, source,target; empty takes the first form found."""
    beams: Count = 0
    """Of the search that writes them; 1 takes the likeliest token each time, 0 is the run's writing.beams."""
    length_penalty: float | None = None
    """A text's log-probability is divided by its length to this power before texts are compared; none is the run's
    writing.length_penalty."""
    limit: Count = 0
    """Questions of each task, or pairs; 0 is all."""
    shots: Annotated[int, Field(ge=-1)] = -1
    """Examples before each question; -1 is as the task says."""
    rows: Positive = 8
    """Contexts that are computed at once."""
    weights: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """How parameters are held; auto is the type that the model computes in."""
    out: str = ""
    """The folder for results (JSON, a file a model) and the page; empty is eval beside the first PATH."""

    def run(self) -> None:
        """Measure one model after the other, print and keep what each gives, and write the page of all that the folder
        holds."""
        if not self.text and not self.tasks and not self.pairs:
            raise UserError("gptjax eval: nothing to measure; give --text SOURCE, --tasks NAME,NAME or --pairs SOURCE")
        if self.pairs and (self.text or self.tasks):
            raise UserError("--pairs: for encoder-decoders, which have no --text and no --tasks; give one of them")
        from gptjax.evaluate import page, results
        from gptjax.evaluate.harness import load_tasks
        from gptjax.stages.weights import about

        for path in self.paths:
            about(path)  # what is broken is said before hours of the first are spent
        source = self._source() if self.text else self._pairs() if self.pairs else None
        tasks = load_tasks(self.tasks, self.data, None if self.shots < 0 else self.shots) if self.tasks else None
        out = results.folder_of(self.paths, self.out)
        files, earlier = list[Path](), results.earlier(out)
        for path in self.paths:
            model, measures = self._measure(path, source, tasks)
            files.append(results.save(out, model, measures))
            print(f"{path} -> {files[-1]}")
            for key, measure in measures.items():
                print("\n".join(_lines(key, measure)))
        every = dict.fromkeys([*files, *earlier])
        print(page.write(out, [results.load(file) for file in every]))

    def _source(self) -> "TextSource":
        from gptjax.data.sources import build
        from gptjax.terminal import Progress

        config = DataConfig(
            source=self.text,
            text_field=self.text_field,
            cache_dir=self.cache_dir,
            train_split=self.split,
            eval_split=self.split,
        )
        with Progress() as progress:
            return build(config, progress).split(self.split, config.split_by)

    def _pairs(self) -> "TextSource":
        from gptjax.data.sources import build
        from gptjax.evaluate.pairs import config_of
        from gptjax.terminal import Progress

        config = config_of(self.pairs, self.split, self.fields, self.cache_dir)
        with Progress() as progress:
            return build(config, progress).split(self.split, config.split_by)

    def _written(self, path: str, source: "TextSource") -> "tuple[dict[str, object], dict[str, Measure]]":
        """What is known of an encoder-decoder, and what it gives."""
        from gptjax import api
        from gptjax.evaluate import results
        from gptjax.evaluate.pairs import pairs
        from gptjax.terminal import Progress

        model = api.load_any(path, weights=self.weights)
        if not isinstance(model, api.Translator):
            raise UserError(f"{path}: no encoder-decoder, which --pairs is for; measure it by --text or --tasks")
        how = model.how(self.beams, self.length_penalty)
        with Progress() as progress:
            made = pairs(model, source, how, self.limit, progress)
        name = [self.split] * (self.split != "train") + [f"{how.beams} beam{'s' * (how.beams > 1)}"]
        name += [f"first {self.limit}"] * bool(self.limit)
        return results.about(model), {_named(Path(self.pairs).name or self.pairs, name): made}

    def _measure(
        self, path: str, source: "TextSource | None", tasks: object
    ) -> "tuple[dict[str, object], dict[str, Measure]]":
        """What is known of a model, and what it gives."""
        if self.pairs:
            assert source
            return self._written(path, source)
        from gptjax import api
        from gptjax.evaluate import results
        from gptjax.evaluate.harness import run_tasks
        from gptjax.evaluate.perplexity import perplexity
        from gptjax.evaluate.score import Scorer
        from gptjax.terminal import Progress

        model = api.load(path, weights=self.weights, slots=self.rows)
        scorer, measures = Scorer(model, self.rows), dict["str", "Measure"]()
        if source is not None:
            with Progress() as progress:
                measures[self._text_key] = perplexity(model, source, self.stride, scorer, progress)
        if tasks is not None:
            found = run_tasks(model, tasks, self.limit, scorer)
            measures |= {self._task_key(name): measure for name, measure in found.items()}
        return results.about(model), measures

    @property
    def _text_key(self) -> str:
        """The text, and what makes other figures of it."""
        parts = [self.split] * (self.split != "train") + [f"stride {self.stride}"] * bool(self.stride)
        return _named(Path(self.text).name or self.text, parts)

    def _task_key(self, name: str) -> str:
        return _named(name, [f"{self.shots} shots"] * (self.shots >= 0) + [f"first {self.limit}"] * bool(self.limit))


def _named(name: str, parts: list[str]) -> str:
    return f"{name} ({', '.join(parts)})" if parts else name


def _lines(key: str, measure: "Measure") -> Iterator[str]:
    """A measure as the terminal shows it."""
    from gptjax.evaluate.page import number

    about = measure.about
    yield f"{key}: " + ", ".join(f"{about[name]:,} {name}" for name in COUNTS if name in about)
    for name, figure in measure.figures.items():
        interval = "" if figure.low is None or figure.high is None else f"{number(figure.low)} - {number(figure.high)}"
        yield f"  {name:20} {number(figure.value):>10}   {interval}".rstrip()
    if measure.classes:
        yield f"  by class, which is {measure.classes['what']}:"
    for name, row in measure.classes.get("rows", {}).items():
        yield f"    {name:18} " + "  ".join(f"{part} {number(value)}" for part, value in row.items())
    yield f"  interval: {about['interval']}"
