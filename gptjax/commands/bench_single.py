"""`gptjax bench single CONFIG...`."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from gptjax.commands.arguments import Overrides, Positional
from gptjax.config.fields import Positive, frozen
from gptjax.config.load import load_config


@frozen
class Command:
    """Time the train step of configs on one device.

    Tokens per second, MFU, memory, and the parts of a step beside their floors; fields are set for all the configs."""

    configs: Annotated[tuple[str, ...], Positional("CONFIG")]
    """Files of configs/."""
    out: Path = Path("bench")
    """Folder for the results."""
    steps: Positive = 10
    """Measured steps of each setting."""
    timeout: Annotated[float, Field(gt=0)] = 900.0
    """Seconds that one process may take."""
    search: bool = False
    """Find the best micro-batch and remat first."""
    options: bool = False
    """Also try compiler options, each by itself."""
    stream: bool = False
    """Also feed the config's own text."""
    peer: str = ""
    """Also time this script, such as tests/peers/gpt2_torch.py."""
    rounds: Positive = 1
    """Times that we and the peer take turns."""
    overrides: Overrides = ()

    def run(self) -> None:
        """Measure, write, and print the tables."""
        from gptjax.bench.single import Options, run

        flags = self.search, self.options, self.stream, self.peer, self.rounds
        configs = [load_config(path, [*self.overrides]) for path in self.configs]
        print(run(configs, Options(self.steps, self.timeout, *flags), self.out))
