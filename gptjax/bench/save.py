"""`gptjax bench save CONFIG`: what checkpoints cost a run, in time of its steps and in memory of its host.

So many steps without a save and as many with one before the first of them take turns, so that a machine which becomes
slower is slower for both. The write behind the steps is waited for within its turn: in a run the next save would wait
for it. Only where Linux counts is memory known.
"""

import re
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import jax

from gptjax.bench.measure import provenance, save
from gptjax.bench.work import WARMUP, Work
from gptjax.config import Config
from gptjax.stages.launch import prepare
from gptjax.terminal import size_words
from gptjax.train.checkpoint import Checkpoints, Position, sizes
from gptjax.train.fingerprint import fingerprint
from gptjax.train.step import init_state

STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
Row = dict[str, Any]


def run(config: Config, interval: int, rounds: int, folder: Path) -> str:
    """Measure so many turns of `interval` steps each, write save.json, and give the table."""
    prepare(config)
    result = provenance() | {"config": config.name, "interval": interval} | measured(config, interval, rounds, folder)
    save(result, folder / "save.json")
    return table(result)


def measured(config: Config, interval: int, rounds: int, folder: Path) -> Row:
    """The turns with a save, the seconds of those without, and bytes; checkpoints lie in `folder` meanwhile."""
    work = Work.prepare(config, jax.devices())
    state: Any = init_state(config, work.stage, work.shardings)
    step = work.compile(state, {})
    size, held = sizes(state.kept)

    def steps(count: int) -> None:
        nonlocal state
        state, _, _ = work.timed(step, state, [work.random_rows] * count)

    counted = _forget_peak()
    steps(WARMUP)
    bare = _peak() if counted else None
    folder.mkdir(parents=True, exist_ok=True)
    plain, rows = [], []
    with TemporaryDirectory(dir=folder) as run:
        checkpoints = Checkpoints(Path(run), config)
        checkpoints.save(state.kept, Position())  # the first makes programs and folders
        checkpoints.wait()
        for turn in range(1, rounds + 1):
            started = time.perf_counter()
            steps(interval)
            plain.append(time.perf_counter() - started)
            started = time.perf_counter()
            checkpoints.save(state.kept, Position(turn * interval))
            blocked = time.perf_counter()
            steps(interval)
            stepped = time.perf_counter()
            checkpoints.wait()
            ended = time.perf_counter()
            rows.append({"seconds": ended - started, "blocked_s": blocked - started, "waited_s": ended - stepped})
        most, started = _peak(), time.perf_counter()
        fingerprint(state.kept)
        print_s = time.perf_counter() - started
        checkpoints.close()
    cost = median(row["seconds"] for row in rows) / median(plain) - 1
    return {
        "plain_s": plain,
        "rows": rows,
        "step_s": median(plain) / interval,
        "cost": cost,
        "fingerprint_s": print_s,
        "state_bytes": size,
        "local_bytes": held,
        "more_bytes": None if bare is None or most is None else most - bare,
    }


def _forget_peak() -> bool:
    """Whether the peak is what is held now."""
    try:
        FORGET.write_text("5")
    except OSError:
        return False
    return True


def _peak() -> int | None:
    """The most bytes that this process has held since then; None where the system does not say."""
    found = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text()) if STATUS.exists() else None
    return 1024 * int(found[1]) if found else None


def table(result: Row) -> str:
    """What is printed."""
    interval = result["interval"]
    lines = [f"turn  {interval} steps  with a save  of it blocked  waited at the end"]
    for turn, (plain, row) in enumerate(zip(result["plain_s"], result["rows"], strict=True), 1):
        lines.append(
            f"{turn:4} {plain:7.2f} s {row['seconds']:10.2f} s {row['blocked_s']:11.2f} s {row['waited_s']:15.2f} s"
        )
    local, more = result["local_bytes"], result["more_bytes"]
    memory = "not counted here" if more is None else f"{size_words(more)}, {more / local:.2f} times that"
    return "\n".join(
        [
            *lines,
            f"a save every {interval} steps costs {result['cost']:+.1%} at {result['step_s']:.2f} s a step; "
            f"{result['fingerprint_s']:.2f} s of it are the fingerprint",
            f"state {size_words(result['state_bytes'])}, of which here {size_words(local)}; "
            f"more memory at the peak with saves than without: {memory}",
        ]
    )
