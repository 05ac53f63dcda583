"""One of several processes: where the others are, and how it meets them."""

import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from gptjax.errors import UserError
from gptjax.train.parting import watch

TIMEOUT = 300
"""Seconds that a process waits for the others."""
ADDRESS, COUNT, INDEX = NAMES = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
REMEDY = f"set {', '.join(NAMES)} (host:port, how many, which from 0), or run on a TPU pod or under SLURM"


@dataclass(frozen=True)
class Where:
    """Process 0 of `count` listens, on `listen` where its host has several addresses; the others connect to it."""

    host: str
    port: int
    count: int
    index: int
    listen: tuple[str, int]


def join(environment: Mapping[str, str]) -> None:
    """Join the other processes: JAX finds them by itself on TPU pods and under SLURM, elsewhere the environment says
    where.

    Prints what it waits for: JAX ends a process whose peers do not come by SIGABRT, without a word that helps. Raises
    UserError where neither says where, and where the port is taken or process 0 not to be reached.
    """
    where = read(environment)
    until = time.monotonic() + TIMEOUT
    given: dict[str, Any] = {}
    if where is None:
        _say(f"joins the processes that JAX finds, and waits for them at most {TIMEOUT} s")
    else:
        at, us = environment[ADDRESS], f"process {where.index} of {where.count}"
        given = {"coordinator_address": at, "num_processes": where.count, "process_id": where.index}
        if where.index == 0:
            _require_free(*where.listen)
            _say(f"{us} listens at {at}, and waits for the others at most {TIMEOUT} s")
        else:
            _say(f"{us} connects to {at}, and waits for the others at most {TIMEOUT} s")
            _reach(where, until)
    # On a CPU programs that are under way at once run in any order, and processes that sum and gather in different
    # orders wait for each other for ever. Accelerators have queues.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        jax.distributed.initialize(**given, initialization_timeout=max(1, round(until - time.monotonic())))
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--distributed: {str(error).splitlines()[0].rstrip('.')}; {REMEDY}") from error
    watch()


def read(environment: Mapping[str, str]) -> Where | None:
    """Where the environment says the processes are; None if it leaves that to JAX. Raises UserError for a value that
    is wrong or missing."""
    for name in ("JAX_COORDINATOR_PORT", "JAX_PARTITION_INDEX"):  # read by JAX itself, as are the two below
        if text := environment.get(name):
            _number(name, text, 0)
    ids = environment.get("JAX_LOCAL_DEVICE_IDS", "")
    if ids and not re.fullmatch(r"[0-9]+(,[0-9]+)*", ids):
        raise UserError(f"--distributed: JAX_LOCAL_DEVICE_IDS = {ids}: must be numbers with commas, such as 0,1")
    given = [name for name in NAMES if environment.get(name)]
    if not given:
        return None
    if missing := [name for name in NAMES if name not in given]:
        raise UserError(f"--distributed: {missing[0]} is not set; {REMEDY}")
    host, port = _address(ADDRESS, environment[ADDRESS])
    count, index = _number(COUNT, environment[COUNT], 1), _number(INDEX, environment[INDEX], 0)
    if index >= count:
        raise UserError(f"--distributed: {INDEX} = {index}: counts from 0 up to {COUNT} - 1; nearest {count - 1}")
    bind = environment.get("JAX_COORDINATOR_BIND_ADDRESS", "")
    return Where(host, port, count, index, _address("JAX_COORDINATOR_BIND_ADDRESS", bind) if bind else ("", port))


def _number(name: str, text: str, least: int) -> int:
    if not re.fullmatch(r"[0-9]+", text) or int(text) < least:
        raise UserError(f"--distributed: {name} = {text}: must be a whole number of {least} or more; nearest {least}")
    return int(text)


def _address(name: str, text: str) -> tuple[str, int]:
    """(host, port)"""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+)):([0-9]{1,5})", text)
    if match is None or not 0 < int(match[3]) < 1 << 16:
        raise UserError(
            f"--distributed: {name} = {text}: must be HOST:PORT with a port of 1 to 65535, such as localhost:8476 or "
            "[fd00::1]:8476"
        )
    return match[1] or match[2], int(match[3])


def _require_free(host: str, port: int) -> None:
    """JAX's own attempt at a port that is taken is a segmentation fault."""
    everywhere = socket.has_dualstack_ipv6() and host in ("", "::")
    family = socket.AF_INET6 if everywhere or ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what an earlier run left does not count
            if everywhere:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            probe.bind((host, port))
    except OSError as error:
        raise UserError(
            f"--distributed: process 0 cannot listen at port {port}: {error.strerror}; end what does, or give all "
            f"processes another port in {ADDRESS}"
        ) from error


def _reach(where: Where, until: float) -> None:
    """Wait for somebody to listen where process 0 should: that much can be said before JAX aborts."""
    while True:
        try:
            socket.create_connection((where.host, where.port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise UserError(
                    f"--distributed: nobody listens at {where.host} port {where.port} after {TIMEOUT} s ({error}); "
                    f"start process 0 there, or correct {ADDRESS}"
                ) from error
        time.sleep(0.2)


def _say(text: str) -> None:
    print(f"--distributed: {text}", flush=True)
