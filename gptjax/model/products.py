"""Products of activations with the layers' matrices, as a layout, a number format and a device want them.

Letters of a matrix: `in` are the axes that are summed over, `out` those of the result.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gptjax.model.fp8 import BACKWARD, FORWARD, Scaled, dot_general, quantise

Axes = tuple[str | None, ...]


@dataclass(frozen=True)
class Product:
    """How products are made, and how the matrices lie for it."""

    merge_rows: bool = True
    fp8: bool = False
    outputs_first: bool = False
    """For a CPU that decodes: products of 16 rows with twelve matrices of 768 by 3,072 and twelve of 3,072 by 768 take
    17 ms so, and 31 with matrices as they are trained (jaxlib 0.10.2, two cores)."""

    def __call__(self, x: Array, kernel: Array, num_in: int) -> Array:
        """x [..., *in] times a kernel that lies as `lie` says: [..., *out]."""
        if self.outputs_first:
            return multiply_outputs_first(x, kernel, num_in)
        return multiply(x, kernel, num_in, self.merge_rows, self.fp8)

    def lie(self, shape: tuple[int, ...], axes: Axes, num_in: int) -> tuple[tuple[int, ...], Axes]:
        """The shape and the axes' names in memory of a matrix [*in, *out]."""
        if not self.outputs_first:
            return shape, axes
        return shape[num_in:] + shape[:num_in], axes[num_in:] + axes[:num_in]


def multiply_outputs_first(x: Array, kernel: Array, num_in: int, dtype: Any = None) -> Array:
    """`multiply` by a kernel [*out, *in], without a gradient. dtype: of the result, that of x unless given."""
    num_out = kernel.ndim - num_in
    contracted = _last(kernel, num_in), _last(x, num_in)
    out = jax.lax.dot_general(kernel, x, (contracted, ((), ())), preferred_element_type=dtype)  # [*out, ...]
    # Behind the barrier the compiler leaves the operands in this order, which it would turn.
    return jnp.moveaxis(jax.lax.optimization_barrier(out), range(num_out), range(-num_out, 0))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def multiply(x: Array, kernel: Array, num_in: int, merge_rows: bool, fp8: bool) -> Array:
    """x [..., *in] times kernel [*in, *out] over the num_in axes of `in`: [..., *out], one plain product.

    The gradient is spelled out for the form of one product alone: the weight's is [rows, in]ᵀ [rows, out], where
    autodiff contracts several axes and transposes, which costs a fifth of a step of width 256 on CPU. Without
    `merge_rows` the weight's gradient contracts the axes of rows one by one. With `fp8` all three products are in
    float8.
    """
    return _multiply_forward(x, kernel, num_in, merge_rows, fp8)[0]


def _last(x: Array, count: int) -> tuple[int, ...]:
    return tuple(range(x.ndim - count, x.ndim))


def _multiply_forward(
    x: Array, kernel: Array, num_in: int, merge_rows: bool, fp8: bool
) -> tuple[Array, tuple[Scaled, Scaled]]:
    dims = (_last(x, num_in), tuple(range(num_in))), ((), ())
    a, b = (quantise(y, FORWARD) if fp8 else Scaled(y) for y in (x, kernel))
    return dot_general(a, b, dims, x.dtype), (a, b)


def _multiply_backward(
    num_in: int, merge_rows: bool, fp8: bool, saved: tuple[Scaled, Scaled], grad: Array
) -> tuple[Array, Array]:
    x, kernel = saved
    out = quantise(grad, BACKWARD) if fp8 else Scaled(grad)
    shape = kernel.values.shape
    ins, outs = shape[:num_in], shape[num_in:]
    contracted = _last(grad, len(outs)), tuple(range(num_in, len(shape)))
    grad_x = dot_general(out, kernel, (contracted, ((), ())), grad.dtype)
    lead = (-1,) if merge_rows else grad.shape[: grad.ndim - len(outs)]
    rows = x.reshape(*lead, *ins), out.reshape(*lead, *outs)  # heads apart: merged, a split of them would be gathered
    axes = tuple(range(len(lead)))
    return grad_x, dot_general(*rows, ((axes, axes), ((), ())), grad.dtype)


multiply.defvjp(_multiply_forward, _multiply_backward)
