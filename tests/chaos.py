"""Faults by a seed over one run of several processes, each under `gptjax run`: what falls must get up again by itself.

    python tests/chaos.py CONFIG FOLDER --seed 1 --faults 36

FOLDER is best a small file system, which is filled for a while. Prints a line for each fault, and ends with status 1
where the run did not come through, or lost more than what came after its last whole checkpoint.
"""

import argparse
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from devices import environment

from gptjax.train.checkpoint import FOLDER, saved_steps
from gptjax.train.metrics import LOG, Record, read_log

STEPS, EVERY = 300, 6  # and steps between two checkpoints
TOKENS = 12 * 16  # of a step
FIELDS = {
    "model.embed_dim": 48,
    "model.num_heads": 12,
    "train.micro_batch_size": 12,
    "train.batch_size": 12,
    "train.ramp_start": 0,
    "train.ramp_tokens": 0,
    "train.total_tokens": STEPS * TOKENS,
    "optimizer.decay_tokens": STEPS * TOKENS,
    "train.save_interval": EVERY,
    "train.keep_last": 3,
    "train.log_interval": 1,
    "train.eval_interval": 60,
}
LIMITS = {"backoff": 1, "grace": 60}
"""How the run is watched, in seconds."""
JOINED = "--distributed"
GONE = 128 + signal.SIGTERM, 128 + signal.SIGINT, -signal.SIGKILL
"""Statuses of a watch that a scheduler starts again."""
PATIENCE = 1800.0  # seconds until a fault counts as one that the run did not survive
SMALL = 256 << 20  # bytes of a disk that may be filled


class Lost(Exception):
    """The run did not come through."""


class World:
    """One run of several processes, and all that can happen to it."""

    def __init__(self, config: str, folder: Path, processes: int, seed: int) -> None:
        self.folder, self.run, self.random = folder, folder / "run", random.Random(seed)
        self.logs = folder.parent / "logs"  # not on the disk that is filled
        given = FIELDS | LIMITS | {"layout.fsdp": processes, "run": self.run}
        self.words = [config, *(word for name, value in given.items() for word in (f"--{name}", str(value)))]
        self.port, self.everybody = free_port(), range(processes)
        self.stopped: set[int] = set()
        """Those that were told to end, by a signal which may meet them anywhere."""
        self.hosts: list[subprocess.Popen[bytes]] = []
        for index in self.everybody:
            self.orders(index).mkdir(parents=True)
            self.hosts.append(self.begin(index, JOINED))

    def orders(self, index: int) -> Path:
        return self.logs / f"orders-{index}"

    def begin(self, index: int, *words: str, devices: int = 1) -> "subprocess.Popen[bytes]":
        """One process of the run under a watch of its own, as its scheduler starts it."""
        where = {
            "CHAOS_ORDERS": str(self.orders(index)),
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{self.port}",
            "JAX_NUM_PROCESSES": str(len(self.everybody)),
            "JAX_PROCESS_ID": str(index),
        }
        program = str(Path(__file__).with_name("chaotic.py").absolute())
        command = [sys.executable, program, "run", *self.words, *words]
        with self.said(index).open("ab") as log:
            return subprocess.Popen(command, env=environment(devices, **where), stdout=log, stderr=log)

    def said(self, index: int) -> Path:
        """All that a process and its watch have said."""
        return self.logs / f"host-{index}.log"

    def tend(self) -> bool:
        """What a scheduler does: start again what was taken away. Returns whether all are done."""
        for index, host in enumerate(self.hosts):
            if host.poll() in GONE or (host.poll() and index in self.stopped):
                self.stopped.discard(index)
                self.hosts[index] = self.begin(index, JOINED)
            elif host.poll():
                raise Lost(f"process {index} was given up:\n{self.said(index).read_text(errors='replace')[-3000:]}")
        return all(host.poll() == 0 for host in self.hosts)

    def wait_for(self, there: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
        end = time.monotonic() + seconds
        while not there():
            if self.tend() and not there():
                raise Lost(f"the run ended before {what}")
            if time.monotonic() > end:
                raise Lost(f"after {seconds:g} s: {what}")
            time.sleep(0.05)

    def stop(self) -> None:
        for host in self.hosts:
            host.kill()  # its trainer ends with it
            host.wait()

    # What is seen of it

    def saved(self) -> list[int]:
        """The whole checkpoints, the newest first."""
        return saved_steps(self.run / FOLDER)

    def newest(self) -> Path:
        return self.run / FOLDER / str(self.saved()[0])

    def records(self, kind: str) -> list[Record]:
        log = self.run / LOG
        return [record for record in read_log(log) if record["kind"] == kind] if log.is_file() else []

    def trainer(self, index: int) -> int:
        """Its number, once it is there."""
        found: list[int] = []

        def look() -> bool:
            pid = self.hosts[index].pid
            with suppress(OSError):
                found[:] = [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
            return bool(found)

        self.wait_for(look, f"process {index} has no trainer")
        return found[0]

    # What can be done to it

    def any(self) -> int:
        return self.random.choice(self.everybody)

    def kill(self, *indices: int, number: int = signal.SIGKILL) -> None:
        for pid in [self.trainer(index) for index in indices]:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def order(self, index: int, name: str, text: str = "once") -> None:
        """For its trainer, at once or at the next start."""
        whole = self.logs / "order"
        whole.write_text(text)
        whole.rename(self.orders(index) / name)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


# Faults. Each says in words what it did.

Fault = Callable[[World], str]


# Such as throw the run, or somebody at its door


def one_killed(world: World) -> str:
    index = world.any()
    world.kill(index)
    return f"SIGKILL of trainer {index}"


def all_killed(world: World) -> str:
    world.kill(*world.everybody)
    return "SIGKILL of all trainers"


def watch_killed(world: World) -> str:
    index = world.any()
    world.hosts[index].kill()
    return f"SIGKILL of the watch of {index}, which takes its trainer along"


def preempted(world: World) -> str:
    index = world.any()
    world.stopped.add(index)
    world.hosts[index].terminate()
    return f"SIGTERM to the watch of {index}: all save and end"


def frozen(world: World) -> str:
    index = world.any()
    world.kill(index, number=signal.SIGSTOP)
    return f"SIGSTOP of trainer {index}"


def stuck(world: World) -> str:
    index = world.any()
    world.order(index, "stuck")
    return f"trainer {index} sleeps in a step"


def mistaken(world: World) -> str:
    index = world.any()
    world.order(index, "mistake")
    return f"an exception in trainer {index}"


def killed_in_save(world: World) -> str:
    return during("save", signal.SIGKILL, 0.3)(world)


def disk_full(world: World) -> str:
    before = [world.said(index).stat().st_size for index in world.everybody]

    def noticed() -> bool:
        return any(b"No space left" in world.said(i).read_bytes()[before[i] :] for i in world.everybody)

    filler = world.folder / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
    try:
        world.wait_for(noticed, "nobody has noticed that the disk is full", 120)
        time.sleep(world.random.uniform(0, 6))
    finally:
        filler.unlink()
    return "the disk is full, for a while"


def same_place_twice(world: World) -> str:
    """Another start of process 0, which gets no further than the port."""
    return second_start(world, JOINED, b"cannot listen", "process 0 is started twice", 1)


def same_run_twice(world: World) -> str:
    """Another start of the run, by one process, which gets no further than the lock."""
    return second_start(world, "", b"is at work on it", "the run is started twice", len(world.everybody))


def second_start(world: World, word: str, end: bytes, told: str, devices: int) -> str:
    before = world.said(0).stat().st_size
    extra = world.begin(0, *[word] * bool(word), devices=devices)
    try:
        world.wait_for(lambda: end in world.said(0).read_bytes()[before:], told, 200)
    finally:
        extra.kill()
        extra.wait()
    return told


# Such as come while it is down, all trainers of it killed


def truncated(world: World) -> str:
    newest = world.newest()
    file = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    os.truncate(file, file.stat().st_size // 2)
    return f"{file.relative_to(world.run / FOLDER)} is cut in half"


def deleted(world: World) -> str:
    newest = world.newest()
    shutil.rmtree(newest)
    return f"checkpoint {newest.name} is deleted"


def half_left(world: World) -> str:
    newest = world.newest()
    half = newest.with_name(f"{int(newest.name) + EVERY}.orbax-checkpoint-tmp")
    shutil.copytree(newest / "meta", half / "meta", dirs_exist_ok=True)
    return f"half a checkpoint {half.name} lies there"


def port_taken(world: World) -> str:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)

        def bound() -> bool:
            with suppress(OSError):
                other.bind(("0.0.0.0", world.port))
                return True
            return False

        world.wait_for(bound, "the port never was free", 60)
        other.listen()
        before = world.said(0).stat().st_size
        world.wait_for(lambda: b"cannot listen" in world.said(0).read_bytes()[before:], "nobody missed the port")
        time.sleep(world.random.uniform(0, 4))
    return "the coordinator's port is another program's, for a while"


# Such as come at its next start, however it is down


def clock_jumps(world: World) -> str:
    index, hours = world.any(), world.random.choice([-240, -5, 3, 1000])
    world.order(index, "clock", str(hours * 3600))
    return f"the clock of {index} is {hours:+} h wrong from now on"


def another(what: str, words: str) -> Fault:
    def fault(world: World) -> str:
        index = world.any()
        world.order(index, what)
        return f"{index} starts {words}, once"

    return fault


def during(place: str, number: signal.Signals, most: float) -> Fault:
    """The signal comes some time after `place` has begun."""

    def fault(world: World) -> str:
        index, seconds = world.any(), world.random.uniform(0, most)
        world.order(index, f"{number.name} in {place}", str(seconds))
        return f"{number.name} of trainer {index}, {seconds:.2f} s after its {place} has begun"

    return fault


HARMLESS: tuple[Fault, ...] = (same_place_twice, same_run_twice)
"""The run takes no notice."""
DOWN: tuple[Fault, ...] = (truncated, deleted, half_left, port_taken)
BACK: tuple[Fault, ...] = (truncated, deleted)
"""The last whole checkpoint is the one before."""
STARTING: tuple[Fault, ...] = (
    another("version", "with another version"),
    another("config", "with another config"),
    another("late", "8 seconds late"),
    during("join", signal.SIGKILL, 1.0),
    during("restore", signal.SIGKILL, 0.5),
    during("compile", signal.SIGKILL, 0.5),
    during("compile", signal.SIGTERM, 0.5),
)
THROWING: tuple[Fault, ...] = (
    one_killed,
    watch_killed,
    preempted,
    frozen,
    stuck,
    mistaken,
    disk_full,
    killed_in_save,
)


def plan(seed: int, disk: bool) -> Iterator[list[Fault]]:
    """Faults that come together: one that throws the run, and what awaits it until it goes on. Every kind comes once,
    in an order by chance, before any comes again."""
    chance = random.Random(seed)
    bags: dict[tuple[Fault, ...], list[Fault]] = {}

    def drawn(kinds: tuple[Fault, ...]) -> Fault:
        bag = bags.setdefault(kinds, [])
        if not bag:
            bag.extend(chance.sample(kinds, len(kinds)))
        return bag.pop()

    throwing = tuple(fault for fault in THROWING if disk or fault is not disk_full)
    while True:
        yield [drawn(throwing), clock_jumps]
        yield [all_killed, *chance.sample(DOWN, len(DOWN)), clock_jumps]
        yield [drawn(throwing), drawn(STARTING)]
        yield [drawn(throwing), clock_jumps]
        yield [drawn(throwing), drawn(STARTING)]
        yield [drawn(HARMLESS)]


def disturb(world: World, faults: Iterator[list[Fault]], count: int) -> Iterator[str]:
    """So many faults at least, the next ones when the run has got beyond where the last ones found it. Yields a row for
    each: the newest whole checkpoint before it; then, once the run goes on, from where, the steps that were lost, and
    how long all that took, the next checkpoint included."""
    done = 0
    if count:
        world.wait_for(lambda: len(world.saved()) >= 3, "no third checkpoint")
    while done < count:
        chosen = next(faults)
        time.sleep(world.random.uniform(0, 1))
        began, starts, saved = time.monotonic(), len(world.records("start")), world.saved()
        # What a start is to meet is laid out before it is due.
        told = {
            fault: fault(world) for fault in sorted(chosen, key=lambda fault: fault not in (clock_jumps, *STARTING))
        }
        safe = saved[sum(fault in BACK for fault in chosen)]  # at least: another may have become whole meanwhile

        def going(starts: int = starts, harmless: bool = chosen[0] in HARMLESS, before: int = saved[0]) -> bool:
            begun = world.records("start")
            if harmless:
                return world.saved()[0] > before
            return len(begun) > starts and bool(world.saved()) and world.saved()[0] > begun[-1]["step"]

        world.wait_for(going, f"not going on after: {[*told.values()]}")
        took, begun = time.monotonic() - began, world.records("start")[starts:]
        if any(start["step"] < safe for start in begun):
            raise Lost(f"{[*told.values()]}: back to {[start['step'] for start in begun]}, though {safe} was whole")
        lost = sum(start["cost"]["lost_steps"] for start in begun)
        on = str(begun[-1]["step"]) if begun else "-"
        on_again = f"{on:>7}  {lost:>4}  {took:>5.0f} s"
        for fault in chosen:
            done += 1
            last = fault is chosen[-1]
            yield f"{done:>3}  {saved[0]:>5}  {on_again if last else '':{len(on_again)}}  {told[fault]}"


@contextmanager
def lasting(world: World) -> Iterator[World]:
    try:
        yield world
    finally:
        world.stop()


def main() -> int:
    reads = argparse.ArgumentParser()
    reads.add_argument("config")
    reads.add_argument("folder", type=Path)
    reads.add_argument("--seed", type=int, default=0)
    reads.add_argument("--faults", type=int, default=36)
    reads.add_argument("--processes", type=int, default=2)
    given = reads.parse_args()
    faults = plan(given.seed, shutil.disk_usage(given.folder).total <= SMALL)
    print(f"seed {given.seed}: {given.processes} processes, {STEPS} steps", flush=True)
    print("  #  saved  goes on  lost  seconds  fault", flush=True)
    began = time.monotonic()
    try:
        with lasting(World(given.config, given.folder, given.processes, given.seed)) as world:
            for row in disturb(world, faults, given.faults):
                print(row, flush=True)
            world.wait_for(world.tend, "not at its end", 6 * PATIENCE)
    except Lost as lost:
        print(f"error: {lost}", file=sys.stderr)
        return 1
    print(f"{time.monotonic() - began:.0f} s, {len(world.records('start'))} starts", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
