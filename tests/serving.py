"""A server in a thread, on models so small that they are compiled in seconds."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import httpx
import jax
from flax import linen as nn

from gptjax import api
from gptjax.config import Config, DataConfig, DialogueConfig, ModelConfig, OptimizerConfig, SFTConfig, TrainConfig
from gptjax.data.chat import with_chat
from gptjax.data.tokenizers import load_tokenizer
from gptjax.serve.options import Options
from gptjax.serve.routes import Served
from gptjax.serve.server import made
from gptjax.stages import SFT, Pretrain

CONTEXT = 96
MODEL = ModelConfig(
    num_layers=2,
    num_heads=4,
    embed_dim=32,
    seq_len=CONTEXT,
    vocab_size=268,
    attention_pattern=("dense", "banded"),
    window=24,
    scan_layers=False,
)
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_tokens=0, decay_tokens=0)
TRAIN = TrainConfig(batch_size=8, total_tokens=1000)


def tuned_model(slots: int = 4) -> api.Model:
    """One that has learned conversations, of bytes; by its looks at random."""
    data = DialogueConfig(source="none", tokenizer="bytes")
    config = SFTConfig(name="tuned", model=MODEL, data=data, optimizer=OPTIMIZER, train=TRAIN)
    tokenizer = SFT.fit_tokenizer(config, with_chat(load_tokenizer("bytes")))
    return _model("tuned", SFT(config, "cpu", tokenizer=tokenizer), slots)


def filling_model(slots: int = 2) -> api.Model:
    """A base model that has learned to fill in."""
    data = DataConfig(source="none", tokenizer="bytes", fim_rate=0.5)
    config = Config(name="filling", model=MODEL, data=data, optimizer=OPTIMIZER, train=TRAIN)
    tokenizer = Pretrain.fit_tokenizer(config, load_tokenizer("bytes"))
    return _model("filling", Pretrain(config, "cpu", tokenizer=tokenizer), slots)


def _model(name: str, stage: Any, slots: int) -> api.Model:
    """Weights so large that what it says depends on what was said."""
    params = jax.tree.map(lambda x: 6 * x if x.ndim > 1 else x, nn.unbox(stage.init(jax.random.key(1))))
    return api.Model(name, stage, params, slots)


@dataclass
class Running:
    """A server, and a client of it."""

    url: str
    client: httpx.Client
    served: Served
    on_loop: Callable[[Callable[[], Any]], None]

    def post(self, path: str, status: int = 200, **body: Any) -> Any:
        """The answer's JSON, which must come with this status."""
        answer = self.client.post(path, json=body)
        assert answer.status_code == status, (answer.status_code, answer.text)
        return answer.json()

    def events(self, path: str, **body: Any) -> list[Any]:
        """What a stream said, without its [DONE], which must be there."""
        with self.client.stream("POST", path, json=body | {"stream": True}) as answer:
            assert answer.status_code == 200, answer.read()
            assert answer.headers["content-type"].startswith("text/event-stream")
            return events("".join(answer.iter_text()))

    def metric(self, name: str, **labels: str) -> float:
        """A number of /metrics."""
        value = self.served.metrics.registry.get_sample_value(f"gptjax_{name}", labels)
        assert value is not None, name
        return value

    def idle(self) -> None:
        """Waits until nothing is under way; fails after a while."""
        worker = self.served.worker
        until(lambda: not (worker.open or worker.used or worker.waiting or worker.streams))


def events(text: str) -> list[Any]:
    """The JSON of server-sent events up to [DONE]."""
    import json

    parts = text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""], parts[-3:]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def until(true: Callable[[], bool], seconds: float = 30) -> None:
    """Waits for something."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "has not come true"
        time.sleep(0.01)


@contextmanager
def serving(model: api.Model, **options: Any) -> Iterator[Running]:
    """A server with these options, ready; in the end all of its connections are closed. One at a time may work on a
    model."""
    server = made(model, replace(Options(port=0), **options))
    loops: list[asyncio.AbstractEventLoop] = []

    async def run() -> None:
        loops.append(asyncio.get_running_loop())
        await server.serve(sockets=[server.listener])

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    try:
        until(lambda: server.served.warm or server.served.failure is not None or not thread.is_alive(), 300)
        assert server.served.warm, server.served.failure
        url = f"http://127.0.0.1:{server.listener.getsockname()[1]}"
        with httpx.Client(base_url=url, timeout=60) as client:
            yield Running(url, client, server.served, lambda work: loops[0].call_soon_threadsafe(work))
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def raw(url: str) -> socket.socket:
    """A connection without a client library."""
    host, _, port = url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=30)
