"""Whether a process of this host still lives, for those that left a mark behind."""

import os
from pathlib import Path


def born(pid: int) -> str:
    """When a process of this host started, as the kernel counts: a number that is used again is another process. Empty
    where there is none."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state == "Z" else rest[18]
    except (OSError, IndexError):
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except OSError:
        pass
    return "alive"
