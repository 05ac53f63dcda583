"""What several processes must agree on before they compute together: an error of one is everyone's error, and whoever
differs is named. With one process all of it is free."""

import json
import socket
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from gptjax.errors import UserError

X = TypeVar("X")
ROOM = 4096  # bytes


def is_first() -> bool:
    return jax.process_index() == 0


def warn(text: str) -> None:
    """One line on standard error, of the first process alone."""
    if is_first():
        print(f"warning: {text}", file=sys.stderr, flush=True)


def every(text: str) -> list[str]:
    """The text of each process. Sizes are rounded up, so that few programs are compiled."""
    if jax.process_count() == 1:
        return [text]
    data = text.encode()
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(data))))
    room = (int(sizes.max()) // ROOM + 1) * ROOM
    rows: Any = multihost_utils.process_allgather(np.frombuffer(data.ljust(room, b"\0"), np.uint8))
    return [row[:size].tobytes().decode() for row, size in zip(np.asarray(rows), sizes, strict=True)]


def together(action: Callable[[], X]) -> X:
    """`action` on every process, which must not itself talk to the others. Raises on all of them where it raises on
    one: a process that ends alone leaves the others waiting for it."""
    raised, result = None, None
    try:
        result = action()
    except Exception as error:
        raised = error
    errors = every("" if raised is None else str(raised) or type(raised).__name__)
    if raised is not None:
        raise raised
    for index, text in enumerate(errors):
        if text:
            raise UserError(f"process {index}: {text}")
    return result  # type: ignore[return-value]


def first(action: Callable[[], str]) -> str:
    """`action` on the first process; its text on all, or its UserError on all."""
    return every(together(lambda: action() if is_first() else ""))[0]


def compare(facts: Mapping[str, str]) -> None:
    """Raises UserError, on every process, that names the first fact in which processes differ, the odd one, and both
    values. All processes name the same facts."""
    if jax.process_count() == 1:
        return
    hosts, values = zip(*map(json.loads, every(json.dumps([socket.gethostname(), dict(facts)]))), strict=True)
    for name in facts:
        texts = [value.get(name, "nothing") for value in values]
        usual = Counter(texts).most_common(1)[0][0]
        if odd := [i for i, text in enumerate(texts) if text != usual]:
            raise UserError(
                f"{name}: process {odd[0]} on {hosts[odd[0]]} has {texts[odd[0]]}, most have {usual}; start the same "
                "code, config and data on every host"
            )
