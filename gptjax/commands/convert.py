"""`gptjax convert SRC DST`."""

from typing import Annotated, Literal

from gptjax.commands.arguments import Positional
from gptjax.config.fields import frozen


@frozen
class Command:
    """Turn a run folder into a directory that transformers loads (GPT-2, GPT-Neo), or such a directory into a run."""

    source: Annotated[str, Positional("SRC")]
    """A run folder, or a directory with config.json and safetensors."""
    target: Annotated[str, Positional("DST")]
    """The folder to write; new or empty."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights."""

    def run(self) -> None:
        """Convert, and print what was written."""
        from gptjax.stages.convert import convert

        print(convert(self.source, self.target, self.dtype))
