"""A town small enough for two CPU cores, in which what a reply is worth can be computed: sixteen places, streets
between neighbours, and people who ask the way, or what lies next to a place.

A way is told as it is walked, "Go east to the church, then south to the bakery.", so that a person can follow it on the
map. Those who show how to answer make detours, and some do not reach the place; what a reply is worth, `gold`, falls
with its steps. So a fine-tuned model answers like its teachers, and a better one gives the shortest way.
"""

import json
import re
from collections import deque
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np

from gptjax.recipe.compare import answers, questions_of

MAP = (
    ("mill", "church", "market", "harbour"),
    ("school", "bakery", "library", "station"),
    ("park", "bridge", "museum", "theatre"),
    ("castle", "garden", "tower", "inn"),
)
CLOSED = (("church", "bakery"), ("library", "station"), ("bridge", "museum"), ("park", "castle"), ("garden", "tower"))
"""Neighbours without a street between them."""
COMPASS = {"north": (-1, 0), "south": (1, 0), "west": (0, -1), "east": (0, 1)}
PLACES = tuple(place for row in MAP for place in row)
QUESTIONS = (
    "How do I get from the {} to the {}?",
    "Which way is it from the {} to the {}?",
    "I am at the {}. How do I get to the {}?",
)
BESIDE = "What is {} of the {}?"
WELCOME = "Hello! Where are you, and where do you want to go?"
GOODBYE = "You are welcome. Have a good walk!"
PEOPLE = ("Anna", "Ben", "Clara", "David", "Emma", "Felix")
TIMES = ("In the morning", "At noon", "In the evening", "On Sunday", "After the rain")
AROUND = 0.2  # share of texts that say what lies around a place, and of questions that ask it
POLITE = 0.05  # share of texts that a talk begins or ends with: words that are new in fine-tuning are learned slowly
MOST = 8  # steps of a way: nobody walks further
HELD_OUT = 8  # one question of so many is asked in `questions.jsonl` alone
SURE = 0.75  # share of a teacher's steps that lead nearer
HASTY = 0.3  # share of teachers who stop before the end
PEOPLE_ERR = 0.05  # deviation of what a person thinks a way is worth that arrives, and says to a tenth; others are 0
REPLIES, ROUNDS, MOST_TOKENS = 9, 2, 56  # to each prompt, for a person to rank; so often; of each

Way = list[tuple[str, str]]  # (direction, place that it leads to)


@cache
def streets() -> dict[str, dict[str, str]]:
    """The place to which each direction leads from each place; a direction without a street is not there."""
    found: dict[str, dict[str, str]] = {place: {} for place in PLACES}
    for y, row in enumerate(MAP):
        for x, place in enumerate(row):
            for direction, (down, right) in COMPASS.items():
                if 0 <= y + down < len(MAP) and 0 <= x + right < len(row):
                    other = MAP[y + down][x + right]
                    if (place, other) not in CLOSED and (other, place) not in CLOSED:
                        found[place][direction] = other
    return found


@cache
def distances(goal: str) -> dict[str, int]:
    """Steps of the shortest way to a place, from each."""
    found, queue = {goal: 0}, deque([goal])
    while queue:
        place = queue.popleft()
        for other in streets()[place].values():
            if other not in found:
                found[other] = found[place] + 1
                queue.append(other)
    return found


def told(way: Way) -> str:
    """A way in words."""
    return "Go " + ", then ".join(f"{direction} to the {place}" for direction, place in way) + "."


def steps_of(text: str) -> Way | None:
    """The inverse of `told`; None for a text that tells no way."""
    if not re.fullmatch(r"Go (\w+ to the \w+)(, then \w+ to the \w+)*\.", text.strip()):
        return None
    return re.findall(r"(\w+) to the (\w+)", text)


def beside(direction: str, place: str) -> str:
    """What lies there, in words: last, for who has read that B is east of A has not learned what is east of A."""
    other = streets()[place].get(direction)
    if other is None:
        return f"No street goes {direction} from the {place}."
    return f"To the {direction} of the {place} lies the {other}."


def asked(prompt: str) -> tuple[str, str] | None:
    """From where to where, or in which direction from where; None for a prompt that asks neither."""
    named = [word for word in re.findall(r"\w+", prompt) if word in PLACES or word in COMPASS]
    return (named[0], named[1]) if len(named) == 2 else None


def gold(prompt: str, reply: str) -> float:
    """What a reply is worth, in [0, 1]: of a way 0 where it leaves the streets or ends elsewhere, else the steps of the
    shortest as a share of its own; what lies beside a place is right or wrong."""
    ends, way = asked(prompt), steps_of(reply)
    if ends and prompt == BESIDE.format(*ends):
        return float(reply.strip() == beside(*ends))
    if ends is None or way is None:
        return 0.0
    place, goal = ends
    for direction, named in way:
        if streets()[place].get(direction) != named:
            return 0.0
        place = named
    return distances(goal)[ends[0]] / len(way) if place == goal else 0.0


def teacher(rng: np.random.Generator, start: str, goal: str) -> Way:
    """What someone tells who was asked: a way that was walked, and now and then only its beginning."""
    way = walk(rng, start, goal)
    return way[: rng.integers(1, len(way))] if len(way) > 1 and rng.random() < HASTY else way


def walk(rng: np.random.Generator, start: str, goal: str) -> Way:
    """The way of someone who knows the streets and not always the shortest way; one in ten loses it."""
    way: Way = []
    place, sure = start, SURE if rng.random() < 0.9 else 0.2
    while place != goal and len(way) < MOST:
        near = [d for d, other in streets()[place].items() if distances(goal)[other] < distances(goal)[place]]
        choices = near if rng.random() < sure else list(streets()[place])
        direction = choices[rng.integers(len(choices))]
        place = streets()[place][direction]
        way.append((direction, place))
    return way


def _pairs(firsts: Iterable[str], held_out: bool) -> list[tuple[str, str]]:
    """What may be asked: ordered pairs of one of `firsts` and a place. Whether one is held out depends on it alone."""
    every = [(a, b) for a in firsts for b in PLACES if a != b]
    return [pair for number, pair in enumerate(every) if (number * 7 % HELD_OUT == 0) == held_out]


def _questions(held_out: bool) -> Iterator[dict[str, object]]:
    every = [form.format(*pair) for form in QUESTIONS for pair in _pairs(PLACES, held_out)]
    every += [BESIDE.format(*pair) for pair in _pairs(COMPASS, held_out)]
    return ({"prompt": each} for each in every)


def town(folder: Path) -> None:
    """text.jsonl to pretrain on, talks.jsonl to fine-tune on, what is asked, prompts.jsonl, and questions.jsonl that no
    talk answers."""
    rng = np.random.default_rng(0)
    _write(folder / "text.jsonl", ({"text": _text(rng)} for _ in range(20_000)))
    _write(folder / "talks.jsonl", ({"messages": _talk(rng)} for _ in range(8000)))
    _write(folder / "prompts.jsonl", _questions(held_out=False))
    _write(folder / "questions.jsonl", _questions(held_out=True))


def _write(path: Path, rows: Iterator[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _text(rng: np.random.Generator) -> str:
    """What someone who knows the town might write of a walk, and now and then of what lies around."""
    kind = rng.random()
    if kind < POLITE:
        return str(rng.choice([WELCOME, GOODBYE]))
    if kind < POLITE + AROUND:
        return _around(rng, rng.choice(PLACES))
    start, goal = rng.choice(PLACES, 2, replace=False)
    who, when = rng.choice(PEOPLE), rng.choice(TIMES)
    way = walk(rng, start, goal)
    walked = ", then ".join(f"{direction} to the {place}" for direction, place in way)
    return f"{when} {who} was at the {start} and wanted to go to the {goal}. {who} went {walked}."


def _around(rng: np.random.Generator, place: str) -> str:
    return " ".join(beside(direction, place) for direction in rng.permutation([*COMPASS]))


def _talk(rng: np.random.Generator) -> list[dict[str, str]]:
    """Someone who asks once, or up to three times; some say hello first, or thanks."""
    talk: list[dict[str, str]] = []

    def said(question: str, answer: str) -> None:
        talk.extend([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])

    if rng.random() < 0.15:
        said(rng.choice(["Hello!", "Good morning!", "Hi."]), WELCOME)
    for _ in range(rng.choice((1, 2, 3), p=(0.7, 0.2, 0.1))):
        a_way = rng.random() > AROUND
        pairs = _pairs(PLACES if a_way else COMPASS, held_out=False)
        pair = pairs[rng.integers(len(pairs))]
        if a_way:
            said(rng.choice(QUESTIONS).format(*pair), told(teacher(rng, *pair)))
        else:
            said(BESIDE.format(*pair), beside(*pair))
    if rng.random() < 0.1:
        said(rng.choice(["Thank you!", "Thanks."]), GOODBYE)
    return talk


def rankings(folder: Path, town: Path, sft: Path) -> None:
    """rankings.jsonl: replies of a model to each prompt, as people rank them who see what they are worth, but not
    exactly."""
    rng = np.random.default_rng(1)
    prompts = questions_of(town / "prompts.jsonl")
    said_to = answers(str(sft), prompts, REPLIES * ROUNDS, MOST_TOKENS)

    def rows() -> Iterator[dict[str, object]]:
        for prompt, start in product(range(len(prompts)), range(0, REPLIES * ROUNDS, REPLIES)):
            question, said = prompts[prompt][-1].content, said_to[prompt][start : start + REPLIES]
            known = list(dict.fromkeys(text for text in said if text.strip()))
            worth = [_thought(rng, gold(question, text)) for text in known]
            order = sorted({*worth}, reverse=True)  # equal ones are ties
            if len(order) > 1:
                yield {"prompt": question, "replies": known, "ranks": [order.index(each) + 1 for each in worth]}

    _write(folder / "rankings.jsonl", rows())


def _thought(rng: np.random.Generator, worth: float) -> float:
    return round(worth + PEOPLE_ERR * rng.normal(), 1) if worth else 0.0
