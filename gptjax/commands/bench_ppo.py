"""`gptjax bench ppo CONFIG`."""

from pathlib import Path
from typing import Annotated

from gptjax.commands.arguments import Overrides, Positional
from gptjax.config.fields import Positive, frozen
from gptjax.config.load import load_config


@frozen
class Command:
    """Time the parts of an iteration of PPO or GRPO: drawing, judging, learning.

    From the weights, the prompts and the reward that the config names; nothing is saved of what is learned."""

    config: Annotated[str, Positional("CONFIG")]
    """A file of configs/."""
    out: Path = Path("bench")
    """Folder for the results."""
    iterations: Positive = 6
    """How many; the first two warm up."""
    overrides: Overrides = ()

    def run(self) -> None:
        """Measure, write, and print the table."""
        from gptjax.bench.ppo import run

        print(run(load_config(self.config, [*self.overrides]), self.iterations, self.out))
