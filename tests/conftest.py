"""Eight virtual CPU devices for every test; set before JAX starts."""

import os
import tempfile

from devices import FAST

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {FAST}"
os.environ["JAX_PLATFORMS"] = "cpu"
# Two workers may describe a TPU's topology at once; the first alone would be let in. And no host is asked what it is.
os.environ |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}
os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"  # else the command line starts its process once more

# Every worker and every process that a test starts: what one has compiled the others read. A folder of the tests' own,
# which goes with them where they made it: a user's cache is neither read nor removed.
os.environ["GPTJAX_TESTS_GIVEN"] = os.environ.get("GPTJAX_TESTS_XLA", "")
os.environ["GPTJAX_TESTS_XLA"] = os.environ.get("GPTJAX_TESTS_XLA") or tempfile.mkdtemp()
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["GPTJAX_TESTS_XLA"]
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import gc
import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

from gptjax.config import (
    Config,
    DataConfig,
    DialogueConfig,
    LoRAConfig,
    ModelConfig,
    OptimizerConfig,
    SFTConfig,
    TrainConfig,
    to_json,
)

if TYPE_CHECKING:
    from served import Served

gc.set_threshold(400_000, 20, 20)  # as the command line does: 5% of tracing was to look at what stays

settings.register_profile("compiling", deadline=None)  # a first example may compile for seconds
settings.load_profile("compiling")

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real text, where there is one."""
    if not SHARED.is_dir():
        pytest.skip(f"no {SHARED.parent.name}/{SHARED.name} folder beside the clone")
    return SHARED


@pytest.fixture(scope="session")
def torch() -> Any:
    return pytest.importorskip("torch", reason="needs the peers extra")


@pytest.fixture(scope="session")
def transformers() -> Any:
    return pytest.importorskip("transformers", reason="needs the peers extra")


@pytest.fixture(scope="module")
def one_torch_thread() -> Iterator[None]:
    """More of PyTorch's only wait for each other in models of a test's size, and for what computes beside it."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 short documents of made-up words: text with enough structure to be learned."""
    rng = random.Random(0)
    words = ["".join(rng.choices("aeioubcdfglmnrst", k=rng.randint(2, 7))) for _ in range(60)]
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(60):
        (folder / f"{i:02d}.txt").write_text(" ".join(rng.choices(words, k=rng.randint(40, 200))) + "\n")
    return folder


@pytest.fixture(scope="session")
def tiny(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The smallest run that has everything: both attention kinds, accumulation, a ramp, two lanes."""
    tokens = 8 * 16
    return Config(
        name="tiny",
        model=ModelConfig(
            num_layers=4,
            num_heads=8,
            embed_dim=32,
            seq_len=16,
            vocab_size=261,
            attention_pattern=("dense", "banded"),
            window=4,
        ),
        data=DataConfig(
            source=str(corpus / "*.txt"),
            cache_dir=str(tmp_path_factory.mktemp("cache")),
            train_split="train[:90%]",
            eval_split="train[90%:]",
            lanes=2,
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_tokens=4 * tokens, decay_tokens=40 * tokens),
        train=TrainConfig(
            batch_size=16,
            micro_batch_size=8,
            ramp_start=8,
            ramp_tokens=10 * tokens,
            total_tokens=60 * tokens,
            log_interval=5,
            eval_interval=0,
            eval_batches=2,
            save_interval=10,
            tensorboard=False,
            compile_cache=os.environ["JAX_COMPILATION_CACHE_DIR"],
        ),
    )


@pytest.fixture(scope="session")
def plain(tiny: Config) -> Config:
    """The same with one dense layer, for what stands around a model: two thirds of the compilation."""
    return replace(tiny, name="plain", model=replace(tiny.model, num_layers=1, attention_pattern=("dense",)))


@pytest.fixture(scope="session")
def tuned(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> SFTConfig:
    """The smallest fine-tuning, of all parameters, that ends after two epochs of 40 conversations."""
    path = tmp_path_factory.mktemp("dialogues") / "sums.jsonl"
    sums = [(a, b) for a in range(5) for b in range(8)]
    path.write_text("".join(json.dumps({"prompt": f"{a}+{b}", "response": str(a + b)}) + "\n" for a, b in sums))
    data = DialogueConfig(source=str(path), tokenizer="bytes", cache_dir=tiny.data.cache_dir)
    model = replace(tiny.model, vocab_size=265, num_layers=2, attention_pattern=("banded",))  # with the chat tokens
    train = replace(tiny.train, ramp_start=0, ramp_tokens=0, total_tokens=10**9, epochs=2.0)
    return SFTConfig(name="tuned", model=model, data=data, optimizer=tiny.optimizer, train=train)


@pytest.fixture(scope="session")
def adapted(tuned: SFTConfig) -> SFTConfig:
    """The same by adapters, of a base that is not there: only a run asks for it."""
    return replace(tuned, init_from="base", lora=LoRAConfig(rank=2))


@pytest.fixture(scope="session")
def small_run(tuned: SFTConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small model that chats."""
    from served import write_run

    return write_run(tmp_path_factory.mktemp("served"), tuned)


@pytest.fixture(scope="session")
def served(small_run: Path) -> Iterator["Served"]:
    """A server of it, in a process of its own."""
    pytest.importorskip("uvicorn", reason="needs the serve extra")
    from served import QUEUE, serving

    with serving(small_run, "--max-queue", str(QUEUE)) as found:
        yield found


@pytest.fixture
def file(plain: Config, tmp_path: Path) -> str:
    """The plain config as a user's file."""
    return as_file(plain, tmp_path)


@pytest.fixture
def tuned_file(tuned: SFTConfig, tmp_path: Path) -> str:
    return as_file(tuned, tmp_path)


def as_file(config: Config, folder: Path) -> str:
    path = folder / f"{config.name}.py"
    text = f"from gptjax.config import from_json\n\n\ndef config():\n    return from_json({to_json(config)!r})\n"
    path.write_text(text)
    return str(path)


@pytest.fixture
def table_row(record_property: Callable[[str, object], None]) -> Callable[[str, str], None]:
    """Prints a line under a title in the summary at the end, also from a worker process."""
    return lambda title, line: record_property("table_row", [title, line])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Workers begin with halves of the tests as they are listed, and take from each other at the end: what the tests of
    a file share is made by one of them alone, not by both."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--whole", action="store_true", help="every cell of tables and every walk, every config compiled")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "whole: what other cases show by default; `--whole` runs it, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--whole"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("whole")])
        items[:] = [item for item in items if not item.get_closest_marker("whole")]


def pytest_unconfigure(config: pytest.Config) -> None:
    if not os.environ["GPTJAX_TESTS_GIVEN"]:  # not a worker's
        shutil.rmtree(os.environ["GPTJAX_TESTS_XLA"], ignore_errors=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = terminalreporter.stats.get("passed", []) + terminalreporter.stats.get("failed", [])
    rows = sorted(row for report in reports for name, row in report.user_properties if name == "table_row")
    for title, lines in groupby(rows, key=itemgetter(0)):
        terminalreporter.section(title)
        for _, line in lines:
            terminalreporter.line(line)
