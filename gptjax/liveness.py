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


def age() -> float:
    """Seconds since this process started; 0 where the system does not tell."""
    try:
        since_boot = float(Path("/proc/uptime").read_text().split()[0])
        return max(0.0, since_boot - int(born(os.getpid())) / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError):
        return 0.0
