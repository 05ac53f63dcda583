"""`gptjax bench layouts CONFIG`."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from gptjax.commands.arguments import Overrides, Positional
from gptjax.config.fields import Positive, frozen
from gptjax.config.load import load_config


@frozen
class Command:
    """Time a config's train step on every layout of the attached devices, beside the prediction.

    On one device over batch, remat, scan and attention. Exit status 1: slower than before."""

    config: Annotated[str, Positional("CONFIG")]
    """A file of configs/."""
    out: Path = Path("bench")
    """Folder for the results; chip.json among them is for `gptjax plan --chip-file`."""
    layouts: Annotated[str, Field(min_length=1)] = "all"
    """Settings with commas, such as fsdp8,tp (a name without numbers means all of that kind), or all."""
    steps: Positive = 10
    """Measured steps of each setting."""
    timeout: Annotated[float, Field(gt=0)] = 600.0
    """Seconds that a setting may take."""
    compare: Path | None = None
    """A layouts.json of an earlier run."""
    distributed: bool = False
    """One of several hosts: join the others first."""
    overrides: Overrides = ()

    def run(self) -> int:
        """Measure, write, and print the table; returns 1 where a setting is slower than in `compare`."""
        from gptjax.bench.layouts import Options, run

        options = Options(self.layouts, self.steps, self.timeout, self.distributed)
        text, worse = run(load_config(self.config, [*self.overrides]), options, self.out, self.compare)
        if text:
            print(text)
        return int(worse)
