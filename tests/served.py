"""What tests of the server share: a small chat model of random weights over bytes, and a process that serves it."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import jax
from devices import environment
from ranked import born

from gptjax.bench.client import Server
from gptjax.config import ModelConfig, SFTConfig
from gptjax.data.tokenizers import load_tokenizer
from gptjax.stages import SFT
from gptjax.train.checkpoint import Checkpoints, Position
from gptjax.train.run import fill_run

T, SLOTS, QUEUE = 192, 4, 8
NAME = "small"
MODEL = ModelConfig(
    num_layers=2,
    num_heads=2,
    embed_dim=32,
    seq_len=T,
    vocab_size=265,
    attention_pattern=("dense", "banded"),
    window=16,
)
ASCII = {str(i): -100 for i in (*range(32), *range(127, 265))}
"""A logit_bias that leaves letters, digits and signs."""


def write_run(folder: Path, tuned: SFTConfig) -> Path:
    """A run of fine-tuning whose model is sure of what it says: weights eight times those of a fresh one."""
    config = replace(tuned, name=NAME, model=MODEL)
    run, stage = folder / NAME, SFT(config, "cpu")
    fill_run(run, config, SFT.fit_tokenizer(config, load_tokenizer("bytes")))
    state = born(config, stage)
    loud = jax.tree.map(lambda leaf: 8 * leaf if leaf.ndim > 1 else leaf, state.params)
    checkpoints = Checkpoints(run, config)
    checkpoints.save(replace(state, params=loud).kept, Position())
    checkpoints.close()
    return run


@dataclass(frozen=True)
class Served(Server):
    """A server's process, and a client of its own for what no library would send."""

    process: subprocess.Popen[str]
    run: Path

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"


@contextmanager
def serving(run: Path, *words: str) -> Iterator[Served]:
    """`gptjax serve RUN`, ready; ended by SIGTERM, upon which it must end well."""
    command = [sys.executable, "-m", "gptjax", "serve", str(run), "--port", "0", "--slots", str(SLOTS), *words]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        line = next((line for line in process.stdout if line.startswith("serving ")), "")
        assert line.startswith(f"serving {NAME} at http://127.0.0.1:"), f"never ready: {line!r}"
        Thread(target=process.stdout.read, daemon=True).start()
        place: Any = urlsplit(line.split()[-1])
        yield Served(place.hostname, place.port, process, run)
        assert process.poll() is None, "it ended by itself"
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
