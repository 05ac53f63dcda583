"""How long a matrix product takes, by its shape."""

from dataclasses import dataclass

from gptjax.planner.chips import Chip

SUBLANES = 8  # rows that registers hold at once


@dataclass(frozen=True)
class Product:
    """[rows, inner] times [inner, outer]."""

    rows: float
    inner: float
    outer: float

    @property
    def flops(self) -> float:
        return 2 * self.rows * self.inner * self.outer

    @property
    def operands(self) -> float:
        """Numbers that go in."""
        return (self.rows + self.outer) * self.inner

    @property
    def of_input(self) -> "Product":
        """That of the gradient of the rows."""
        return Product(self.rows, self.outer, self.inner)

    @property
    def of_weights(self) -> "Product":
        """That of the gradient of the matrix."""
        return Product(self.inner, self.rows, self.outer)

    def seconds(self, chip: Chip, width: int, float8: bool = False) -> float:
        """FLOPs, padded to whole tiles, at the rate of large products, and the bytes of operands (`width` each, in
        float8 one) and result (`width`) at that of the memory: a product gets half of the rate where it computes as
        long as it reads.

        A chip without float8 products computes them as others.
        """
        rows, inner, outer = _whole(self.rows, SUBLANES), _whole(self.inner, chip.tile), _whole(self.outer, chip.tile)
        rate = chip.float8 * chip.matmul8 if float8 and chip.float8 else chip.flops * chip.matmul
        read = self.operands * (1 if float8 else width) + self.rows * self.outer * width
        return 2 * rows * inner * outer / rate + read / chip.hbm_rate


def cast(chip: Chip, numbers: float, width: int) -> float:
    """Seconds in which numbers of `width` bytes become float8: read for the largest, read once more, and written."""
    return numbers * (2 * width + 1) / chip.hbm_rate


def _whole(size: float, tile: int) -> float:
    return -(-size // tile) * tile
