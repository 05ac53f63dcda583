"""Where the rows of a run come from: what every stage's source of batches is."""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from gptjax.train.parts import Params
from gptjax.train.step import Rows


class Feed(Protocol):
    """The endless rows of one process, from a position on."""

    def batch(self, num_micro: int, params: Params | None, /) -> Rows:
        """The next micro-batches [num_micro, rows of this process, ...]; their number may change at each call.

        `params`, all of them as they are now, are given to a stage that is `on_policy`: what it draws from them is then
        a function of them and of the position, so that what was cut off is drawn again.
        """
        ...

    @property
    def positions(self) -> Sequence[int]:
        """Where it stands after the last batch: one integer for each lane, of which a process may run some."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class Telling(Protocol):
    """A feed that has something to log."""

    @property
    def figures(self) -> Mapping[str, float]:
        """Of the last batch."""
        ...
