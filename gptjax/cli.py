"""`gptjax VERB ...`: which verb there is. Errors of the user's making are one line and exit status 1."""

import importlib
import os
import signal
import sys

from gptjax.commands.arguments import HELP, read, usage
from gptjax.config import Config
from gptjax.config.fields import explained
from gptjax.config.load import stage_of
from gptjax.errors import UserError
from gptjax.terminal import show_anything

VERBS = (
    "train",
    "run",
    "sample",
    "tell",
    "chat",
    "look",
    "label",
    "serve",
    "eval",
    "convert",
    "recipe",
    "report",
    "checkpoint ls",
    "checkpoint verify",
    "checkpoint inspect",
    "data build",
    "data stats",
    "data view",
    "data",
    "tokenizer train",
    "plan",
    "bench attention",
    "bench corpus",
    "bench data",
    "bench generate",
    "bench layouts",
    "bench ppo",
    "bench save",
    "bench serve",
    "bench single",
)
"""Each is gptjax/commands/VERB.py."""


def main() -> None:
    """All of the command, of what `gptjax.__main__` has prepared."""
    # Nothing else runs on a GPU that trains: JAX's own 75% would leave a quarter of its memory to nobody.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    show_anything()
    try:
        sys.exit(run(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def run(words: list[str]) -> int:
    """Find the verb, read its arguments, do it; returns the exit status."""
    verb = next((verb for verb in VERBS if words[: len(verb.split())] == verb.split()), None)
    if verb is None:
        return _no_verb(words)
    rest = words[len(verb.split()) :]
    command = _command(verb)
    if any(word in HELP for word in rest):
        file = next((word for word in rest if word.endswith(".py")), "")
        print(usage(verb, command, stage_of(file)))
        return 0
    done = read(verb, command, rest)
    with explained(Config):  # also a config that a verb makes of its arguments
        return done.run() or 0


def _command(verb: str) -> type:
    command: type = importlib.import_module(f"gptjax.commands.{verb.replace(' ', '_')}").Command
    return command


def _no_verb(words: list[str]) -> int:
    group = [verb for verb in VERBS if words and verb.split()[0] == words[0]]
    if not words or words[0] in HELP or (group and words[1:2] and words[1] in HELP):
        width = max(map(len, VERBS)) + 2
        print("usage: gptjax VERB ...   (gptjax VERB --help says more)\n")
        for verb in group or VERBS:
            print(f"  {verb:{width}}{(_command(verb).__doc__ or '').strip().splitlines()[0]}")
        return 0
    raise UserError(f"gptjax {' '.join(words[: 1 + bool(group)])}: choose from {', '.join(group or VERBS)}")
