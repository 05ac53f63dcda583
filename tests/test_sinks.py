"""Who is told what the log says: Prometheus, scraped over HTTP; Weights & Biases, by a stand-in that keeps what it is
given, for its package is not among the tests'. TensorBoard: test_periodic. Run: pytest tests/test_sinks.py"""

import re
import socket
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.request import urlopen

import pytest
from joined import free_port
from toy import Toy, fit, toy_config

from gptjax.config import Config
from gptjax.errors import UserError
from gptjax.train.metrics import LOG, Reporter, read_log
from gptjax.train.sinks import numbers, sinks

TIME = "2026-01-01T00:00:00+00:00"


def scraped(port: int) -> dict[str, float]:
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {name: float(value) for name, value in re.findall(r"^(gptjax_\w+) (\S+)$", text, re.MULTILINE)}


def test_numbers_are_what_was_measured() -> None:
    record = {"kind": "eval", "step": 3, "time": TIME, "tokens": 9, "took": 1.5, "loss": 2.0, "good": True, "text": "x"}
    assert dict(numbers(record)) == {"eval/loss": 2.0}
    assert dict(numbers(record | {"kind": "train"})) == {"train/loss": 2.0, "train/tokens": 9}
    assert dict(numbers(record | {"kind": "start"})) == {}


def test_prometheus_has_the_newest_of_all_starts(tiny: Config, tmp_path: Path) -> None:
    port = free_port()
    config = replace(tiny, train=replace(tiny.train, prometheus=f"127.0.0.1:{port}"))
    log = tmp_path / LOG
    for resume_at in (None, 1):  # the port is free again after the first
        reporter = Reporter(log, 100, True, resume_at, sinks(config, tmp_path, str))
        if resume_at:
            assert scraped(port) == {"gptjax_step": 1, "gptjax_train_loss": 5.0}
        reporter.record("train", 1, loss=5.0)
        assert scraped(port) == {"gptjax_step": 1, "gptjax_train_loss": 5.0}
        reporter.record("eval", 2, loss=float("nan"))
        found = scraped(port)
        assert found.pop("gptjax_eval_loss") != found["gptjax_step"] == 2
        reporter.close()
    with pytest.raises(OSError):
        scraped(port)


def test_an_address_that_is_taken_is_one_line_and_leaves_nothing_open(tiny: Config, tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        config = replace(tiny, train=replace(tiny.train, prometheus=address, tensorboard=True))
        with pytest.raises(UserError, match=f"train.prometheus = {address}: cannot listen there .*; name another"):
            Reporter(tmp_path / LOG, 1, True, None, sinks(config, tmp_path, str))
    assert not (tmp_path / LOG).exists()


@pytest.mark.parametrize("field", ["prometheus", "wandb"])
def test_a_package_that_is_missing_is_named(
    field: str, tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, {"prometheus": "prometheus_client"}.get(field, field), None)
    config = replace(tiny, train=replace(tiny.train, **{field: "127.0.0.1:9"}))
    with pytest.raises(UserError, match=f"train.{field} = .* is not installed; pip install 'gptjax"):
        Reporter(tmp_path / LOG, 1, True, None, sinks(config, tmp_path, str))


def test_wandb_has_one_run_over_all_starts(tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in: what the package is told, and not what it makes of it."""
    begun: list[dict[str, Any]] = []
    logged: list[dict[str, float]] = []
    ended: list[int] = []

    def init(**about: Any) -> Any:
        begun.append(about)
        return SimpleNamespace(
            define_metric=lambda name, step_metric: None, log=logged.append, finish=lambda: ended.append(1)
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Error=ValueError))
    (tmp_path / "meta.json").write_text("{}")
    config = toy_config(tiny, 4, log_interval=2, wandb="towns")
    assert fit(config, Toy(), tmp_path) == 0
    longer = replace(config, train=replace(config.train, total_tokens=2 * config.train.total_tokens))
    assert fit(longer, Toy(), tmp_path, resume=True) == 0
    assert [about["project"] for about in begun] == ["towns"] * 2 and len(ended) == 2
    assert begun[0]["id"] == begun[1]["id"] and begun[0]["config"]["model"]["num_layers"] == tiny.model.num_layers
    losses = [(r["step"], r["loss"]) for r in read_log(tmp_path / LOG) if r["kind"] == "train"]
    assert [(r["step"], r["train/loss"]) for r in logged if "train/loss" in r] == losses and losses
