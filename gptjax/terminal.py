"""What standard output can show."""

import io
import sys


def show_anything() -> None:
    """A character that standard output cannot encode, of a sample or of ours, becomes a question mark and ends
    nothing."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
