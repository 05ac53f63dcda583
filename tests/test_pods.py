"""Several processes: which rows each holds on real pods, how they meet, and what a second Ctrl-C does."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections import Counter
from itertools import product
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from shipped import shipped

from gptjax.config import Config, LayoutConfig
from gptjax.config.load import load_config
from gptjax.errors import UserError
from gptjax.planner.chips import topology
from gptjax.planner.compile import COMPILERS, devices_of
from gptjax.planner.search import named
from gptjax.sharding.mesh import AUTO, MESH_AXES, make_mesh
from gptjax.sharding.rows import rows_by_process
from gptjax.sharding.rules import Layout, rule_table
from gptjax.train import join
from gptjax.train.join import ADDRESS, COUNT, INDEX
from gptjax.train.signals import ASKED

ROOT = Path(__file__).parents[1]


# Rows

SHIPPED = [
    (path.stem, found[1], 1, "")
    for path in sorted((ROOT / "configs").glob("*.py"))
    if (found := re.search(r"Compiled for (\S+):", path.read_text())) and not found[1].startswith("cpu")
]
PLANNED = [  # what `gptjax plan` recommends: README's table, over two slices, on GPUs
    ("gpt3_175b", pod, slices, layout)
    for pod, slices, layouts in (
        ("v5p-1024", 1, "fsdp64_tp8_seq/none/256 fsdp32_tp16_seq/none/128 fsdp128_tp4_seq/none/256 fsdp512/dots/512"),
        ("v5p-1024", 1, "pp4_fsdp8_tp16_seq/dots/512 fsdp256_tp2_seq/dots/256 pp2_rounds2_fsdp64_tp4_seq/full/256"),
        ("v5p-128", 2, "replica2_fsdp64/full/128 replica2_fsdp16_tp4_seq/full/64 pp2_fsdp32_tp2_seq/full/64"),
        ("v5e-256", 2, "replica2_fsdp32_tp8_seq/full/128 replica2_pp2_dp2_fsdp32_tp2_seq/full/256"),
        ("v4-64", 1, "fsdp8_cp4/full/64"),
        ("h100-8x64", 1, "fsdp512/full/512 fsdp64_tp8_seq/full/64 pp4_fsdp32_tp4_seq/full/128"),
    )
    for layout in layouts.split()
]


def layout_on(config: Config, pod: str, slices: int) -> Layout:
    where = topology(pod, slices)
    pytest.importorskip(COMPILERS[where.chip.platform], reason="needs the extras tpu and cuda-aot")
    return Layout(make_mesh(config, devices_of(where)), rule_table(config.layout))


@pytest.mark.parametrize(("name", "pod", "slices", "layout"), SHIPPED + PLANNED, ids=lambda value: str(value))
def test_every_process_of_a_pod_gets_its_rows(name: str, pod: str, slices: int, layout: str, tmp_path: Path) -> None:
    """With the TPU's own numbers of processes: every device finds its rows among its process's, each process holds no
    others, and what two of them hold is the same or disjoint, or JAX would take it for something else."""
    config = shipped(name, tmp_path)
    config = named(config, layout) if layout else config
    made, rows = layout_on(config, pod, slices), config.micro_batch_size
    shares = rows_by_process(made, rows)
    devices = list(made.mesh.devices.flat)
    assert list(shares) == list(range(len(devices) // Counter(d.process_index for d in devices)[0]))
    held: dict[int, set[int]] = {process: set() for process in shares}
    ways = np.arange(made.ways(made.rules["batch"])).reshape([made.mesh.shape[a] for a in ("replica", "data", "fsdp")])
    each = rows // ways.size
    for at, device in np.ndenumerate(made.mesh.devices):  # by hand: replica, data and fsdp cut the rows in turn
        part = ways[at[0], at[2], at[3]] * each
        held[device.process_index] |= set(range(part, part + each))
    assert {process: set(mine) for process, mine in shares.items()} == held
    assert all(list(mine) == sorted(set(mine)) for mine in shares.values())
    counted = Counter(row for mine in set(shares.values()) for row in mine)
    assert counted == Counter(range(rows))
    assert len({len(mine) for mine in shares.values()}) == 1


def test_a_host_is_a_block_of_the_torus() -> None:
    """The case that the range of rows which a process was once asked to hold does not cover."""
    config = named(load_config(str(ROOT / "configs/gpt3_175b.py"), []), "fsdp64_tp8_seq/full/256")
    shares = rows_by_process(layout_on(config, "v5p-1024", 1), 256)
    assert shares[0] == (0, 1, 2, 3, 32, 33, 34, 35)
    assert Counter(shares.values())[shares[0]] == 4


class Device(NamedTuple):
    number: int
    process_index: int


def of_places(places: dict[Device, tuple[slice]]) -> Layout:
    sharding = SimpleNamespace(devices_indices_map=lambda shape: places)
    return SimpleNamespace(sharding=lambda axes: sharding)  # type: ignore[return-value]


def test_rows_that_hosts_share_in_part_are_refused() -> None:
    """Groups of 3 devices that share rows, on hosts of 4; and hosts that hold rows of their own, but not as many."""

    def fake(*parts: tuple[int, int, int]) -> Layout:
        """Of devices with their process, and the first and the last of their rows."""
        places = {Device(i, process): (slice(first, last + 1),) for i, (process, first, last) in enumerate(parts)}
        return of_places(places)

    groups = fake(*((device // 4, device // 3 * 2, device // 3 * 2 + 1) for device in range(12)))
    with pytest.raises(UserError, match=r"rows of a micro-batch of 8 only in part \(process 0 0-3; process 1 2-5; "):
        rows_by_process(groups, 8)
    with pytest.raises(UserError, match=r"\(process 0 0, 2-3; process 1 1\); let the devices of a pipeline stage"):
        rows_by_process(fake((0, 0, 0), (1, 1, 1), (0, 2, 3)), 4)
    assert rows_by_process(fake((1, 0, 0), (0, 1, 1), (1, 2, 2), (0, 3, 3)), 4) == {0: (1, 3), 1: (0, 2)}


PARTS = ("context", "tensor")
REFUSED = {
    2: [f"{rows} 3 x {part} 2" for rows in ("data", "fsdp", "replica") for part in PARTS] + ["replica 3 x pipeline 2"],
    3: [f"{rows} 2 x {part} 3" for rows in ("data", "fsdp", "replica") for part in PARTS]
    + ["pipeline 2 x data 3", "pipeline 2 x fsdp 3", "replica 2 x pipeline 3"],
    6: [],
}
"""Number of processes -> the layouts of 6 devices whose rows these would share in part."""


@pytest.mark.parametrize(
    ("devices", "processes", "refused"),
    [*((8, processes, []) for processes in (2, 4, 8)), *((6, *item) for item in REFUSED.items())],
)
def test_which_layouts_hosts_cannot_have(devices: int, processes: int, refused: list[str]) -> None:
    """Of all that there are, by name; none where devices and processes are powers of two."""
    size, found = devices // processes, []
    for degrees in product(*[[d for d in range(1, devices + 1) if devices % d == 0]] * len(MESH_AXES)):
        if prod(degrees) != devices:
            continue
        mesh = Mesh(np.array(jax.devices()[:devices]).reshape(degrees), MESH_AXES, axis_types=AUTO)
        real = Layout(mesh, rule_table(LayoutConfig())).sharding(("batch",)).devices_indices_map((24,))
        places = {Device(device.id, device.id // size): part for device, part in real.items()}
        try:
            rows_by_process(of_places(places), 24)
        except UserError:
            named = zip(MESH_AXES, degrees, strict=True)
            found.append(" x ".join(f"{axis} {degree}" for axis, degree in named if degree > 1))
    assert sorted(found) == sorted(refused)


def test_one_process_holds_all() -> None:
    mesh = Mesh(np.array(jax.devices()).reshape(1, 1, 2, 2, 1, 2), MESH_AXES, axis_types=AUTO)
    assert rows_by_process(Layout(mesh, rule_table(LayoutConfig())), 12) == {0: tuple(range(12))}


# Meeting

WHERE = {ADDRESS: "localhost:8476", COUNT: "2", INDEX: "1"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((ADDRESS, text) for text in ("localhost", "localhost:", "localhost:x", "localhost:0", "localhost:65536")),
        *((ADDRESS, text) for text in (":8476", "http://localhost:8476", "localhost:8476/", "a b:1", "::1:8476")),
        *((ADDRESS, text) for text in ("8476", "[::1]", "localhost:-1", "localhost:84.76", "localhost:1:2")),
        *((COUNT, text) for text in ("0", "-1", "x", "1.5", "two", "²")),
        *((INDEX, text) for text in ("-1", "2", "x", "0.0")),
        ("JAX_LOCAL_DEVICE_IDS", "0,x"),
        ("JAX_PARTITION_INDEX", "-1"),
        ("JAX_COORDINATOR_BIND_ADDRESS", "0.0.0.0"),
    ],
)
def test_a_wrong_value_is_one_line_before_anything_starts(name: str, value: str) -> None:
    with pytest.raises(UserError) as error:
        join.read(WHERE | {name: value})
    assert str(error.value).startswith(f"--distributed: {name} = {value}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [ADDRESS, COUNT, INDEX])
@pytest.mark.parametrize("empty", [True, False])
def test_a_missing_value_is_named(name: str, empty: bool) -> None:
    given = {key: value for key, value in WHERE.items() if key != name} | ({name: ""} if empty else {})
    with pytest.raises(UserError, match=f"--distributed: {name} is not set; set {ADDRESS}, {COUNT}, {INDEX} "):
        join.read(given)


def test_right_values() -> None:
    assert join.read({}) is None
    assert join.read({"JAX_LOCAL_DEVICE_IDS": "0,1", "SLURM_JOB_ID": "7"}) is None  # as launch/slurm.sh starts it
    assert join.read(WHERE) == join.Where("localhost", 8476, 2, 1, ("", 8476))
    assert join.read(WHERE | {ADDRESS: "[fd00::1]:1"}) == join.Where("fd00::1", 1, 2, 1, ("", 1))
    bound = join.read(WHERE | {ADDRESS: "host-0.pod.svc:65535", "JAX_COORDINATOR_BIND_ADDRESS": "10.0.0.1:9"})
    assert bound == join.Where("host-0.pod.svc", 65535, 2, 1, ("10.0.0.1", 9))


def test_a_port_that_is_taken_and_one_where_nobody_listens(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Each is said in a line; JAX would end the process by SIGSEGV and by SIGABRT."""
    monkeypatch.setattr(join, "TIMEOUT", 1)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: pytest.fail("started"))
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"process 0 cannot listen at port {port}: Address already in use; end"):
            join.join(WHERE | {ADDRESS: f"localhost:{port}", INDEX: "0"})
        with pytest.raises(pytest.fail.Exception, match="started"):  # somebody listens
            join.join(WHERE | {ADDRESS: f"localhost:{port}"})
    with pytest.raises(UserError, match=f"nobody listens at localhost port {port} after 1 s"):
        join.join(WHERE | {ADDRESS: f"localhost:{port}"})
    with pytest.raises(UserError, match=r"nobody listens at no\.such\.host\.invalid port 1 after 1 s"):
        join.join(WHERE | {ADDRESS: "no.such.host.invalid:1"})
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3
    assert said[0].endswith(f"process 1 of 2 connects to localhost:{port}, and waits for the others at most 1 s")
    with pytest.raises(pytest.fail.Exception, match="started"):
        join.join(WHERE | {ADDRESS: f"localhost:{port}", INDEX: "0"})  # free again
    assert f"process 0 of 2 listens at localhost:{port}, and waits" in capsys.readouterr().out


def test_where_nothing_says_where_the_others_are(file: str) -> None:
    """From the command line: one line."""
    command = [sys.executable, "-c", "from gptjax.cli import main; main()", "train", file, "--distributed"]
    plain = {name: value for name, value in os.environ.items() if name not in (ADDRESS, COUNT, INDEX)}
    done = subprocess.run(command, env=plain, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: --distributed: coordinator_address should be defined")
    assert done.stderr.count("\n") == 1


# Signals

BUSY = """
import hashlib
from gptjax.train.signals import signals
with signals():
    print("listening", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", (1 << 31) - 1)  # minutes in C, as a compile is
"""


def test_a_second_interrupt_ends_at_once() -> None:
    """Also while the main thread is in no state to handle one."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", BUSY], **pipes) as process:  # type: ignore[call-overload]
        try:
            assert process.stdout.readline() == "listening\n"
            process.send_signal(signal.SIGINT)
            assert process.stderr.readline() == ASKED + "\n"
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 128 + signal.SIGINT
        finally:
            process.kill()
