"""Real processes of this machine, joined over the loopback as those of several hosts are."""

import socket
import subprocess
import sys

from devices import environment


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def place(index: int, port: int, count: int = 2) -> dict[str, str]:
    """What a process reads of the others."""
    where = f"127.0.0.1:{port}"
    return {"JAX_COORDINATOR_ADDRESS": where, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(index)}


def start(words: list[str], devices: int, before: list[str], **more: str) -> "subprocess.Popen[str]":
    command = [*before, sys.executable, "-m", "gptjax", "train", *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment(devices, **more), stdout=pipe, stderr=pipe, text=True)


def together(*words: list[str], devices: int = 2, before: list[list[str]] | None = None) -> list[tuple[int, str, str]]:
    """(status, output, errors) of processes with words and devices of their own, each perhaps started by another
    command."""
    port, count = free_port(), len(words)
    each = zip(words, before or [[]] * count, strict=True)
    processes = [
        start([*own, "--distributed"], devices, first, **place(index, port, count))
        for index, (own, first) in enumerate(each)
    ]
    done = [process.communicate(timeout=900) for process in processes]
    return [(p.returncode, out, errors) for p, (out, errors) in zip(processes, done, strict=True)]
