"""What `gptjax plan` prints and writes."""

import json
from datetime import UTC, datetime
from typing import Any

import jax
from rich.console import Console

from gptjax.config import Config
from gptjax.files import write_whole
from gptjax.planner import chips
from gptjax.planner.compile import versions
from gptjax.planner.explain import diff, explain
from gptjax.planner.plan import Plan, Row, Settings, plan
from gptjax.planner.report import details, flags, headline, page, table

WIDTH = 140  # characters that the table needs; a narrower terminal wraps its lines


def command(
    config: Config, name: str, num_slices: int, settings: Settings, explained: str | None, compared: list[str] | None
) -> int:
    """Run, print, write OUT/CONFIG-TOPOLOGY.json and .html; returns 1 where nothing fits. Raises UserError."""
    jax.config.update("jax_platforms", "cpu")  # a plan computes nothing: leave an accelerator to who does
    topology = chips.topology(name, num_slices)
    console = Console(highlight=False)
    console.width = max(console.width, WIDTH)
    if explained:
        console.out(explain(config, topology, explained))
        return 0
    if compared:
        console.out(diff(config, topology, *compared))
        return 0
    made = plan(config, topology, settings, console)
    console.out(headline(made))
    console.print(table(made))
    console.out(f"\nbest: {details(made.rows[0])}")
    stem = settings.out / f"{config.name}-{name}{f'x{num_slices}' if num_slices > 1 else ''}"
    stem.parent.mkdir(parents=True, exist_ok=True)
    write_whole(stem.with_suffix(".json"), (json.dumps(facts(made), indent=1) + "\n").encode())
    page(made, stem.with_suffix(".html"))
    console.out(f"\n{stem}.json\n{stem}.html")
    return 0 if made.rows[0].fits else 1


def facts(plan: Plan) -> dict[str, Any]:
    """Everything that the plan says, as JSON keeps it; bytes and seconds."""
    return {
        "config": plan.config.name,
        "topology": str(plan.topology),
        "devices": plan.topology.num_devices,
        "hbm": plan.topology.chip.hbm,
        "compiler": plan.compiler,
        "versions": versions(),
        "date": datetime.now(UTC).date().isoformat(),
        "searched": {
            "fitting": len(plan.found.fitting),
            "crowded": len(plan.found.crowded),
            "refused": dict(plan.found.refused),
        },
        "rows": [_row_facts(row) for row in plan.rows],
    }


def _row_facts(row: Row) -> dict[str, Any]:
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
        "memory": row.candidate.estimate.memory,
        "analytic_peak": row.candidate.estimate.peak,
        "compiler_peak": compiled.peak if compiled else None,
        "compile_seconds": compiled.seconds if compiled else None,
        "flags": flags(row.candidate.config),
        "surprises": row.surprises,
        "transfers": [vars(t) for t in row.transfers],
    }
