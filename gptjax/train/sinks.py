"""Who else is told what the log says: TensorBoard's files, a page for Prometheus, Weights & Biases."""

import math
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from gptjax.config import Config
from gptjax.errors import UserError

Record = dict[str, Any]
"""kind, step, time (ISO, UTC) and values; of all that happens after a step also its tokens, and the seconds of training
over all starts; `took`, the seconds of what is no training; `cost`, seconds that went before a start or a rollback."""
BEGINS = ("start", "rollback")
"""Kinds of records that stay when a run goes back to before them."""


class Sink(Protocol):
    """Gets every record once."""

    def add(self, record: Record) -> None: ...

    def close(self) -> None: ...


Opener = Callable[[Iterable[Record]], Sink]
"""Opens one that is told the records which a run that goes on has already."""


def sinks(config: Config, run: Path, name: Callable[[], str]) -> list[Opener]:
    """Those that a config asks for; `name` gives one that no other run has."""
    train, found = config.train, list[Opener]()
    if train.tensorboard:
        found.append(partial(TensorBoard, run / "tensorboard"))
    if train.prometheus:
        found.append(partial(Prometheus, train.prometheus))
    if train.wandb:
        found.append(partial(Wandb, train.wandb, config, name))
    return found


def numbers(record: Record) -> Iterator[tuple[str, float]]:
    """kind/name and value of what a record measures; not of what says when."""
    kind = record["kind"]
    for name, value in record.items():
        placed = name in ("step", "took") or (name in ("tokens", "seconds") and kind != "train")
        if kind not in BEGINS and not placed and isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{kind}/{name}", value


class TensorBoard:
    """Its files: the numbers of the log, and nothing that is not in it. A resumed run writes them anew, since a kill
    leaves them with steps that come again, and without the last two minutes."""

    def __init__(self, folder: Path, records: Iterable[Record]):
        from tensorboardX import SummaryWriter  # here: it costs 0.3 s, and not every run wants it

        for file in folder.glob("events.out.tfevents.*"):
            file.unlink()
        self._writer = SummaryWriter(str(folder), purge_step=0)  # a TensorBoard that is open forgets the old files
        for record in records:
            self.add(record)

    def add(self, record: Record) -> None:
        when = datetime.fromisoformat(record["time"]).timestamp()
        for name, value in numbers(record):
            if math.isfinite(value):
                self._writer.add_scalar(name, value, record["step"], walltime=when)

    def close(self) -> None:
        self._writer.close()


class Prometheus:
    """The newest number of each name, as gptjax_train_loss, and the step, at http://ADDRESS/metrics.

    Raises UserError without the package, and for an address that cannot be had.
    """

    def __init__(self, address: str, records: Iterable[Record]):
        try:
            from prometheus_client import CollectorRegistry, start_http_server
        except ModuleNotFoundError:
            raise UserError(
                f"train.prometheus = {address}: prometheus-client is not installed; pip install 'gptjax[serve]'"
            ) from None
        host, _, port = address.rpartition(":")
        self._newest: dict[str, float] = {}
        for record in records:
            self.add(record)
        registry = CollectorRegistry()
        registry.register(self)
        try:
            self._server, self._thread = start_http_server(int(port), host.strip("[]"), registry)
        except OSError as error:
            said = error.strerror or error
            raise UserError(f"train.prometheus = {address}: cannot listen there ({said}); name another") from None

    def add(self, record: Record) -> None:
        self._newest |= {f"gptjax_{name.replace('/', '_')}": value for name, value in numbers(record)}
        self._newest["gptjax_step"] = record["step"]

    def collect(self) -> Iterator[Any]:
        """What is scraped; by the thread of the server."""
        from prometheus_client.core import GaugeMetricFamily

        for name, value in [*self._newest.items()]:
            yield GaugeMetricFamily(name, f"{name.removeprefix('gptjax_')} of the training run's log", value)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Wandb:
    """A run of Weights & Biases, the same over all starts, with the step as its axis: what a run does again after a
    crash is drawn again. Where it sends, and as whom, is for its own variables to say (WANDB_MODE, WANDB_API_KEY, ...).

    Raises UserError without the package, and where it cannot start.
    """

    def __init__(self, project: str, config: Config, name: Callable[[], str], records: Iterable[Record]):
        try:
            import wandb
        except ModuleNotFoundError:
            raise UserError(f"train.wandb = {project}: wandb is not installed; pip install 'gptjax[wandb]'") from None
        from dataclasses import asdict

        try:
            self._run = wandb.init(project=project, id=name(), resume="allow", config=asdict(config))
        except wandb.Error as error:
            said = str(error).splitlines()[0]
            raise UserError(
                f"train.wandb = {project}: wandb cannot start ({said}); WANDB_MODE=offline keeps all on this machine"
            ) from None
        self._run.define_metric("*", step_metric="step")

    def add(self, record: Record) -> None:
        self._run.log({"step": record["step"], **dict(numbers(record))})

    def close(self) -> None:
        self._run.finish()
