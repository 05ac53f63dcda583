"""`gptjax train CONFIG`, and `--resume RUN`."""

import os
from pathlib import Path
from typing import Annotated

from gptjax.commands.arguments import Overrides, Positional
from gptjax.config import Config, validate
from gptjax.config.fields import Positive, frozen
from gptjax.config.load import load_config, override
from gptjax.errors import UserError
from gptjax.train.pulse import end_unwatched

AUTO = "auto"


@frozen
class Command:
    """Train the model of a config, or go on with a run. Any field is set by its dotted name."""

    config: Annotated[str, Positional("CONFIG")] = ""
    """A file of configs/, or a Hugging Face directory (GPT-2, GPT-Neo) to fine-tune."""
    resume: str = ""
    """A run folder to go on with, exactly where it stopped; auto starts the run of --run, or goes on with it if it is
    there."""
    overwrite: bool = False
    """Start anew in the folder of --run, or runs/NAME: the run that is there is removed, once all else is checked."""
    distributed: bool = False
    """One of several processes: join the others first."""
    new_data: bool = False
    """Go on with a run although its text, or the file of its reward function, is another one now."""
    dry_run: bool = False
    """Check and say all that a run would before its first step; write nothing."""
    topology: str = ""
    """With --dry-run: hardware that is not here, such as v5p-1024 or h100-8x64."""
    slices: Positive = 1
    """With --topology: so many of them (TPU)."""
    overrides: Overrides = ()

    def run(self) -> int:
        """Train to the end or a signal; returns the exit status."""
        end_unwatched(os.environ)
        if not self.config and not self.resume:
            raise UserError("gptjax train: name a config, such as configs/quickstart.py, or --resume RUN")
        if (self.topology or self.slices > 1) and not (self.dry_run and self.topology):
            raise UserError("--topology and --slices: for a --dry-run of hardware that is not here")
        if self.overwrite and self.resume:
            raise UserError("--overwrite: starts anew, and --resume goes on; give one of them")
        given = self.given() if self.config else None
        if not self.distributed:
            return self._train(given)
        from gptjax.train.join import join
        from gptjax.train.parting import parting

        join(os.environ)
        with parting():
            return self._train(given)

    def _train(self, given: Config | None) -> int:
        from gptjax.stages.launch import Resumed, train
        from gptjax.train.processes import first, warn
        from gptjax.train.run import going_on, open_run

        folder = self.resume
        if self.resume == AUTO:  # the first decides: once a run has begun, a process that starts late sees its folder
            folder = first(lambda: self._there(given)) if self.distributed else self._there(given)
        if not folder:
            assert given
            if self.dry_run:
                return self._rehearse(given, None)
            return train(given, None, named=self.resume == AUTO, overwrite=self.overwrite)
        path, saved = open_run(folder)
        given = given or validate(override(saved, [*self.overrides]))
        if self.resume != AUTO and given.run not in ("", saved.run):
            raise UserError(f"--run {given.run} with --resume {folder}: a run stays in its folder; leave --run out")
        config, noted = going_on(saved, given, path)
        resumed = Resumed(path, saved, self.new_data)
        if self.dry_run:
            return self._rehearse(config, resumed)
        for change in noted:
            warn(f"{change} ({change.allowed.value if change.allowed else ''})")
        return train(config, resumed)

    def _there(self, given: Config | None) -> str:
        """The run that `auto` goes on with; empty where there is none yet."""
        if given is None:
            raise UserError("--resume auto: name the config to start with where there is no run yet")
        from gptjax.train.run import CONFIG, base_folder

        base = base_folder(given)
        return str(base) if (base / CONFIG).is_file() else ""

    def given(self) -> Config:
        """The config of a file, or one that fine-tunes a Hugging Face directory."""
        words = [*self.overrides]
        if not Path(self.config).is_dir():
            return load_config(self.config, words)
        from gptjax.convert.huggingface import finetune_config, is_huggingface

        if not is_huggingface(Path(self.config)):
            raise UserError(
                f"train {self.config}: a folder, but without the config.json of a Hugging Face model; to go on with a "
                f"run: gptjax train --resume {self.config}"
            )
        return validate(override(finetune_config(Path(self.config)), words))

    def _rehearse(self, config: Config, resumed: object) -> int:
        from gptjax.planner.dry_run import rehearse

        return rehearse(config, resumed, self.topology, self.slices, self.overwrite)  # type: ignore[arg-type]
