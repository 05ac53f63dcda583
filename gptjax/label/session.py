"""One labeller's way through the prompts: which is next, in which order its replies are shown, and what is written."""

import hashlib
import random
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from gptjax.data.prompted import Prompt
from gptjax.errors import UserError
from gptjax.label.agreement import Agreement, agreements
from gptjax.label.answers import Answer, Record, key_of


class Draw(Protocol):
    """Replies to prompts, as `drawn.Drawn`."""

    def __call__(self, prompts: Sequence[Prompt]) -> "Future[list[str]]": ...

    def close(self) -> None: ...


def order(seed: int, prompt: str, labeller: str, count: int) -> list[int]:
    """The places of replies as they are shown: a permutation that depends on these alone."""
    digest = hashlib.sha256(f"{seed}\0{labeller}\0{prompt}".encode(errors="surrogatepass")).digest()
    places = list(range(count))
    random.Random(digest).shuffle(places)
    return places


@dataclass(frozen=True)
class Shown:
    """A prompt with its replies as they are shown."""

    key: str
    prompt: Prompt
    replies: list[str]
    """As they were drawn."""
    places: list[int]
    """Which of them is shown first, second, ..."""

    @property
    def number(self) -> str:
        """A short name of the prompt."""
        return hashlib.sha256(self.key.encode(errors="surrogatepass")).hexdigest()[:16]


@dataclass
class Session:
    """What a labeller does. For one thread alone."""

    prompts: Sequence[Prompt]
    """All of them, of which none is there twice."""
    draw: Draw
    record: Record
    labeller: str
    seed: int = 0
    others: list[Answer] = field(default_factory=list)
    """Of other files, to compare with."""
    unlike: int = 0
    """Prompts to which the model has not two different replies."""

    def __post_init__(self) -> None:
        done = self.record.done_by(self.labeller)
        self.done = [prompt for prompt in self.prompts if key_of(prompt.messages) in done]
        self.left = [prompt for prompt in self.prompts if key_of(prompt.messages) not in done]
        self._gone: list[Prompt] = []

    def ask(self) -> "Future[list[str]] | None":
        """The replies to the next prompt; None where there is no other."""
        return self.draw(self.left) if self.left else None

    def show(self, replies: list[str]) -> Shown | None:
        """The next prompt with the replies that `ask` gave; None, and it is passed over, where they are fewer than
        two."""
        if len(replies) < 2:
            self.left.pop(0)
            self.unlike += 1
            return None
        key = key_of(self.left[0].messages)
        return Shown(key, self.left[0], replies, order(self.seed, key, self.labeller, len(replies)))

    def answer(self, shown: Shown, ranks: Sequence[int]) -> None:
        """Ranks of the replies as they are shown, 1 the best, equal ones tied; none of them skips the prompt. Raises
        UserError where they are no such ranks, or of a prompt that is not the next."""
        if not self.left or key_of(self.left[0].messages) != shown.key:
            raise UserError("prompt: not the one that is asked for; reload the page")
        if ranks and (len(ranks) != len(shown.replies) or min(ranks) < 1):
            raise UserError(f"ranks: {len(ranks)} of {len(shown.replies)} replies; each needs one, from 1")
        dense = {rank: place for place, rank in enumerate(sorted(set(ranks)), 1)}
        by_place = dict(zip(shown.places, ranks, strict=False))
        drawn = [dense[by_place[place]] for place in range(len(ranks))]
        self.record.add(self.labeller, shown.prompt.messages, shown.replies, drawn)
        self._gone.append(self.left.pop(0))
        self.done.append(self._gone[-1])

    @property
    def can_undo(self) -> bool:
        return bool(self._gone)

    def undo(self) -> None:
        """The last answer of this session is asked for once more."""
        if not self._gone:
            raise UserError("undo: nothing was answered since gptjax label was started")
        self.record.take_back()
        self.left.insert(0, self._gone.pop())
        self.done.pop()

    def agreements(self) -> list[Agreement]:
        """Of all labellers of this file and the others."""
        return agreements([*self.others, *self.record.answers])

    def summary(self) -> list[str]:
        """What there is at the end, in lines."""
        lines = [", ".join(f"{len(kept.rows):,} {what} in {kept.path}" for what, kept in self.record.files.items())]
        if self.left:
            lines.append(f"{len(self.left):,} prompts are left for {self.labeller}; the same command goes on")
        if self.unlike:
            lines.append(f"{self.unlike:,} prompts passed over: the model has not two different replies to them")
        return [*lines, *map(str, self.agreements())]

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.draw.close()
        self.record.close()

    def state(self) -> dict[str, Any]:
        """How far it is."""
        return {
            "labeller": self.labeller,
            "done": len(self.done),
            "total": len(self.prompts) - self.unlike,
            "undo": self.can_undo,
            "agreement": [str(each) for each in self.agreements() if self.labeller in each.names],
        }
