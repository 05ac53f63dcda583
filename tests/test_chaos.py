"""Thirty faults over one run of several processes that nobody watches: it ends where it would have, to the bit."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import chaos
import numpy as np
import pytest
from conftest import as_file

from gptjax.config import Config
from gptjax.train.checkpoint import FOLDER, position_of, read_meta, saved_steps
from gptjax.train.examine import _parts
from gptjax.train.falls import EVENTS, interruptions
from gptjax.train.metrics import LOG, read_log
from gptjax.train.report import report

SMALL = 'mount -t tmpfs -o size=24m none "$0" && "$@"; code=$?; cp -r "$0/." "$0-copy"; exit $code'
FAULTS = 36


def played(config: str, folder: Path, faults: int) -> Path:
    """The run folder of a run with so many faults, on a small disk of its own where this machine gives one."""
    disk = folder / "disk"
    disk.mkdir(parents=True)
    small = ["unshare", "--mount", "bash", "-c", SMALL, str(disk)]
    mounts = subprocess.run([*small, "true"], capture_output=True).returncode == 0
    words = [sys.executable, chaos.__file__, config, str(disk), "--faults", str(faults)]
    done = subprocess.run([*(small if mounts else []), *words], capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    return Path(f"{disk}-copy" if mounts else disk) / "run"


def end(run: Path) -> tuple[Any, dict[str, Any]]:
    """Position and arrays of the last checkpoint."""
    folder = (run / FOLDER / str(saved_steps(run / FOLDER)[0])).absolute()
    meta, arrays = read_meta(folder), {}
    for name, (shape, *_) in meta["arrays"].items():
        arrays[name] = [(begin, part) for begin, part in _parts(folder / "state", name, shape, "zarr")]
    return position_of(meta), arrays


def losses(run: Path) -> dict[tuple[str, int], float]:
    """The last record of each step."""
    return {(r["kind"], r["step"]): r["loss"] for r in read_log(run / LOG) if r["kind"] in ("train", "eval")}


@pytest.mark.whole  # fourteen starts of two processes and more
def test_a_run_that_falls_again_and_again_ends_where_it_would_have(tiny: Config, tmp_path: Path) -> None:
    model = replace(tiny.model, num_layers=1, attention_pattern=("dense",))
    config = as_file(replace(tiny, model=model), tmp_path)
    runs = [played(config, tmp_path / name, faults) for name, faults in (("plain", 0), ("disturbed", FAULTS))]
    (position, arrays), (also, others) = map(end, runs)
    assert position == also and position.step == chaos.STEPS and arrays.keys() == others.keys()
    for name, parts in arrays.items():
        for (begin, part), (there, other) in zip(parts, others[name], strict=True):
            assert begin == there and part.tobytes() == other.tobytes(), name
    assert any(np.any(part) for _, part in arrays["params/embedding"])
    curves = [losses(run) for run in runs]
    assert curves[0] == curves[1] and len(curves[0]) >= chaos.STEPS

    falls = interruptions(read_log(runs[1] / EVENTS))
    assert len(falls) >= FAULTS // 4  # those that come together are one interruption
    assert all("seconds_lost" in fall for fall in falls)
    page = Path(report(str(runs[1])).splitlines()[-1]).read_text()
    assert all(fall["time"] in page for fall in falls)
