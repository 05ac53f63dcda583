"""What is learned from, to look at. Of fine-tuning: how long conversations are, how full the rows, and which tokens
count; of a reward model or a policy: the rankings or the prompts; of all what was left out. Of pretraining and
fine-tuning also the rows themselves."""

from collections.abc import Iterator
from itertools import groupby, pairwise

import numpy as np
from rich.console import Console
from rich.text import Text

from gptjax.config import Config, RankedConfig, RewardedConfig, SFTConfig
from gptjax.data.chat import Rendered
from gptjax.data.examples import Examples, ExampleSet
from gptjax.data.rankings import parse
from gptjax.data.rows import Rows
from gptjax.data.sources import Corpus
from gptjax.data.tokenizers import Tokenizer
from gptjax.errors import UserError
from gptjax.stages import stage_class
from gptjax.stages.from_rankings import FromRankings
from gptjax.stages.launch import with_text
from gptjax.stages.on_policy import OnPolicy
from gptjax.stages.pretrain import Pretrain
from gptjax.stages.sft import SFT
from gptjax.stages.weights import given_tokenizer
from gptjax.terminal import Progress

TRAINED, UNTRAINED = "bold green", "grey50"
MARKS = "[[", "]]"
"""Around what is trained where there are no colours."""


def show(config: SFTConfig, corpus: Corpus, count: int) -> None:
    """Print figures of both splits, and the first `count` conversations of the training split."""
    console = Console(highlight=False, soft_wrap=True)
    tokenizer = SFT.fit_tokenizer(config, given_tokenizer(config))
    with Progress() as progress:
        stage = SFT(config, "cpu", tokenizer=tokenizer, corpus=corpus, report=progress)
        splits = {config.data.train_split: stage.training, config.data.eval_split: stage.evaluation}
    for name, examples in splits.items():
        console.print(f"{corpus.name} {name}: {len(examples):,} conversations in {examples.num_rows:,} rows")
        for line in figures(examples):
            console.print(f"  {line}")
    colours = console.is_terminal
    legend = painted([("trained", True), (" and not", False)], colours)
    for index in range(min(count, len(stage.training))):
        rendered = stage.training[index]
        size = len(rendered.ids), int(rendered.trained.sum())
        console.print(f"\nconversation {index}, {size[0]:,} tokens, {size[1]:,} of them ", legend, end=":\n")
        console.print(painted(spans(rendered, tokenizer), colours))
    console.print()


def show_rankings(config: RankedConfig, corpus: Corpus, count: int) -> None:
    """Print figures of both splits, and the first `count` prompts of the training split with their replies, the best
    first."""
    console = Console(highlight=False, soft_wrap=True)
    tokenizer = FromRankings.fit_tokenizer(config, given_tokenizer(config))
    with Progress() as progress:
        stage = FromRankings(config, "cpu", tokenizer=tokenizer, corpus=corpus, report=progress)
        splits = {config.data.train_split: stage.training, config.data.eval_split: stage.evaluation}
    for name, found in splits.items():
        console.print(f"{corpus.name} {name}: {len(found):,} prompts with {found.num_replies:,} ranked replies")
        for line in _lost(found):
            console.print(f"  {line}")
    for index in range(min(count, len(stage.training))):
        ranked = parse(stage.training.source[int(stage.training.numbers[index])].text)
        lines = [f"{message.role}: {message.content}" for message in ranked.prompt]
        lines += [f"[rank {rank}] {reply}" for rank, reply in sorted(zip(ranked.ranks, ranked.replies, strict=True))]
        console.print(f"\nprompt {index}:\n" + "\n".join(lines), markup=False)
    console.print()


def show_prompts(config: RewardedConfig, corpus: Corpus, count: int) -> None:
    """Print figures of both splits, and the first `count` prompts of the training split."""
    console = Console(highlight=False, soft_wrap=True)
    tokenizer = OnPolicy.fit_tokenizer(config, given_tokenizer(config))
    with Progress() as progress:
        stage = OnPolicy(config, "cpu", tokenizer=tokenizer, corpus=corpus, report=progress)
        splits = {config.data.train_split: stage.training, config.data.eval_split: stage.evaluation}
    for name, found in splits.items():
        lengths = found.packing.lengths
        console.print(f"{corpus.name} {name}: {len(found):,} prompts, {np.median(lengths):.0f} tokens in the middle")
        for line in _lost(found):
            console.print(f"  {line}")
    for index in range(min(count, len(stage.training))):
        prompt = stage.training[index]
        lines = [f"{message.role}: {message.content}" for message in prompt.messages]
        lines += [f"[answer] {prompt.answer}"] if prompt.answer else []
        console.print(f"\nprompt {index}:\n" + "\n".join(lines), markup=False)
    console.print()


def show_rows(config: Config, at: str, lane: int, count: int) -> None:
    """Print some rows of training from a position on. Raises UserError for a stage of other rows, and for a lane or a
    position that there is not."""
    kind = stage_class(config)
    if kind not in (Pretrain, SFT):
        raise UserError(f"gptjax data view: stage {config.stage} has rows of another kind; take pretrain or sft")
    lanes, each = config.data.lanes, config.micro_batch_size // config.data.lanes
    if lane >= lanes:
        raise UserError(f"--lane {lane}: there are {lanes} (data.lanes); nearest {lanes - 1}")
    if count > each:
        raise UserError(f"--rows {count}: a micro-batch has {each} of a lane; nearest {each}")
    position = _position(at, kind is Pretrain)
    stage = with_text(kind(config, "cpu"))
    assert isinstance(stage, Pretrain | SFT)
    console, tokenizer = Console(highlight=False, soft_wrap=True), stage.known_tokenizer
    rows = stage.feed([position] * lanes, range(lane * each, lane * each + count)).batch(1, None)
    legend = painted([("asked for", True), (" and not", False)], console.is_terminal)
    console.print(f"{config.data.source} {config.data.train_split}, lane {lane} from {at}; what is ", legend, sep="")
    for number in range(count):
        row = Rows(*(None if leaf is None else np.asarray(leaf)[0, number] for leaf in rows))
        console.print(f"\nrow {number}, {len(row.tokens):,} tokens")
        for begins, ends, parts in documents_of(row, tokenizer):
            console.print(f"[tokens {begins:,} to {ends - 1:,}]", style="cyan", markup=False)
            console.print(painted(parts, console.is_terminal))
    apart = "keep to themselves" if config.separates else "see each other"
    console.print(f"\nDocuments of a row {apart}.")


def _position(at: str, in_records: bool) -> int:
    """A lane's position, as the stream has it."""
    record, _, token = at.partition(":")
    if not record.isdigit() or not (token or "0").isdigit() or (token and not in_records):
        raise UserError(f"--at {at}: give a number" + ", or RECORD:TOKEN such as 12:300" * in_records)
    if not in_records or int(record) >= 1 << 32:
        return int(record)
    return int(record) << 32 | int(token or 0)


def documents_of(row: Rows, tokenizer: Tokenizer) -> Iterator[tuple[int, int, list[tuple[str, bool]]]]:
    """Of each document of a row its first token, the one behind its last, and its text in parts with whether what is
    next to each token is asked for."""
    ids, asked = row.tokens.tolist(), (row.targets >= 0).tolist()
    if row.segments is None:
        borders = [i + 1 for i, id_ in enumerate(ids) if id_ == tokenizer.eot]
    else:
        borders = (np.flatnonzero(np.diff(row.segments)) + 1).tolist()
    for begins, ends in pairwise(dict.fromkeys([0, *borders, len(ids)])):
        pairs = zip(ids[begins:ends], asked[begins:ends], strict=True)
        parts = [
            (tokenizer.decode([i for i, _ in part], inside=True), there)
            for there, part in groupby(pairs, key=lambda pair: pair[1])
        ]
        yield begins, ends, parts


def figures(examples: Examples) -> Iterator[str]:
    """Lengths, packing, and what was left out, a line each."""
    lengths = examples.packing.lengths + 1
    low, middle, high, most = np.percentile(lengths, [5, 50, 95, 100]).round().astype(int)
    yield f"tokens of a conversation: {middle:,} in the middle, {low:,} to {high:,} of nine in ten, at most {most:,}"
    share = examples.packing.efficiency(examples.seq_len)
    yield f"rows of {examples.seq_len:,} tokens are {share:.1%} full, with {len(examples) / examples.num_rows:.1f} each"
    yield from _lost(examples)


def _lost(examples: ExampleSet) -> Iterator[str]:
    if examples.num_cut:
        yield f"{examples.num_cut:,} are longer than {examples.seq_len:,} tokens, and lose their beginning"
    yield from (f"{number:,} left out: {reason}" for reason, number in examples.left_out.most_common())


def spans(rendered: Rendered, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """The text of a conversation in parts, and whether each is trained."""
    pairs = zip(rendered.ids.tolist(), rendered.trained.tolist(), strict=True)
    return [
        (tokenizer.decode([i for i, _ in part], inside=True), trained)
        for trained, part in groupby(pairs, key=lambda pair: pair[1])
    ]


def painted(parts: list[tuple[str, bool]], colours: bool) -> Text:
    """In two colours, or with MARKS around what is trained."""
    text = Text()
    for part, trained in parts:
        if colours:
            text.append(part, TRAINED if trained else UNTRAINED)
        else:
            text.append(part.join(MARKS) if trained else part)
    return text
