"""`gptjax plan CONFIG --topology NAME`: what it prints and writes."""

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field

from gptjax.commands.arguments import Overrides, Positional
from gptjax.config.fields import Positive, frozen
from gptjax.config.load import load_config
from gptjax.files import json_text, write_whole

if TYPE_CHECKING:
    from gptjax.planner.plan import Plan, Row

WIDTH = 160  # characters that the table needs; a narrower terminal wraps its lines


def _two(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(names) not in (0, 2):
        raise ValueError("name two layouts with a comma, such as fsdp64_tp8_seq/full/256,fsdp512/dots/512")
    return names


@frozen
class Command:
    """Which layout for a pod or cluster that is not here: memory, traffic, step time and days, ranked."""

    config: Annotated[str, Positional("CONFIG")]
    """A file of configs/."""
    topology: str
    """v5p-1024, v5e-256, v6e-256, h100-8x64, ..."""
    slices: Positive = 1
    """So many of them (TPU)."""
    price: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Dollars for an hour of a chip: what the training costs is said beside its days."""
    chip_file: Path | None = None
    """Constants of chips in place of the built-in ones: JSON such as {"v5p": {"matmul": 0.72, "price": 4}}, or the
    chip.json that `gptjax bench layouts` writes."""
    compile: Positive = 6
    """Layouts to compile."""
    analytic: bool = False
    """Formulas alone, no compiler."""
    timeout: Annotated[float, Field(gt=0)] = 600.0
    """Seconds for one compile."""
    processes: Positive = 2
    """Compiles at once."""
    out: Path = Path("plan")
    """Folder for JSON and the page."""
    explain: str = ""
    """Show where a parameter or activation lies in the config's layout."""
    diff: Annotated[tuple[str, ...], AfterValidator(_two)] = ()
    """Show two layouts side by side, such as fsdp64_tp8_seq/full/256,fsdp512/dots/512."""
    overrides: Overrides = ()

    def run(self) -> int:
        """Run, print, write OUT/CONFIG-TOPOLOGY.json and .html; returns 1 where nothing fits. Raises UserError."""
        import jax
        from rich.console import Console

        from gptjax.planner import chips
        from gptjax.planner.explain import diff, explain
        from gptjax.planner.plan import Settings, plan
        from gptjax.planner.report import details, headline, page, table

        config = load_config(self.config, [*self.overrides])
        jax.config.update("jax_platforms", "cpu")  # a plan computes nothing: leave an accelerator to who does
        topology = chips.with_constants(chips.topology(self.topology, self.slices), self.chip_file, self.price)
        console = Console(highlight=False)
        console.width = max(console.width, WIDTH)
        if self.explain:
            console.out(explain(config, topology, self.explain))
            return 0
        if self.diff:
            console.out(diff(config, topology, *self.diff))
            return 0
        settings = Settings(self.compile, self.timeout, self.processes, self.analytic, self.out)
        stem = self.out / f"{config.name}-{self.topology}{f'x{self.slices}' if self.slices > 1 else ''}"
        made = plan(config, topology, settings, console, lambda known: _write(known, stem))
        console.out(headline(made))
        console.print(table(made))
        console.out(f"\nbest: {details(made.rows[0])}")
        _write(made, stem)
        page(made, stem.with_suffix(".html"))
        console.out(f"\n{stem}.json\n{stem}.html")
        return 0 if made.rows[0].fits else 1


def _write(plan: "Plan", stem: Path) -> None:
    """What is known so far: a plan that is cut off has its finished rows."""
    write_whole(stem.with_suffix(".json"), (json_text(facts(plan), indent=1) + "\n").encode())


def facts(plan: "Plan") -> dict[str, Any]:
    """Everything that the plan says, as JSON keeps it; bytes and seconds."""
    from gptjax.planner.compile import versions

    return {
        "config": plan.config.name,
        "topology": str(plan.topology),
        "devices": plan.topology.num_devices,
        "hbm": plan.topology.chip.hbm,
        "compiler": plan.compiler,
        "versions": versions(),
        "date": datetime.now(UTC).date().isoformat(),
        "days": plan.endless or "to the end of training, at the full batch",
        "intervals": plan.trust.splitlines(),
        "searched": {
            "fitting": len(plan.found.fitting),
            "crowded": len(plan.found.crowded),
            "refused": dict(plan.found.refused),
        },
        "rows": [_row_facts(row) for row in plan.rows],
    }


def _row_facts(row: "Row") -> dict[str, Any]:
    from gptjax.planner.report import flags

    compiled = row.compiled
    return {
        "name": row.candidate.name,
        "fits": row.fits,
        "status": row.status,
        "step_seconds": row.step_seconds,
        "seconds": row.seconds,
        "mfu": row.mfu,
        "tokens_per_second_per_device": row.tokens_per_device,
        "days": row.days,
        "dollars": row.dollars,
        "interval": {
            "step_seconds": row.spread.seconds(row.step_seconds),
            "tokens_per_second_per_device": row.spread.speed(row.tokens_per_device),
            "mfu": row.spread.speed(row.mfu),
            "days": None if row.days is None else row.spread.seconds(row.days),
            "dollars": None if row.dollars is None else row.spread.seconds(row.dollars),
        },
        "memory": row.candidate.estimate.memory,
        "analytic_peak": row.candidate.estimate.peak,
        "compiler_peak": compiled.peak if compiled else None,
        "compile_seconds": compiled.seconds if compiled else None,
        "flags": flags(row.candidate.config),
        "surprises": row.surprises,
        "transfers": [vars(t) for t in row.transfers],
    }
