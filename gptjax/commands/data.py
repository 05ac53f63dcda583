"""`gptjax data CONFIG` and `gptjax data --cache`."""

import time
from typing import Annotated

from pydantic import Field

from gptjax.commands.arguments import Overrides, Positional
from gptjax.config import Config, DataConfig, DialogueConfig, RankedConfig, RewardedConfig, SFTConfig
from gptjax.config.fields import Positive, frozen
from gptjax.config.load import load_config
from gptjax.errors import UserError
from gptjax.terminal import Progress


@frozen
class Command:
    """Build the data set of a config now, and show what it holds and what a run would learn from it; or look after
    those that were built."""

    config: Annotated[str, Positional("CONFIG")] = ""
    """A file of configs/; left out with --cache."""
    examples: Positive = 1
    """Conversations or rankings to show."""
    cache: bool = False
    """List what was built from local files, in data.cache_dir."""
    remove: str = ""
    """With --cache: the name of one to remove."""
    cache_dir: str = DataConfig.cache_dir
    """With --cache: where to look."""
    prune: Annotated[int, Field(ge=-1)] = -1
    """With --cache: remove what was not used for so many days, and what is damaged or was never finished; -1 is off."""
    overrides: Overrides = ()

    def run(self) -> None:
        """Print records, digest and the first text of each split, after building what is not built yet, of
        conversations and rankings also what is learned and what was left out; or the cache."""
        if self.cache:
            self._cache()
        elif not self.config:
            raise UserError("gptjax data: CONFIG is missing: a file of configs/, or --cache")
        elif self.remove or self.prune >= 0:
            raise UserError("gptjax data: --remove and --prune go with --cache")
        else:
            self._build(load_config(self.config, [*self.overrides]))

    def _build(self, config: Config) -> None:
        from gptjax.data.sources import dropped
        from gptjax.data.texts import Mixture, build, left_out

        data = config.data
        with Progress() as progress:
            corpus = build(data, progress)
        if note := left_out(data):
            print(f"{data.source}: {note}")
        if isinstance(config, SFTConfig):
            from gptjax.stages.view import show

            show(config, corpus, self.examples)
        elif isinstance(config, RankedConfig):
            from gptjax.stages.view import show_rankings

            show_rankings(config, corpus, self.examples)
        elif isinstance(config, RewardedConfig):
            from gptjax.stages.view import show_prompts

            show_prompts(config, corpus, self.examples)
        else:
            for name in (data.train_split, data.eval_split):
                split = corpus.split(name, data.split_by)
                print(f"{corpus.name} {name}: {len(split):,} records; the first begins {split[0].text[:60]!r}")
                if isinstance(data, DialogueConfig):
                    for reason, number in dropped(split).most_common():
                        print(f"  {number:,} left out: {reason}")
        if isinstance(corpus, Mixture):
            for label, weight, part in zip(corpus.labels, corpus.weights, corpus.texts, strict=True):
                print(f"{label}, {weight:.2%} of the tokens: digest {part.digest}, in {part.place}")
            print(f"digest {corpus.digest}, of all and their weights")
        else:
            print(f"digest {corpus.digest}, in {corpus.place}")

    def _cache(self) -> None:
        from gptjax.data import cache

        where = cache.datasets(self.cache_dir)
        if self.remove:
            known = {entry.folder.name: entry.folder for entry in cache.entries(self.cache_dir)}
            if self.remove not in known:
                raise UserError(f"--remove {self.remove}: not in {where}; see gptjax data --cache")
            cache.remove(known[self.remove])
        removed = cache.prune(self.cache_dir, self.prune) if self.prune >= 0 else []
        for entry in removed:
            print(f"removed {entry.folder.name}, {entry.size_bytes / 1e6:,.1f} MB, {entry.state}")
        for entry in cache.entries(self.cache_dir):
            days = (time.time() - entry.used) / cache.DAY
            print(
                f"{entry.size_bytes / 1e6:10,.1f} MB  {entry.state:10}  used {days:5.1f} days ago  {entry.folder.name}"
            )
        print(f"in {where}")
