"""cuDNN's flash attention on NVIDIA GPUs, through JAX: dense, and banded with the tiles outside the band skipped."""

import jax
from jax import Array

from gptjax.errors import UserError
from gptjax.model.attention import Mask, Need, refuse_beyond

TILE = 128  # cuDNN up to 9.15 has a wrong backward pass under CUDA graphs for other lengths


def attend(q: Array, k: Array, v: Array, mask: Mask, scale: float, segments: Array | None = None) -> Array:
    """See attention.Attend. Raises UserError for segments, which the public JAX function does not take."""
    if segments is not None:
        raise UserError("model.attention = cudnn: cannot keep documents apart; use blockwise")
    mask = mask.within(q.shape[1])
    # A window without is_causal sees the future without a word (jax PR 39576); Mask has none such.
    window = None if mask.window is None else (mask.window - 1, 0)
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=mask.causal, local_window_size=window, implementation="cudnn"
    )


def refuse(need: Need) -> str | None:
    """Why cuDNN cannot serve, or None. Whether it computes what it should is the self-test's to say."""
    if need.platform != "gpu":
        return f"it runs on NVIDIA GPUs and this is {need.platform}"
    device = jax.devices()[0]
    if "nvidia" not in device.device_kind.lower():
        return f"it runs on NVIDIA GPUs and this is {device.device_kind}"
    if str(need.dtype) not in ("bfloat16", "float16"):
        return f"it computes in bfloat16 and float16, not in {need.dtype}; set model.dtype bfloat16"
    most = 256 if float(device.compute_capability) >= 9 else 128
    if need.head_dim % 8 or need.head_dim > most:
        return f"head size {need.head_dim} is not a multiple of 8 up to {most}"
    if need.length % TILE:
        return f"model.seq_len = {need.length} is not a multiple of {TILE}"
    if need.deterministic:  # jaxlib 0.11.2 ends the step with an IndexError, whatever else its options are
        return "it does not run in a deterministic step (train.deterministic)"
    if need.segments:
        return "it cannot keep documents apart (segments)"
    return refuse_beyond(need)
