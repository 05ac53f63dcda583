"""SIGTERM and Ctrl-C: a run finishes its step, saves and ends, on all of its processes at the same step."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

ASKED = "stopping: the step under way is finished and saved; Ctrl-C once more ends at once, without saving"


class StopFlag:
    """What this process has heard, and what all have agreed on.

    Several processes leave SIGTERM to JAX, which tells all of them of one's and picks the poll at which they stop. A
    Ctrl-C is handed on to it, as a SIGTERM to oneself.
    """

    def __init__(self) -> None:
        self.number = 0
        """The signal by which all processes stop, the same on each: it becomes their exit status. 0 until then."""
        self._heard = 0
        self._several = jax.process_count() > 1
        self._polls = 0

    def hear(self, number: int) -> None:
        """One signal to this process; a Ctrl-C after another signal does not return."""
        if self._heard and number == signal.SIGINT:
            _leave()
        print(ASKED, file=sys.stderr, flush=True)
        self._heard = number
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)

    def agreed(self) -> bool:
        """Whether all processes stop here. All must ask equally often: whoever stopped alone would leave the others
        waiting."""
        if not self._several:
            self.number = self._heard
            return bool(self.number)
        # Polls are counted, not steps: JAX picks the one after the last that any process has made. Before the first
        # poll that is number 1, a step which a resumed run has long passed.
        self._polls += 1
        if not multihost_utils.reached_preemption_sync_point(self._polls):
            return False
        # If anyone was interrupted all were: a launcher that starts again what SIGTERM has stopped must not.
        heard = multihost_utils.process_allgather(np.int32(self._heard))
        self.number = signal.SIGINT if heard.any() else signal.SIGTERM
        return True


@contextmanager
def signals() -> Iterator[StopFlag]:
    """Listen in a thread, which also hears what comes while the main thread compiles or waits for a device."""
    stop = StopFlag()
    numbers = (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGINT, signal.SIGTERM)
    ours, pythons = socket.socketpair()
    pythons.setblocking(False)
    listener = threading.Thread(target=_listen, args=(ours, numbers, stop), name="signals", daemon=True)
    listener.start()
    wakeup = signal.set_wakeup_fd(pythons.fileno())
    # Python writes the number of each signal that it handles; the handlers themselves have nothing left to do.
    handlers = {number: signal.signal(number, lambda *_: None) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        pythons.close()  # ends the thread
        listener.join()
        ours.close()


def _listen(source: socket.socket, numbers: tuple[int, ...], stop: StopFlag) -> None:
    while byte := source.recv(1):
        if byte[0] in numbers:
            stop.hear(byte[0])


def _leave() -> NoReturn:
    """At once: the way out through the stack waits for the save, and for the other processes up to five minutes."""
    if sys.stdout.isatty():
        os.write(sys.stdout.fileno(), b"\x1b[?25h\n")  # the progress bar hid the cursor
    os._exit(128 + signal.SIGINT)
