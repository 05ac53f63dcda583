"""`gptjax bench generate CONFIG`."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from gptjax.commands.arguments import Overrides, Positional
from gptjax.config.fields import Positive, frozen
from gptjax.config.load import load_config


@frozen
class Command:
    """Time generation by a config's model with random weights.

    One request, sixteen of equal and of mixed lengths, and one at the end of the context."""

    config: Annotated[str, Positional("CONFIG")]
    """A file of configs/."""
    out: Path = Path("bench")
    """Folder for the results."""
    weights: tuple[str, ...] = ("auto",)
    """How parameters are held, each a row: auto, float32, bfloat16, int8."""
    workloads: tuple[str, ...] = ()
    """Which of them: one, sixteen, mixed, long; empty is all."""
    slots: Positive = 16
    """Replies in progress at once."""
    steps: Positive = 4
    """Tokens that are decoded between two looks at what came of them."""
    peer: str = ""
    """Also time this script, such as tests/peers/generate_torch.py."""
    rounds: Positive = 1
    """Times that we and the peer take turns."""
    timeout: Annotated[float, Field(gt=0)] = 900.0
    """Seconds that one process may take."""
    overrides: Overrides = ()

    def run(self) -> None:
        """Measure, write, and print the table."""
        from gptjax.bench.generate import Options, run

        flags = self.weights, self.workloads, self.slots, self.steps, self.peer, self.rounds, self.timeout
        print(run(load_config(self.config, [*self.overrides]), Options(*flags), self.out))
