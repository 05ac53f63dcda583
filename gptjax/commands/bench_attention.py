"""`gptjax bench attention`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from gptjax.config.fields import Positive, frozen


@frozen
class Command:
    """Measure dense against banded attention over the sequence length."""

    out: Path = Path("bench")
    """Folder for the results."""
    lengths: Annotated[tuple[Positive, ...], Field(min_length=1)] = (512, 1024, 2048, 4096, 8192, 16384, 32768)
    """Sequence lengths T."""
    window: Positive = 256
    """Keys that a banded query sees."""
    batch: Positive = 1
    """Sequences at once."""
    heads: Positive = 1
    """Heads of each."""
    head_dim: Positive = 64
    """Width of a head."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto is float32 on CPU, else bfloat16."""
    attention: Literal["auto", "blockwise", "cudnn", "splash", "reference"] = "auto"
    """A backend; auto picks by device."""

    def run(self) -> None:
        """Measure, write, and print the table."""
        import jax

        from gptjax.bench.attention import Settings, run

        default = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        shape = self.window, self.batch, self.heads, self.head_dim
        dtype = default if self.dtype == "auto" else self.dtype
        print(run(Settings(self.lengths, *shape, dtype, self.attention), self.out))
