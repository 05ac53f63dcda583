"""Programs that are kept for another process: here another engine, whose own have not been traced."""

import threading
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from gptjax.config import ModelConfig
from gptjax.infer import kept
from gptjax.infer.engine import Engine
from gptjax.infer.programs import Programs
from gptjax.infer.request import Request
from gptjax.infer.sampling import Sampling
from gptjax.model.gpt import GPT

MODEL = ModelConfig(
    num_layers=2, num_heads=2, embed_dim=16, seq_len=32, vocab_size=40, attention_pattern=("dense", "banded"), window=8
)
ASKED = [
    Request([1, 2, 3], 6, Sampling(0.0)),
    Request([4, 5], 6, seed=3, tops=2, prompt_logprobs=True),
]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield tmp_path / kept.FOLDER
    jax.config.update("jax_compilation_cache_dir", before)


def engine(config: ModelConfig = MODEL) -> Engine:
    model = GPT(config, jnp.dtype("float32"))
    params = nn.unbox(model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    return Engine(model, params, slots=2, steps=2)


def answers(runner: Engine) -> list[tuple]:
    return [(r.tokens, r.logprobs, r.tops, r.prompt_logprobs, r.prompt_tops) for r in runner.run(ASKED)]


def no_tracing(*arguments: object) -> None:
    raise AssertionError("traced")


@pytest.mark.slow
def test_another_process_traces_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    plain = answers(engine())
    jax.config.update("jax_compilation_cache_dir", before)
    assert answers(engine()) == plain
    files = sorted(folder.iterdir())
    assert files
    with monkeypatch.context() as patch:
        patch.setattr(Programs, "_model", no_tracing)
        assert answers(engine()) == plain
    for path in files:  # as a full disk or a crash may leave them: made again
        path.write_bytes(path.read_bytes()[:100])
    assert answers(engine()) == plain
    assert sorted(folder.iterdir()) == files and all(path.stat().st_size > 100 for path in files)


@pytest.mark.slow
def test_another_model_and_another_code_have_programs_of_their_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Request([1, 2, 3], 2, Sampling(0.0))
    engine().run([one])
    first = set(folder.iterdir())
    engine(ModelConfig(**vars(MODEL) | {"window": 4})).run([one])  # the same shapes but of the cache
    second = set(folder.iterdir()) - first
    monkeypatch.setattr(kept, "code_digest", lambda: "changed")
    engine().run([one])
    assert second and len(set(folder.iterdir()) - first - second) == len(first)


def test_a_cache_that_cannot_be_written_is_none(folder: Path) -> None:
    folder.write_text("a file where the folder should be")
    assert engine().run([Request([1, 2, 3], 2, Sampling(0.0))])[0].reason == "length"


def test_the_program_of_replies_is_read_beside_that_of_prompts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, threads, read = answers(engine()), {}, kept._read

    def told(path: Path, device: jax.Device) -> object:
        assert path not in threads, "read twice"
        threads[path] = threading.current_thread() is threading.main_thread()
        return read(path, device)

    monkeypatch.setattr(kept, "_read", told)
    assert answers(engine()) == plain
    assert list(threads.values()).count(False) == 1 < len(threads)
