"""One of several processes that ends by an error: it says why, leaves soon and with its status, and so do the others.

Left to itself Python's end waits in JAX's shutdown barrier, five minutes for processes that wait in a sum for this one,
and then all are aborted; elsewhere a lost process is missed after the heartbeat's 100 seconds.
"""

import atexit
import faulthandler
import os
import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread
from typing import Any

import jax
from jax._src import distributed

from gptjax.errors import UserError

KEY = "gptjax/left"
"""Where JAX's coordinator keeps the reason of the first that leaves."""
LOOKS = 1.0  # seconds between two looks there
# Seconds that are left to each for the way out: for locks, for a save that is under way, and for others that end by the
# same error with words of their own. The first process is the coordinator: whoever outlives it is aborted.
OWN, OTHERS, FIRST = 3.0, 4.0, 7.0


def watch() -> None:
    """End this process when another one leaves by an error, wherever it waits."""
    done = Event()
    thread = Thread(target=_watch, args=(done,), name="parting", daemon=True)
    thread.start()

    def stop() -> None:
        done.set()
        thread.join()

    atexit.register(stop)  # before JAX's own end, in which it must not ask any more


def _watch(done: Event) -> None:
    while not done.wait(LOOKS):
        with suppress(Exception):  # there is none; of a coordinator that is gone JAX makes an end
            reason = _client().key_value_try_get(KEY)
            if reason.startswith(_named()):
                return  # which is on its way
            if done.wait(FIRST if jax.process_index() == 0 else OTHERS):
                return
            print(f"error: {reason}", file=sys.stderr, flush=True)
            os._exit(1)


def _named() -> str:
    return f"process {jax.process_index()} on {socket.gethostname()}"


def _client() -> Any:
    """JAX's to its coordinator, which it gives to nobody by a public name."""
    return distributed.global_state.client


@contextmanager
def parting() -> Iterator[None]:
    """An error within is told at once and becomes exit status 1, with a limit on the time that the way out takes. With
    one process it goes on as it is."""
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:
            raise
        if isinstance(error, UserError):
            print(f"error: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        # A thread of C, which no lock of Python's holds up; what it writes first, all stacks, is of no use here.
        limit = FIRST if jax.process_index() == 0 else OWN
        faulthandler.dump_traceback_later(limit, exit=True, file=open(os.devnull, "w"))  # noqa: SIM115
        said = str(error).splitlines() or [""]
        with suppress(Exception):  # another was first, or there is no coordinator any more
            _client().key_value_set(KEY, f"{_named()} ended: {type(error).__name__}: {said[0]}")
        raise SystemExit(1) from None
