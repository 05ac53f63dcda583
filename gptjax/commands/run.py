"""`gptjax run CONFIG`."""

from typing import Annotated

from pydantic import Field

from gptjax.commands.arguments import Overrides, Positional
from gptjax.config.fields import Positive, frozen

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@frozen
class Command:
    """Train, and start again what falls: `gptjax train CONFIG --resume auto` under a watch.

    A crash, a lost host, a stuck step or a full disk is tried again from the last checkpoint; the same words at the
    same step twice are an error of the program or its config, and end it. SIGTERM and Ctrl-C save and end, as ever."""

    config: Annotated[str, Positional("CONFIG")]
    """A file of configs/, or a Hugging Face directory to fine-tune."""
    distributed: bool = False
    """One of several processes, each under a watch of its own."""
    tries: Positive = 5
    """Falls in a row without progress, after which it is given up."""
    patience: Seconds = 20.0
    """A step may take so many times the middle of the others, and half a minute."""
    grace: Seconds = 1800.0
    """Seconds that reading a checkpoint, compiling, a save or an evaluation may take."""
    backoff: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 5.0
    """Seconds before it is started again; doubled while it makes no progress, up to ten minutes."""
    overrides: Overrides = ()

    def run(self) -> int:
        """Keep it going; returns the exit status of the last start."""
        from gptjax.commands.train import Command as Train
        from gptjax.supervisor import Care, Supervisor
        from gptjax.train.run import base_folder

        folder = base_folder(Train(self.config, overrides=self.overrides).given())
        words = ["train", self.config, "--resume", "auto", *(["--distributed"] if self.distributed else [])]
        care = Care(self.tries, self.patience, self.grace, self.backoff)
        return Supervisor([*words, *self.overrides], folder, care).keep()
