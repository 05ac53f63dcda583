"""`tests/gpu/all.sh`: what it would run, and that it goes on. Its Python is a stub that records what it is asked."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from gptjax import cli

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tests" / "gpu" / "all.sh"
STUB = """#!{python}
import json, os, sys
if sys.argv[1] in ("-c", "-"):  # the script's own lines, not what it measures
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
with open({log!r}, "a") as file:
    file.write(json.dumps(sys.argv[1:]) + chr(10))
print("done")
sys.exit(3 if "attention" in sys.argv else 0)
"""


def listed() -> dict[str, int]:
    lines = subprocess.run([SCRIPT, "--list"], capture_output=True, text=True, check=True).stdout.splitlines()
    return {part: int(minutes) for part, minutes in (line.split() for line in lines)}


def test_parts_fit_into_the_time() -> None:
    assert sum(listed().values()) <= 60
    assert max(listed().values()) < 10


def test_it_goes_on_and_asks_for_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that fails is reported and stops nothing; every command is one that the command line takes."""
    python, log, data, out = (tmp_path / name for name in ("python", "log", "data", "out"))
    python.write_text(STUB.format(python=sys.executable, log=str(log)))
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    data.mkdir()
    environment = os.environ | {"PYTHON": str(python), "PYTHONPATH": str(ROOT)}
    command = [SCRIPT, "--out", out, "--data", data]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    results = {part: json.loads((out / part / "result.json").read_text()) for part in listed()}
    assert {part for part, result in results.items() if result["status"] != "ok"} == {"attention"}
    assert results["attention"]["status"] == "failed"
    assert all({"device", "versions", "date", "seconds"} <= result.keys() for result in results.values())
    assert all(part in done.stdout for part in results)

    taken = []
    monkeypatch.setattr("gptjax.bench.single.run", lambda configs, *_: taken.append(configs) or "")
    monkeypatch.setattr("gptjax.bench.layouts.run", lambda *_: taken.append("layouts") or ("", False))
    monkeypatch.setattr("gptjax.bench.attention.run", lambda *_: taken.append("attention") or "")
    monkeypatch.setattr("gptjax.bench.generate.run", lambda *_: taken.append("generate") or "")
    monkeypatch.setattr("gptjax.stages.launch.train", lambda *_, **__: taken.append("train") or 0)
    monkeypatch.chdir(ROOT)
    asked = [json.loads(line) for line in log.read_text().splitlines()]
    ours = [arguments[2:] for arguments in asked if arguments[:2] == ["-m", "gptjax"]]
    assert len(ours) == len(asked) - 2  # the others are scripts beside it
    assert all(cli.run(arguments) == 0 for arguments in ours)
    assert len(taken) == len(ours) >= len(results) - 2


def test_a_wrong_name_runs_nothing(tmp_path: Path) -> None:
    done = subprocess.run([SCRIPT, "--out", tmp_path / "out", "gpt5"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: gpt5: no such part; see --list\n")
    assert not (tmp_path / "out").exists()
