"""`gptjax plan`: price every layout, compile the best ones with the real compiler, rank them, and say why."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from gptjax.config import Config
from gptjax.errors import UserError
from gptjax.planner.check import replicated, unexpected
from gptjax.planner.chips import Chip, Topology
from gptjax.planner.compile import Compiled, available, compile_all
from gptjax.planner.cost import times
from gptjax.planner.memory import arrays_at_peak
from gptjax.planner.search import PIECES, Candidate, Search, finalists, fits, priced, search, smaller
from gptjax.planner.spread import Spread, spread
from gptjax.planner.traffic import Transfer, billed
from gptjax.train.schedule import known_tokens

MARGIN = f"less room than the {PIECES - 1:.0%} of its peak that compilers set aside"
EXTRAS = {"tpu": "tpu", "gpu": "cuda-aot"}
"""What to install for a platform's compiler."""


@dataclass(frozen=True)
class Settings:
    """How much to look at."""

    count: int
    """Layouts to compile."""
    timeout: float
    """Seconds for one compile."""
    processes: int
    analytic: bool
    """No compiler, formulas alone."""
    out: Path
    cache: Path = Path("~/.cache/gptjax/plan")


@dataclass(frozen=True)
class Row:
    """A layout with what is known of it."""

    candidate: Candidate
    compiled: Compiled | None = None

    @property
    def chip(self) -> Chip:
        return self.candidate.place.topology.chip

    @property
    def transfers(self) -> tuple[Transfer, ...]:
        """Of the compiled program, or by formula."""
        if self.compiled is None or self.compiled.error:
            return self.candidate.estimate.transfers
        return tuple(billed(self.candidate.place, self.compiled.collectives))

    @property
    def seconds(self) -> dict[str, float]:
        """Parts of a step; the network's as compiled."""
        return times(self.candidate.place, self.transfers)

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def spread(self) -> Spread:
        """How far off the times of such rows have been."""
        return spread(self.candidate.place.topology, self.candidate.config.model.fp8)

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.candidate.config.step_tokens

    @property
    def tokens_per_device(self) -> float:
        """A second."""
        return self.tokens / self.step_seconds / self.candidate.place.topology.num_devices

    @property
    def mfu(self) -> float:
        """Model FLOPs over the bfloat16 peak; recomputation does not count."""
        return self.tokens_per_device * self.candidate.place.stage.flops_per_token / self.chip.flops

    @property
    def length(self) -> int | None:
        """Tokens of the whole training; None where it ends after epochs, of which a plan does not know the size."""
        config = self.candidate.config
        return None if config.train.epochs else known_tokens(config)

    @property
    def days(self) -> float | None:
        """To the end of training, at the full batch; None as for `length`."""
        return None if self.length is None else self.length / self.tokens * self.step_seconds / 86400

    @property
    def dollars(self) -> float | None:
        """For those days; None where they are, or the price is, not known."""
        hours = self.chip.price * self.candidate.place.topology.chips * 24
        return hours * self.days if hours and self.days is not None else None

    @property
    def peak(self) -> float:
        """Bytes per device, by the compiler where it was asked."""
        return self.compiled.peak if self.compiled and self.compiled.peak else self.candidate.estimate.peak

    @property
    def fits(self) -> bool:
        if self.compiled is None:
            return fits(self.candidate.estimate, self.chip)
        return self.compiled.allocated <= self.chip.hbm and not self.compiled.error

    @property
    def surprises(self) -> list[str]:
        """What neither rules nor formulas ask for."""
        collectives = self.compiled.collectives if self.compiled else ()
        return replicated(self.candidate.place) + unexpected(self.candidate.place, collectives)

    @property
    def status(self) -> str:
        """What is known, in a word or a line."""
        if self.compiled is None:
            return "by formula" if self.fits else f"by formula; {MARGIN}"
        if not self.compiled.error and self.fits:
            return "compiled"
        if self.compiled.allocated > self.chip.hbm:
            over = (self.compiled.allocated - self.chip.hbm) / 1e9
            return f"needs {over:.1f} GB more than there is; most goes to {blame(self.candidate)}"
        return self.compiled.error


@dataclass(frozen=True)
class Plan:
    """A finished plan."""

    config: Config
    topology: Topology
    found: Search
    rows: tuple[Row, ...]
    """Ranked: those that fit by step time, then the rest."""
    compiler: str
    """Which compiler was asked, or why none."""

    @property
    def tight(self) -> str:
        """Said where every layout is short of the margin alone; else empty."""
        if self.found.fitting:
            return ""
        return f"every layout has {MARGIN}; of those whose peak there is room for, the least crowded were tried"

    @property
    def trust(self) -> str:
        """What the intervals of its figures are, and what the ranking comes from."""
        found = self.rows[0].spread
        text = f"intervals: {found.low:.2f} to {found.high:.2f} times the predicted step, {found.reason}"
        if self.compiler.startswith("none"):
            text += "\nranking: by formulas, which may rank otherwise than the compiled programs would"
        return text

    @property
    def endless(self) -> str:
        """Why no row says for how many days it trains; empty where they do."""
        epochs = self.config.train.epochs
        return f"unknown: training ends after {epochs:g} epochs of a text that a plan does not read" if epochs else ""


def blame(candidate: Candidate) -> str:
    """The largest array at the highest moment."""
    _, what, size = max(arrays_at_peak(candidate.place), key=lambda item: item[2])
    return f"{what} ({size / 1e9:.1f} GB)"


def plan(
    config: Config,
    topology: Topology,
    settings: Settings,
    console: Console,
    note: Callable[["Plan"], None] = lambda made: None,
) -> Plan:
    """Search, compile, rank; `note` gets what is known after each compile. Raises UserError where no layout divides, or
    none fits."""
    with console.status("pricing layouts"):
        found = search(config, topology)
    possible = found.fitting or [c for c in found.crowded if c.estimate.peak <= topology.chip.hbm]
    if not possible:
        raise UserError(_nothing_fits(config, topology, found))
    chosen = finalists(possible, settings.count)
    own = own_layout(config, topology)
    if own and own.name not in {c.name for c in chosen}:
        chosen.append(own)
    compiler = asked(topology, settings)
    results: dict[str, Compiled] = {}

    def ranked() -> Plan:
        rows = [Row(c, results.get(c.name)) for c in chosen]
        rows.sort(key=lambda row: (not row.fits, row.step_seconds))
        return Plan(config, topology, found, tuple(rows), compiler)

    def compile_each(some: list[Candidate]) -> None:
        for name, result in _compiled(some, topology, settings, console):
            results[name] = result
            note(ranked())

    if not compiler.startswith("none"):
        compile_each(chosen)
        tight = [c for c in chosen if not Row(c, results[c.name]).fits]
        instead = [c for c in (smaller(found, t) for t in tight) if c and c.name not in results]
        chosen += instead
        compile_each(instead)
    return ranked()


def own_layout(config: Config, topology: Topology) -> Candidate | None:
    """The layout that the config itself asks for, if it divides these devices."""
    try:
        return priced(config, topology)
    except UserError:
        return None


def asked(topology: Topology, settings: Settings) -> str:
    """The compiler that will be asked; 'none: ' and the reason otherwise."""
    platform, extra = topology.chip.platform, EXTRAS[topology.chip.platform]
    if settings.analytic:
        return "none: --analytic"
    if not available(platform):
        return f"none: the {platform.upper()} compiler is not installed (pip install -e '.[{extra}]'); formulas alone"
    if platform == "gpu" and topology.family != "h100":
        return f"none: the compiler is described an H100 only, not {topology.chip.name}; formulas alone"
    return f"{platform.upper()} compiler, ahead of time"


def _compiled(
    chosen: list[Candidate], topology: Topology, settings: Settings, console: Console
) -> Iterator[tuple[str, Compiled]]:
    """Each by its name, as it is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    jobs = {c.name: for_compiler(c.config, topology) for c in chosen}
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("compiling", total=len(jobs))
        for name, result in compile_all(
            jobs, topology, settings.cache.expanduser(), settings.timeout, settings.processes
        ):
            progress.update(task, advance=1, description=f"compiled {name}")
            yield name, result


def for_compiler(config: Config, topology: Topology) -> Config:
    """cuDNN is called through a library that only a machine with a GPU has: there blockwise stands in."""
    if topology.chip.platform == "gpu" and config.model.attention == "auto":
        return config.with_models(attention="blockwise")
    return config


def _nothing_fits(config: Config, topology: Topology, found: Search) -> str:
    if not found.crowded:
        most = ", ".join(f"{count} by {why}" for why, count in found.refused.most_common(3))
        return (
            f"--topology {topology.name}: no layout of {config.name} divides {topology.num_devices} devices; of "
            f"{found.refused.total()} are refused {most}; change one of these fields or the number of devices"
        )
    least = found.crowded[0]
    need, have = least.estimate.peak / 1e9, topology.chip.hbm / 1e9
    return (
        f"--topology {topology.name}: no layout of {config.name} fits; the smallest, {least.name}, needs {need:.1f} GB "
        f"of {have:.1f} GB on each device, most of it for {blame(least)}; use more devices"
    )
