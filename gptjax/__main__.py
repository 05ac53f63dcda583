"""The command `gptjax`, which `python -m gptjax` is, too: what must come before anything that takes long to import."""

import gc

from gptjax import malloc


def main() -> None:
    """The console script."""
    malloc.start_again()
    # A start makes a million objects that stay: to look through them at every 700 new ones is a tenth of its time, and
    # at every 100,000 still 0.2 s.
    gc.set_threshold(400_000, 20, 20)
    from gptjax import cli

    try:
        cli.main()
    finally:
        gc.freeze()  # nor once more at the end, which would be another half a second


if __name__ == "__main__":
    main()
