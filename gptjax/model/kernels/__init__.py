"""The attention backends, and which of them serves: chosen by device, or named and then never exchanged in silence."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from gptjax.errors import UserError
from gptjax.model.attention import Attend, Need, reference, refuse_beyond
from gptjax.model.kernels import blockwise, cudnn, splash
from gptjax.model.kernels.selftest import remembered


class Backend(NamedTuple):
    """An implementation and its limits."""

    attend: Attend
    refuse: Callable[[Need], str | None]
    """Why it cannot serve a need, or None."""
    tested: bool = True
    """False for a vendor's kernel that must first pass the self-test on the machine it runs on."""


def _anything(need: Need) -> None:
    return None


BACKENDS = {
    "blockwise": Backend(blockwise.attend, _anything),
    "cudnn": Backend(cudnn.attend, cudnn.refuse, tested=False),
    "splash": Backend(splash.attend, splash.refuse),
    "reference": Backend(reference, refuse_beyond),
}
PREFERRED = {"gpu": "cudnn", "tpu": "splash"}
SELF_TESTS = Path("~/.cache/gptjax/attention.json")


def choose(name: str, need: Need, self_tests: Path = SELF_TESTS) -> tuple[str, str]:
    """The backend for `model.attention` and the reason for it.

    `auto` takes the platform's own kernel, or blockwise with the reason why not. Raises UserError where a named
    backend cannot honour the need, naming those that can.
    """
    if name == "auto":
        first = PREFERRED.get(need.platform)
        if first is None:
            return "blockwise", f"portable O(T·W) path, the fastest tested on {need.platform}"
        reason = _refusal(first, need, self_tests)
        if reason is None:
            return first, f"the kernel for {need.platform}"
        return "blockwise", f"portable O(T·W) path, since {first} cannot serve: {reason}"
    if name not in BACKENDS:
        raise UserError(f"attention {name}: no such backend; choose from auto, {', '.join(BACKENDS)}")
    if reason := _refusal(name, need, self_tests):
        able = [other for other in BACKENDS if other != name and _refusal(other, need, self_tests) is None]
        raise UserError(f"model.attention = {name}: {reason}; choose from auto, {', '.join(able)}")
    return name, "named by the config"


def _refusal(name: str, need: Need, self_tests: Path) -> str | None:
    backend = BACKENDS[name]
    if (reason := backend.refuse(need)) or backend.tested:
        return reason
    wrong = remembered(self_tests.expanduser(), backend.attend, need)
    return wrong and f"it failed its self-test at this start (the next one tries again): {wrong}"
