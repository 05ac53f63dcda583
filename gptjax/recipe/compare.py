"""The same questions answered by each model of a recipe, and who wins: replies.json."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.api import load
from gptjax.config import PromptConfig
from gptjax.data.chat import Message, chat_format
from gptjax.data.prompts import parse
from gptjax.data.sources import build
from gptjax.errors import UserError
from gptjax.evaluate.figures import Figure, mean
from gptjax.files import json_text, write_whole
from gptjax.recipe.steps import Comparison
from gptjax.stages.rewards import ask, load_function
from gptjax.stages.scorer import load_scorer
from gptjax.terminal import Progress

REPLIES = "replies.json"
SLOTS = 128  # replies side by side
SCORED = 32  # texts at once
Each = list[list[float]]  # of each question, of each reply


def questions_of(path: Path, most: int | None = None) -> list[list[Message]]:
    """Prompts of a file, in any form that `PromptConfig` reads. Raises UserError where there are none."""
    data = PromptConfig(source=str(path))
    with Progress() as progress:
        source = build(data, progress).split("train", data.split_by)
    found = [parse(source[i].text).prompt for i in range(len(source))]
    if not (asked := [prompt for prompt in found if prompt][:most]):
        raise UserError(f"{path}: no prompt in it; give records with a prompt, a question or messages")
    return asked


def answers(path: str, questions: Sequence[list[Message]], replies: int, max_tokens: int) -> list[list[str]]:
    """So many replies of a model to each question, drawn at temperature 1. One that has learned no conversations
    continues the text of the question, to the end of its line."""
    model = load(path, slots=SLOTS)

    def request(question: list[Message], sample: int) -> Any:
        how = {"max_tokens": max_tokens, "sample": sample}
        if model.chats:
            return model.request(model.stage.chat.prompt(question).tolist(), **how)  # type: ignore[union-attr]
        return model.request("\n".join(turn.content for turn in question) + "\n", stop="\n", **how)

    made = model.engine.run([request(question, i) for question in questions for i in range(replies)])
    texts = [reply.text for reply in made]
    return [texts[start : start + replies] for start in range(0, len(texts), replies)]


def write(asked: Comparison, root: Path, out: Path) -> None:
    """Answer, judge, and write replies.json into `out`."""
    questions = questions_of(root / asked.questions, asked.most)
    models: dict[str, Any] = {}
    for name in asked.models:
        said = answers(str(root / name), questions, asked.replies, asked.max_tokens)
        judged = judge(asked, root, questions, said)
        models[name] = {"replies": said, **judged, "mean": {by: asdict(_mean(each)) for by, each in judged.items()}}
    pairs = zip(asked.models, asked.models[1:], strict=False)
    wins = [
        {"of": later, "over": former, "by": by, **asdict(win_rate(models[later][by], models[former][by]))}
        for former, later in pairs
        for by in _judges(asked)
    ]
    shown = [[[turn.role, turn.content] for turn in question] for question in questions]
    result = {"questions": shown, "judges": _judges(asked), "models": models, "wins": wins}
    write_whole(out / REPLIES, json_text(result, indent=1).encode("utf-8", "replace"))


def _judges(asked: Comparison) -> list[str]:
    return [by for by, there in (("gold", asked.gold), ("reward", asked.reward)) if there]


def judge(
    asked: Comparison, root: Path, questions: Sequence[list[Message]], said: Sequence[Sequence[str]]
) -> dict[str, Each]:
    """What each reply is worth, by each of the judges."""
    flat = [(question, text) for question, texts in zip(questions, said, strict=True) for text in texts]
    found: dict[str, Each] = {}
    if asked.gold:
        about = [(question[-1].content, text, "") for question, text in flat]
        found["gold"] = _grouped(ask(load_function(asked.gold, "gold"), about, f"gold {asked.gold}"), said)
    if asked.reward:
        found["reward"] = _grouped(_scores(str(root / asked.reward), flat), said)
    return found


def _grouped(values: Sequence[float], said: Sequence[Sequence[str]]) -> Each:
    left = iter(values)
    return [[next(left) for _ in texts] for texts in said]


def _scores(path: str, said: Sequence[tuple[list[Message], str]]) -> list[float]:
    """By a reward model; what has more tokens than its context is read without its beginning."""
    scorer = load_scorer(path)
    chat, length = chat_format(scorer.tokenizer), scorer.config.model.seq_len
    score = jax.jit(scorer.score)
    found: list[float] = []
    for start in range(0, len(said), SCORED):
        tokens, last = np.zeros((SCORED, length), np.int32), np.zeros(SCORED, np.int32)
        part = said[start : start + SCORED]
        for i, (question, text) in enumerate(part):
            ids = np.concatenate([chat.prompt(question), chat.reply(text)])[-length:]
            tokens[i, : len(ids)], last[i] = ids, len(ids) - 1
        found += np.asarray(score(scorer.params, jnp.asarray(tokens), jnp.asarray(last))).tolist()[: len(part)]
    return found


def _mean(values: Each) -> Figure:
    """Over questions, of which each counts once."""
    return mean([float(np.mean(each)) for each in values])


def win_rate(ours: Each, theirs: Each) -> Figure:
    """The share of replies that are worth more than the other model's to the same question, any to any; as much is
    half a win. The interval is over questions."""
    return mean(
        [
            float(np.mean([(a > b) + 0.5 * (a == b) for a in ours_ for b in theirs_]))
            for ours_, theirs_ in zip(ours, theirs, strict=True)
        ]
    )
