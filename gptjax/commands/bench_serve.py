"""`gptjax bench serve PATH`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from gptjax.commands.arguments import Positional
from gptjax.config.fields import Count, Positive, Seed, frozen


@frozen
class Command:
    """Time the server over loopback beside the bare engine, or put it under load and look for what it loses.

    The server, and the engine that it is compared with, are processes of their own; programs are compiled before
    anything is timed."""

    path: Annotated[str, Positional("PATH")]
    """A run folder, or a Hugging Face directory with GPT-2 or GPT-Neo."""
    out: Path = Path("bench")
    """Folder for the results."""
    load: Count = 0
    """Seconds under load: streams that break off or read slowly, requests that are too large or malformed, and seeded
    ones among them whose answers are known; 0 times the server instead."""
    streams: Positive = 16
    """Requests at once."""
    prompt: Positive = 64
    """Tokens of each prompt."""
    tokens: Positive = 64
    """Tokens of each reply."""
    slots: Positive = 16
    """Replies that the engine has in progress at once."""
    rounds: Positive = 5
    """Times that server and engine take turns."""
    weights: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """How parameters are held; auto is the type that the model computes in."""
    seed: Seed = 0
    """Of prompts, and of what the load does when."""
    timeout: Annotated[float, Field(gt=0)] = 600.0
    """Seconds until a process must be ready."""

    def run(self) -> None:
        """Measure, write, and print what was found."""
        from gptjax.bench.serve import Options, run

        how = self.streams, self.prompt, self.tokens, self.slots, self.rounds, self.weights, self.seed, self.timeout
        print(run(self.path, Options(*how), self.load, self.out))
