"""The command `gptjax`, which `python -m gptjax` is, too: what must come before anything that takes long to import."""

import gc

from gptjax import malloc


def main() -> None:
    """The console script."""
    malloc.start_again()
    # A start makes a million objects that stay: to look through them at every 700 new ones is a tenth of its time.
    gc.set_threshold(100_000, 20, 20)
    from gptjax import cli

    cli.main()


if __name__ == "__main__":
    main()
