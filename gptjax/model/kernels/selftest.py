"""Does a vendor's kernel compute what it should on this machine? Known to fail on some pairs of CUDA and cuDNN."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gptjax.files import write_whole
from gptjax.model.attention import Attend, Mask, Need, reference

LENGTH, HEADS = 256, 2
TOLERANCE = 0.02  # bfloat16 keeps 8 bits: 0.004 of a value near 1, a few of them summed


def self_test(attend: Attend, need: Need) -> str | None:
    """Forward and all three gradients against the float32 reference; None, or what is wrong with which mask.

    The masks are taken at a small length: a window is cut to half of it, so that the band is really tried.
    """
    rng = np.random.default_rng(0)
    qkv = [jnp.asarray(rng.normal(size=(1, LENGTH, HEADS, need.head_dim)), need.dtype) for _ in range(3)]
    cotangent = jnp.asarray(rng.normal(size=qkv[0].shape), jnp.float32)

    def everything(function: Attend, mask: Mask, inputs: list[Array]) -> list[Array]:
        def loss(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
            out = function(q, k, v, mask, need.head_dim**-0.5, None)
            return jnp.sum(out.astype(jnp.float32) * cotangent), out

        grads, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*inputs)
        return [out, *grads]

    for mask in need.masks:
        small = mask if mask.window is None else Mask(min(mask.window, LENGTH // 2))
        try:
            want = everything(reference, small, [x.astype(jnp.float32) for x in qkv])
            got = everything(attend, small, qkv)
        except Exception as error:  # whatever the library raises, the answer is that it does not work here
            said = (str(error).strip() or type(error).__name__).splitlines()[0]  # MemoryError() says nothing
            return f"{small} raised {said[:160]}"
        # Of the largest of all four: with a window of 1 the gradients of q and k are zero but for rounding.
        largest = max(float(jnp.max(jnp.abs(b))) for b in want)
        for name, a, b in zip(("output", "gradient of q", "gradient of k", "gradient of v"), got, want, strict=True):
            worst = float(jnp.max(jnp.abs(a.astype(jnp.float32) - b))) / largest
            if not worst <= TOLERANCE:
                return f"{small}: {name} is off by {worst:.2g} of the largest value"
    return None


def remembered(cache: Path, attend: Attend, need: Need) -> str | None:
    """`self_test`, until it has passed once on this machine: `cache` lists what passed, by everything that it depends
    on. What fails is tried again at the next start, since it may be the memory that another program held."""
    device = jax.devices()[0]
    about = jax.__version__, device.client.platform_version, device.device_kind, need.masks, need.head_dim, need.dtype
    key = " | ".join(map(str, about)).replace("\n", " ")
    passed = _passed(cache)
    if key in passed:
        return None
    wrong = self_test(attend, need)
    if wrong is None:
        write_whole(cache, json.dumps([*passed, key], indent=2).encode())
    return wrong


def _passed(cache: Path) -> list[str]:
    """The keys in the file; none, and a line that says so, where it is not whole or of another form."""
    if not cache.is_file():
        return []
    try:
        keys = json.loads(cache.read_bytes())
    except ValueError:
        keys = None
    if isinstance(keys, list) and all(isinstance(key, str) for key in keys):
        return keys
    print(f"{cache}: not a list of passed self-tests; attention is tested again", file=sys.stderr)
    return []
