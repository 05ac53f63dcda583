"""Schedules, the step's guards, and runs that are killed, damaged and moved between layouts."""

import functools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from devices import environment
from flax import linen as nn

from gptjax import cli
from gptjax.config import Config, LayoutConfig, OptimizerConfig, to_json
from gptjax.config.load import load_config
from gptjax.data.rows import Rows, next_token
from gptjax.malloc import matters as malloc_matters
from gptjax.sharding.mesh import make_mesh
from gptjax.sharding.rules import Layout, leaf_name, rule_table
from gptjax.stages.pretrain import Pretrain
from gptjax.train.checkpoint import FOLDER, Checkpoints, Position
from gptjax.train.fingerprint import fingerprint
from gptjax.train.metrics import read_log
from gptjax.train.schedule import batch_size, learning_rate, steps, total_steps
from gptjax.train.step import (
    ByGradient,
    TrainState,
    abstract_state,
    init_state,
    is_decayed,
    make_optimizer,
    make_step,
    placed,
)

CONFIGS = Path(__file__).parents[1] / "configs"


# Schedules


def test_learning_rate_at_the_papers_points() -> None:
    c = OptimizerConfig(learning_rate=6e-4)
    assert learning_rate(c, 0) == 0
    assert learning_rate(c, 187_500_000) == pytest.approx(3e-4)
    assert learning_rate(c, 375_000_000) == pytest.approx(6e-4)
    assert learning_rate(c, (375_000_000 + 260_000_000_000) // 2) == pytest.approx(3.3e-4)
    assert learning_rate(c, 260_000_000_000) == learning_rate(c, 300_000_000_000) == pytest.approx(6e-5)


@pytest.mark.parametrize(("name", "without_ramp"), [("gpt3_125m", 572_205), ("gpt3_175b", 95_368)])
def test_batch_ramp(name: str, without_ramp: int) -> None:
    c = load_config(str(CONFIGS / f"{name}.py"), [])
    assert batch_size(c, 0) == c.train.ramp_start
    assert batch_size(c, c.train.ramp_tokens) == c.train.batch_size
    sizes = [batch_size(c, t) for t in range(0, c.train.ramp_tokens, c.train.ramp_tokens // 997)]
    assert sizes == sorted(sizes)
    assert all(size % c.micro_batch_size == 0 for size in sizes)
    assert total_steps(replace(c, train=replace(c.train, ramp_start=0))) == without_ramp
    assert total_steps(c) > without_ramp


def test_tokens_are_the_sum_of_batches_from_any_position(tiny: Config) -> None:
    walk = list(steps(tiny, 0, 0))
    assert len(walk) == total_steps(tiny)
    tokens = 0
    for step, before, size in walk:
        assert before == tokens
        assert next(iter(steps(tiny, step, before))) == (step, before, size)
        tokens += size * tiny.model.seq_len
    assert tokens >= tiny.train.total_tokens


# The step


def single_device(config: Config) -> tuple[Pretrain, Layout]:
    layout = Layout(make_mesh(config, jax.devices()[:1]), rule_table(config.layout))
    return Pretrain(config, "cpu", layout), layout


def make(config: Config) -> tuple:
    task, layout, step = stepping(config)
    return task, init_state(config, task, layout.shardings(abstract_state(config, task))), step


@functools.cache
def stepping(config: Config) -> tuple:
    """One compiled step for all tests of a config."""
    task, layout = single_device(config)
    return task, layout, make_step(config, task, layout.shardings(abstract_state(config, task)), layout)


def random_rows(config: Config, seed: int = 0) -> Rows:
    shape = (config.max_accumulation, config.micro_batch_size, config.model.seq_len + 1)
    return next_token(np.random.default_rng(seed).integers(0, 256, shape).astype(np.int32))


def test_step_is_adamw_on_the_mean_gradient(tiny: Config) -> None:
    """Two accumulated micro-batches, clip, AdamW with masked decay: against optax.adamw on the whole batch."""
    task, state, step = make(tiny)
    params, rows, o = jax.device_get(state.params), random_rows(tiny), tiny.optimizer
    new, metrics = step(state, rows, np.float32(1e-3), np.int32(2), np.int32(0))

    def mean_loss(p: dict) -> jax.Array:
        whole = jax.tree.map(lambda leaf: leaf.reshape(16, -1), rows)
        return task.loss(p, whole, task.counts(whole), None)

    loss, grads = jax.jit(jax.value_and_grad(mean_loss))(params)
    adamw = optax.adamw(1e-3, o.b1, o.b2, o.eps, weight_decay=o.weight_decay, mask=is_decayed)
    peer = optax.chain(optax.clip_by_global_norm(o.clip_norm), adamw)
    updates, _ = peer.update(grads, peer.init(params), params)
    want = optax.apply_updates(params, updates)
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-6)
    assert float(metrics["grad_norm"]) == pytest.approx(float(optax.tree.norm(grads)), rel=1e-5)
    # Adam's first step is lr * sign(g): where |g| is rounding itself the sign is too, hence the share.
    close = jax.tree.map(lambda a, b: np.mean(np.isclose(a, b, rtol=1e-4, atol=1e-6)), new.params, want)
    assert min(jax.tree.leaves(close)) > 0.98


def test_every_step_and_micro_batch_has_a_dropout_key_of_its_own(tiny: Config) -> None:
    class Drawn(ByGradient):
        def counts(self, rows: Rows) -> jax.Array:
            return jnp.float32(1)

        def loss(self, params: dict, rows: Rows, counts: jax.Array, key: jax.Array) -> jax.Array:
            return (jax.random.uniform(key) + 0 * params["positions"].sum()) / counts

    task, layout = single_device(tiny)
    state = init_state(tiny, task, layout.shardings(abstract_state(tiny, task)))
    step = make_step(tiny, Drawn(), layout.shardings(abstract_state(tiny, task)), layout)
    found = []
    for index in (0, 1, 2, 0):
        one, two = [], []
        for losses, count in ((one, 1), (two, 2)):
            state, metrics = step(state, random_rows(tiny), np.float32(0), np.int32(count), np.int32(index))
            losses.append(float(metrics["loss"]))
        found.append((one[0], 2 * two[0] - one[0]))  # a mean of one, and of two
    assert found[3] == found[0]
    assert len(np.unique(np.round(found[:3], 5))) == 6


def test_ramp_ignores_the_unused_micro_batches(tiny: Config) -> None:
    _, state, step = make(tiny)
    rows = random_rows(tiny)
    other = jax.tree.map(np.copy, rows)
    other.tokens[1] = other.targets[1] = 7
    again = jax.tree.map(jnp.copy, state)
    a, _ = step(state, rows, np.float32(1e-3), np.int32(1), np.int32(0))
    b, _ = step(again, other, np.float32(1e-3), np.int32(1), np.int32(0))
    assert fingerprint(a) == fingerprint(b)


def test_decay_leaves_biases_and_norms_out(tiny: Config) -> None:
    task, _ = single_device(tiny)
    mask = is_decayed(nn.unbox(jax.eval_shape(task.init, jax.random.key(0))))
    flat = {leaf_name(path): decayed for path, decayed in jax.tree.leaves_with_path(mask)}
    assert {name.split("/")[-1] for name, decayed in flat.items() if decayed} == {"kernel", "embedding", "positions"}
    assert {name.split("/")[-1] for name, decayed in flat.items() if not decayed} == {"bias", "scale"}


@pytest.fixture
def muon(tiny: Config) -> Config:
    """Two equal layers: half as much to compile."""
    model = replace(tiny.model, num_layers=2, attention_pattern=("dense",))
    return replace(tiny, model=model, optimizer=replace(tiny.optimizer, kind="muon"))


def newton_schulz(matrix: np.ndarray) -> np.ndarray:
    """Jordan's quintic, five times, on the side with fewer rows."""
    x = matrix / np.linalg.norm(matrix)
    x = x.T if x.shape[0] > x.shape[1] else x
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def test_muon_is_newton_schulz_in_float64(muon: Config) -> None:
    """The second update of every kind of matrix, stacked and unstacked alike; Adam's for all else."""
    config = replace(muon.optimizer, weight_decay=0.0)
    task, _ = single_device(muon)
    shapes = nn.unbox(jax.eval_shape(task.init, jax.random.key(0)))
    rng = np.random.default_rng(0)
    first, second = (jax.tree.map(lambda p: rng.normal(0, 1e-3, p.shape).astype(np.float32), shapes) for _ in range(2))

    def update(kind: str, trees: list) -> dict:  # norms below 1: nothing is clipped
        @jax.jit
        def twice(first: dict, second: dict) -> dict:
            optimizer = make_optimizer(replace(config, kind=kind))
            _, state = optimizer.update(first, optimizer.init(first), first)
            return optimizer.update(second, state, first)[0]

        return twice(*trees)

    def unit(tree: dict, i: int) -> dict:
        return jax.tree.map(lambda leaf: leaf[i], tree["units"])

    got = update("muon", [first, second])
    alone = update("muon", [{"unit_1": unit(tree, 1)} for tree in (first, second)])["unit_1"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), alone, unit(got, 1))
    for name, shape in {"qkv": (32, 96), "projection": (32, 32), "mlp_up": (32, 128), "mlp_down": (128, 32)}.items():
        old, new, out = (unit(t, 1)["block_0"][name]["kernel"].reshape(shape) for t in (first, second, got))
        for part in range(3 if name == "qkv" else 1):
            a, b, c = (np.float64(x[:, 32 * part : 32 * (part + 1)] if name == "qkv" else x) for x in (old, new, out))
            momentum = 0.95 * (0.05 * a) + 0.05 * b
            nesterov = 0.95 * momentum / (1 - 0.95**3) + 0.05 * b / (1 - 0.95**2)
            want = 0.2 * max(a.shape) ** 0.5 * newton_schulz(nesterov)
            np.testing.assert_allclose(c, want, rtol=1e-3, atol=1e-4)
            assert 0.1 < np.sqrt(np.mean(c**2)) < 0.3  # as large as Adam's
    adam = update("adamw", [first, second])
    for path in (("embedding",), ("norm_final", "scale"), ("units", "block_0", "qkv", "bias")):
        a, b = (functools.reduce(lambda node, key: node[key], path, tree) for tree in (got, adam))
        np.testing.assert_array_equal(a, b)


def test_muon_goes_on_bit_for_bit_and_moves_to_another_layout(muon: Config, tmp_path: Path) -> None:
    task, state, step = make(muon)

    def advance(state: TrainState, begin: int) -> TrainState:
        for i in range(begin, begin + 2):
            state, _ = step(state, random_rows(muon, i), np.float32(1e-3), np.int32(2), np.int32(i))
        return state

    checkpoints = Checkpoints(tmp_path, muon)
    state = advance(state, 0)
    checkpoints.save(state, Position(2, 2, None))
    checkpoints.wait()
    saved, whole = fingerprint(state), fingerprint(advance(state, 2))

    def restore(layout: Layout) -> TrainState:
        abstract = abstract_state(muon, task)
        return checkpoints.restore(placed(abstract, layout.shardings(abstract)), pytest.fail)[0]

    assert fingerprint(advance(restore(task.layout), 2)) == whole
    spread = replace(muon, layout=LayoutConfig(pipeline=2, fsdp=2, tensor=2))
    moved = restore(Layout(make_mesh(spread, jax.devices()), rule_table(spread.layout)))
    assert fingerprint(moved) == saved
    momenta = [leaf for leaf in jax.tree.leaves(moved.opt_state) if leaf.size >= 2 * 32**2 and leaf.ndim > 2]
    assert len(momenta) == 4
    assert all(leaf.addressable_shards[0].data.nbytes == leaf.nbytes / 8 for leaf in momenta)
    checkpoints.close()


def test_nonfinite_step_is_skipped_and_counted(tiny: Config) -> None:
    _, state, step = make(tiny)
    state = state.replace(params=state.params | {"positions": state.params["positions"].at[0, 0].set(jnp.nan)})
    before = fingerprint(state)
    state, metrics = step(state, random_rows(tiny), np.float32(1e-3), np.int32(2), np.int32(0))
    assert int(metrics["skipped"]) == 1
    after = fingerprint(state)
    assert [name for name in after if after[name] != before[name]] == ["skipped", "bad_streak"]


# Runs, as a user starts them


def gptjax(*args: str, devices: int = 1) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*args), env=environment(devices), capture_output=True, text=True)


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "gptjax", *args]


@pytest.fixture(scope="module")
def config_file(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny config, with dropout, as a file."""
    file = tmp_path_factory.mktemp("config") / "tiny.py"
    text = to_json(replace(tiny, model=replace(tiny.model, dropout=0.1)))
    file.write_text(f"from gptjax.config import from_json\n\ndef config():\n    return from_json({text!r})\n")
    return str(file)


@pytest.fixture(scope="module")
def finished(config_file: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    done = gptjax("train", config_file, "--run", str(run))
    assert done.returncode == 0, done.stderr
    for line in (f"gptjax train --resume {run}", f"gptjax sample {run}", f"gptjax report {run}"):
        assert line in done.stdout
    return run


def newest(run: Path) -> int:
    return max(int(p.name) for p in (run / FOLDER).iterdir() if p.name.isdigit())


def saved(run: Path, step: int | None = None) -> dict:
    """A checkpoint's metadata and its arrays, read without gptjax."""
    folder = (run / FOLDER / str(newest(run) if step is None else step)).absolute()
    with ocp.StandardCheckpointer() as reader:
        arrays = jax.tree.map(np.asarray, reader.restore(folder / "state"))
    meta = json.loads((folder / "meta" / "metadata").read_text())
    return {"meta": meta, "arrays": arrays}


def assert_same_run(a: Path, b: Path) -> None:
    """Bit for bit."""
    one, two = saved(a), saved(b)
    assert one["meta"]["position"] == two["meta"]["position"]
    jax.tree.map(np.testing.assert_array_equal, one["arrays"], two["arrays"])


def test_log_and_checkpoint_of_a_run(finished: Path, tiny: Config) -> None:
    records = read_log(finished / "log.jsonl")
    train = [r for r in records if r["kind"] == "train"]
    assert [r["step"] for r in train] == list(range(5, total_steps(tiny) + 1, 5))
    assert train[-1]["loss"] < 0.8 * train[0]["loss"]
    assert [r["kind"] for r in records][-2:] == ["eval", "end"]
    assert {"loss", "bits_per_byte"} <= records[-2].keys()
    meta = saved(finished)["meta"]
    assert meta["position"]["step"] == total_steps(tiny)
    assert len(meta["position"]["data"]) == tiny.data.lanes
    assert json.loads(meta["config"])["name"] == "tiny"
    assert len([p for p in (finished / FOLDER).iterdir() if p.name.isdigit()]) == tiny.train.keep_last


@pytest.mark.whole  # test_supervisor kills a run twice in every run of the tests
def test_killed_again_and_again_is_bit_identical(
    config_file: str, finished: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """SIGKILL at random moments, saving after every step so that many fall into a save."""
    run = tmp_path / "killed"
    rng = random.Random(int.from_bytes(os.urandom(4), "little"))
    every = ("--train.save_interval", "1")
    start = command("train", config_file, "--run", str(run), *every)
    for kill in range(5 if request.config.getoption("--whole") else 3):
        process = subprocess.Popen(start, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        reached = newest_or_zero(run)
        deadline = time.monotonic() + 120
        while newest_or_zero(run) <= reached and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        assert process.returncode in (-signal.SIGKILL, 0), f"kill {kill}: {errors.decode()}"
        start = command("train", "--resume", str(run), *every)
    done = subprocess.run(start, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_run(run, finished)


# Two processes of two devices each, whose rows take turns as on the hosts of a torus. What the devices get is compared
# with the rows of all, read in one place. Steps take their time: a signal is noticed once a second.
TORUS = """
import sys, time
import numpy as np
import threading
from gptjax import cli
from gptjax.sharding import mesh
from gptjax.train import loop

class Finder:
    def find_spec(name, *_):
        # Both change builtins.__import__ while they are imported: what another thread imports then comes out wrong.
        if name in ("grain", "tensorflow_datasets"):
            assert threading.current_thread() is threading.main_thread(), name

sys.meta_path.insert(0, Finder)

def torus(sizes, devices, **options):
    return np.array([[d for d in devices if d.process_index == host] for host in (0, 1)]).T.reshape(sizes)

def checked(config, task, sharding, mine, position, params, batches=loop.batches):
    assert len(mine) == 4 and tuple(mine) != tuple(range(mine[0], mine[0] + 4)), mine
    return compared(batches(config, task, sharding, mine, position, params), lambda: task.feed(position.data, range(8)))

def compared(batches, open_whole):
    whole = open_whole()
    for batch in batches:
        rows = whole.batch(batch.num_micro)
        for name in ("tokens", "targets"):
            for shard in getattr(batch.rows, name).addressable_shards:
                mine = getattr(rows, name)[:, shard.index[1]]
                np.testing.assert_array_equal(shard.data[: batch.num_micro], mine)
        time.sleep(0.1)
        yield batch

mesh.mesh_utils.create_device_mesh = torus
loop.batches = checked
cli.main()
"""


def two(at: str, number: int, hit: int, *args: str) -> list[tuple[int, str]]:
    """(exit status, output) of each of two processes, one of which gets a signal when process 0 has printed `at`."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    where = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    start = [sys.executable, "-c", TORUS, "train", *args, "--distributed", "--train.save_interval", "0"]
    both = [subprocess.Popen(start, env=environment(2) | where | {"JAX_PROCESS_ID": str(i)}, **pipes) for i in range(2)]
    try:
        printed = ""
        for line in both[0].stdout:
            printed += line
            if line.startswith(at):
                both[hit].send_signal(number)
                break
        printed += both[0].communicate(timeout=400)[0]
        other = both[1].communicate(timeout=400)[0]
    finally:
        for process in both:
            process.kill()
    return [(both[0].returncode, printed), (both[1].returncode, other)]


@pytest.mark.slow
def test_two_processes_stop_together_and_one_goes_on(config_file: str, finished: Path, tmp_path: Path) -> None:
    """Real processes that hold rows in turns: Ctrl-C on one, or SIGTERM before the first step after a resume, saves
    and stops both, and the run that one process then finishes stands where the uninterrupted one does."""
    run, end = tmp_path / "two", newest(finished)
    for at, number, hit, args in (
        ("step 5 ", signal.SIGINT, 1, (config_file, "--run", str(run))),
        ("resumed at step", signal.SIGTERM, 0, ("--resume", str(run))),
    ):
        before = newest_or_zero(run)
        first, second = two(at, number, hit, *args)
        assert (first[0], second[0]) == (128 + number,) * 2, first[1] + second[1]
        assert "4 x cpu, layout fsdp 4" in first[1]
        assert before < newest(run) < end
    assert before >= 5
    done = gptjax("train", "--resume", str(run))
    assert done.returncode == 0, done.stderr
    assert saved(run)["meta"]["position"] == saved(finished)["meta"]["position"]
    ours, whole = ([r for r in read_log(folder / "log.jsonl") if r["kind"] == "train"] for folder in (run, finished))
    assert ours[0]["step"] == whole[0]["step"] == 5
    np.testing.assert_allclose(ours[0]["loss"], whole[0]["loss"], rtol=1e-6)
    # The records after the stops average fewer steps, so the last ones are compared.
    np.testing.assert_allclose([r["loss"] for r in ours[-3:]], [r["loss"] for r in whole[-3:]], rtol=1e-4)


def newest_or_zero(run: Path) -> int:
    return newest(run) if (run / FOLDER).is_dir() and any(p.name.isdigit() for p in (run / FOLDER).iterdir()) else 0


@pytest.mark.parametrize(
    ("number", "at"), [(signal.SIGTERM, "step 5 "), pytest.param(signal.SIGINT, "run ", marks=pytest.mark.whole)]
)
def test_signal_saves_and_says_how_to_go_on(
    number: int, at: str, config_file: str, finished: Path, tmp_path: Path
) -> None:
    """Between two steps, and while the first is being compiled."""
    run = tmp_path / "stopped"
    start = command("train", config_file, "--run", str(run), "--train.save_interval", "0")
    with subprocess.Popen(
        start, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            if line.startswith(at):
                process.send_signal(number)
                break
        output, errors = process.communicate()
    assert process.returncode == 128 + number, errors
    assert f"gptjax train --resume {run}" in output
    assert (1 if at == "run " else 5) <= newest(run) < newest(finished)
    done = gptjax("train", "--resume", str(run))
    assert done.returncode == 0, done.stderr
    assert_same_run(run, finished)
    steps_logged = [r["step"] for r in read_log(run / "log.jsonl") if r["kind"] == "train"]
    assert steps_logged == sorted(set(steps_logged))


def copy_at(run: Path, step: int, to: Path) -> Path:
    """The run as it was when `step` had just been saved."""
    shutil.copytree(run, to)
    for folder in (to / FOLDER).iterdir():
        if folder.name.isdigit() and int(folder.name) > step:
            shutil.rmtree(folder)
    return to


def earlier(run: Path) -> int:
    return sorted(int(p.name) for p in (run / FOLDER).iterdir() if p.name.isdigit())[-2]


@pytest.mark.slow
def test_resume_on_another_layout(finished: Path, tmp_path: Path) -> None:
    """Saved on one device, continued on 2 stages x 2 parts of the sequence x 2: the same losses, dropout and all, and
    the same parameters within rounding."""
    run = copy_at(finished, earlier(finished), tmp_path / "moved")
    layout = ("--layout.pipeline", "2", "--layout.context", "2", "--layout.tensor", "2", "--layout.fsdp", "1")
    done = gptjax("train", "--resume", str(run), *layout, devices=8)
    assert done.returncode == 0, done.stderr
    a, b = saved(finished), saved(run)
    assert a["meta"]["position"] == b["meta"]["position"]
    params = a["arrays"]["params"], b["arrays"]["params"]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-3), *params)
    losses = ([r["loss"] for r in read_log(folder / "log.jsonl") if r["kind"] == "train"] for folder in (finished, run))
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_damaged_checkpoint_is_named_and_the_one_before_used(finished: Path, tmp_path: Path) -> None:
    """As a user meets it; kinds of damage are in test_checkpoint.py."""
    run = tmp_path / "damaged"
    shutil.copytree(finished, run)
    last = newest(run)
    files = [p for p in (run / FOLDER / str(last) / "state").rglob("*") if p.is_file() and p.parent.name == "d"]
    victim = max(files, key=lambda p: p.stat().st_size)
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    done = gptjax("train", "--resume", str(run))
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if "is damaged" in line]
    assert len(warnings) == done.stderr.count("\n") == 1
    assert str(run / FOLDER / str(last)) in warnings[0]
    assert (run / FOLDER / f"{last}.damaged").is_dir()
    assert f"resumed at step {earlier(finished)}" in done.stdout
    assert_same_run(run, finished)


@pytest.mark.slow
def test_full_disk_during_save_is_one_line_and_loses_nothing(config_file: str, finished: Path, tmp_path: Path) -> None:
    """A file-size limit stands in for the full disk: the second save fails in the background, as it would there."""
    run = copy_at(finished, earlier(finished), tmp_path / "full")
    kept = newest(run)

    limited = ["bash", "-c", 'ulimit -f 98; exec "$@"', "bash", *command("train", "--resume", str(run))]
    failed = subprocess.run(limited, env=environment(), capture_output=True, text=True)
    assert failed.returncode == 1
    errors = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, failed.stderr
    assert f"cannot write (File too large); the last complete one is step {kept}; free space and resume" in errors[0]
    assert "Traceback" not in failed.stderr, failed.stderr
    assert newest(run) == kept
    done = gptjax("train", "--resume", str(run))
    assert done.returncode == 0, done.stderr
    assert_same_run(run, finished)


def test_keep_every_outlives_keep_last(tiny: Config, tmp_path: Path) -> None:
    task, layout = single_device(tiny)
    state = init_state(tiny, task, layout.shardings(abstract_state(tiny, task)))
    checkpoints = Checkpoints(tmp_path, replace(tiny, train=replace(tiny.train, keep_last=1, keep_every=10)))
    for step in (5, 10, 15, 20, 25):
        checkpoints.save(state, Position(step, step, None))
    checkpoints.close()
    assert sorted(int(p.name) for p in (tmp_path / FOLDER).iterdir() if p.name.isdigit()) == [10, 20, 25]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("train",), "name a config"),
        (("train", "configs/none.py"), "no such file"),
        (("train", "CONFIG", "--data.source", "nowhere/*.txt"), "nowhere/*.txt: no such file, nor a match as a glob"),
        (("train", "CONFIG", "--data.source", "tfds:no_such_set"), "data.source = tfds:no_such_set"),
        (("train", "CONFIG", "--data.tokenizer", "no.model"), "data.tokenizer = no.model"),
        (("train", "CONFIG", "--model.vocab_size", "100"), "model.vocab_size = 100: the tokenizer bytes needs 257"),
        (("train", "CONFIG", "--layout.fsdp", "3"), "layout.fsdp = 3"),
        (("train", "CONFIG", "--model.seq_len", "100000"), "model.seq_len = 100000"),
        (("train", "CONFIG", "--run", "RUN"), "exists and is not empty; gptjax train --resume"),
        (("train", "--resume", "configs"), "not a run folder"),
        (("train", "CONFIG", "--resume", "RUN", "--model.num_layers", "6"), "model.num_layers: the run has 4, given 6"),
        (("sample", "nowhere"), "not a run folder"),
        (("sample", "RUN", "--top-p", "0"), "--top-p 0.0: must lie in (0, 1]"),
        (("sample", "RUN", "--prompt", "a" * 17), "prompt: 17 tokens; the context holds 16"),
        (("report", "nowhere"), "not a run folder"),
        (("report", "RUN", "--loud"), "--loud: gptjax report has no such argument"),
    ],
)
def test_bad_input_is_one_line(
    args: tuple, message: str, config_file: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    filled = [{"CONFIG": config_file, "RUN": str(finished)}.get(arg, arg) for arg in args]
    monkeypatch.setattr(sys, "argv", ["gptjax", *filled])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("WARNING:absl")]
    assert stop.value.code == 1
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert message in errors[0]
    assert not list(tmp_path.iterdir())  # nothing half-written


def test_command_line_sets_malloc_once_and_keeps_its_arguments() -> None:
    plain = {name: value for name, value in environment().items() if name != "GLIBC_TUNABLES"}
    linux = sys.platform == "linux"
    assert malloc_matters(plain) == linux
    assert not malloc_matters(plain | {"GLIBC_TUNABLES": "x"})
    free = {name: value for name, value in plain.items() if name != "JAX_PLATFORMS"}
    for plugin, file in (("libtpu", "/dev/vfio/[0-9]*"), ("jax_cuda13_plugin", "/dev/nvidia[0-9]*")):
        # A plugin that is there to plan, on a machine that has only a CPU; and one beside its device.
        assert malloc_matters(free, {plugin}.__contains__, set().__contains__) == linux
        assert not malloc_matters(free, {plugin}.__contains__, {file}.__contains__)
        assert malloc_matters(free, set().__contains__, {file}.__contains__) == linux
        assert malloc_matters(free | {"JAX_PLATFORMS": "cpu"}, {plugin}.__contains__, {file}.__contains__) == linux
        assert not malloc_matters(free | {"JAX_PLATFORMS": "tpu,cpu"}, set().__contains__, set().__contains__)
    started = subprocess.run(command("train", "no such.py"), env=plain, capture_output=True, text=True)
    assert (started.returncode, started.stderr.count("\n")) == (1, 1)
    assert "config no such.py: no such file" in started.stderr


# Sampling and the report


@pytest.mark.slow
def test_sample_is_a_function_of_the_seed(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("sample", str(finished), "--prompt", "la ", "--tokens", "40")

    def text(*args: str) -> str:
        capsys.readouterr()
        assert cli.run([*words, *args]) == 0
        return capsys.readouterr().out

    started = gptjax(*words, "--seed", "1")
    assert started.returncode == 0, started.stderr
    assert started.stdout == text("--seed", "1") != text("--seed", "2")
    assert text("--samples", "3").count("\n---\n") == 2


def test_report_draws_from_the_log_alone(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "moved"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns(FOLDER, "tokenizer"))
    with (run / "log.jsonl").open("a") as log:
        log.write('{"kind": "train", "st')  # what a kill leaves
    assert cli.run(["report", str(run)]) == 0
    assert (run / "report.png").read_bytes().startswith(b"\x89PNG")
    page = (run / "report.html").read_text()
    assert "bits per byte" in page
    assert not re.search(r'(src|href)="http', page)
