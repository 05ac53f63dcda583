"""JAX's splash attention on TPU: a Pallas kernel that skips the blocks a mask does not touch, both ways."""

import jax
import jax.numpy as jnp
from jax import Array

from gptjax.model.attention import KEPT, Mask, Need, refuse_beyond

HEAD_DIMS = (64, 80, 96, 128)
LANES = 128  # its blocks of keys are multiples of a vector register's lanes
DENSE_BLOCK, BANDED_BLOCK = 512, 256  # a band of 256 in blocks of 512 would compute 3 times what it needs


def block_size(mask: Mask, length: int) -> int:
    """The largest block that pays for the mask and divides a length that is a multiple of LANES."""
    best = DENSE_BLOCK if mask.window is None else BANDED_BLOCK if mask.window > LANES else LANES
    return max(size for size in (128, 256, 512) if size <= best and length % size == 0)


def attend(
    q: Array, k: Array, v: Array, mask: Mask, scale: float, segments: Array | None = None, *, interpret: bool = False
) -> Array:
    """See attention.Attend. The length is padded to a multiple of LANES; `interpret` runs without a TPU."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels

    length, heads = q.shape[1:3]
    mask = mask.within(length)
    tail = -length % LANES
    if tail and not mask.causal and segments is None:  # a causal query never sees the padding behind it
        segments = jnp.zeros(q.shape[:2], jnp.int32)
    ids = None
    if segments is not None:
        padded = jnp.pad(segments, ((0, 0), (0, tail)), constant_values=-1)
        ids = kernels.SegmentIds(padded, padded)
    kernel = _kernel(mask, length + tail, heads, interpret)
    qkv = (jnp.pad(x, ((0, 0), (0, tail), (0, 0), (0, 0))).swapaxes(1, 2) for x in (q * scale, k, v))
    out = jax.vmap(kernel)(*qkv, ids)
    return out.swapaxes(1, 2)[:, :length]


def _kernel(mask: Mask, length: int, heads: int, interpret: bool):  # type: ignore[no-untyped-def]
    """For q, k, v [H, T, K]. The masks are computed in the kernel from indices, never as arrays [T, T]."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape = (length, length)
    one: masks.Mask = masks.CausalMask(shape) if mask.causal else masks.FullMask(shape)
    if mask.window is not None:
        one = masks.LocalMask(shape, (mask.window - 1, 0), 0)
    sizes = (block_size(mask, length),) * 8  # the kernel of the output, then those of dk and dv, then that of dq
    return kernels.make_splash_mha(
        mask=masks.MultiHeadMask([one] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=kernels.BlockSizes(*sizes),
        residual_checkpoint_name=KEPT,
        interpret=interpret,
    )


def refuse(need: Need) -> str | None:
    """Why splash attention cannot serve, or None."""
    if need.platform != "tpu":
        return f"it runs on TPU and this is {need.platform}"
    if need.head_dim not in HEAD_DIMS:
        return f"head size {need.head_dim} is not one of {', '.join(map(str, HEAD_DIMS))}"
    if need.dtype.itemsize > 4:
        return f"{need.dtype} is not supported; use float32 or bfloat16"
    return refuse_beyond(need)
