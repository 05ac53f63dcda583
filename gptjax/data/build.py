"""From the parts of a source to a data set: on all cores, whose number changes nothing but the time, and from where a
build that was stopped had come to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gptjax.data import cache
from gptjax.data.pool import Died, Progress, Report, work
from gptjax.data.store import finish, is_written
from gptjax.data.worker import Part, Task
from gptjax.errors import UserError

PART_BYTES = 1 << 26
MOST_PARTS = 256  # about; of each a file is held open while it is read


def part_bytes(total: int) -> int:
    """The size of parts of a source of so many bytes."""
    return max(PART_BYTES, total // MOST_PARTS)


@dataclass(frozen=True)
class Plan:
    """What a data set is made from."""

    name: str
    key: str
    """Of the files, and of what else makes another data set of them."""
    about: str
    """The source in words."""
    size: int
    """Bytes of the source, about."""
    parts: Callable[[int], Sequence[Part]]
    """Of about so many bytes, in order, and the same on every machine."""


def build(root: Path, plan: Plan, max_chars: int, report: Report, most: int) -> Path:
    """The folder of a data set, made now by at most so many processes; another one of this host that makes it is waited
    for.

    Stopped at any moment, it leaves its finished parts, with which the next build goes on. Raises UserError, and
    leaves nothing, for a text that cannot be read or is empty; OSError where the disk is full.
    """
    stem = f"{plan.name}-{plan.key}"
    cache.wait(root, stem, report)
    if found := cache.find(root, plan.key):
        return found
    parts = plan.parts(part_bytes(plan.size))
    with cache.making(root, stem, keep=(Died,)) as made:
        for rest in made.glob(".*"):  # of a write that was cut off
            rest.unlink()
        done = [is_written(made, number) for number in range(len(parts))]
        tasks = [Task(made, i, part, max_chars) for i, part in enumerate(parts) if not done[i]]
        work(tasks, Progress(report, "building", sum(part.size for part in parts), tasks), most)
        digest = finish(made, [part.split for part in parts])
        if not digest:
            raise UserError(f"data.source: no text in {plan.about}; give files with text")
        return cache.publish(made, f"{plan.name}-{digest[:16]}", plan.key)
