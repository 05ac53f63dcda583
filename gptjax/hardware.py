"""Facts of chips and their compilers."""

import re
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from gptjax.errors import UserError

# Dense bfloat16 peak in FLOP/s by jax's whole `device_kind`, since the cards of one name differ (H100: 989, 835 and 756
# TFLOP/s). NVIDIA's datasheets, half of what they give with sparsity; "How to Scale Your Model" for TPUs. Per device:
# a chip of TPU v2, v3 and 7x is two.
PEAK_FLOPS = {
    "NVIDIA GB200": 2.5e15,
    "NVIDIA B200": 2.25e15,
    "NVIDIA H200": 9.89e14,
    "NVIDIA H200 NVL": 8.35e14,
    "NVIDIA GH200 480GB": 9.89e14,
    "NVIDIA H100 80GB HBM3": 9.89e14,
    "NVIDIA H100 NVL": 8.35e14,
    "NVIDIA H100 PCIe": 7.56e14,
    "NVIDIA H20": 1.48e14,
    "NVIDIA A100-SXM4-80GB": 3.12e14,
    "NVIDIA A100-SXM4-40GB": 3.12e14,
    "NVIDIA A100 80GB PCIe": 3.12e14,
    "NVIDIA A100-PCIE-40GB": 3.12e14,
    "TPU7x": 1.15e15,
    "TPU v6 lite": 9.18e14,
    "TPU v6e": 9.18e14,
    "TPU v5": 4.59e14,
    "TPU v5p": 4.59e14,
    "TPU v5 lite": 1.97e14,
    "TPU v5e": 1.97e14,
    "TPU v4": 2.75e14,
    "TPU v4 lite": 1.37e14,
    "TPU v3": 7.0e13,
    "TPU v2": 2.3e13,
}


def peak_flops(device_kind: str) -> float | None:
    """Peak of one device, or None for a device that is not listed, a part of a card (MIG) among them: its MFU is then
    not printed, and never another card's."""
    return PEAK_FLOPS.get(device_kind)


def require_float8(device: Any) -> None:
    """Raises UserError for an NVIDIA GPU before Ada, whose compiler would emulate float8 without a word. CPUs emulate
    it to show the loss; for TPUs their compiler decides."""
    capability = re.fullmatch(r"(\d+)\.(\d+)", getattr(device, "compute_capability", ""))
    if capability and (int(capability[1]), int(capability[2])) < (8, 9):
        raise UserError(
            f"model.fp8 = true: {device.device_kind} (compute capability {capability[0]}) has no float8 products; "
            "use false, or a GPU of 8.9 or more"
        )


# Gathers start early and travel behind products; by default this compiler overlaps none. When bytes move changes, not
# what is computed. Of 175B on v5p-1024 (fsdp256_tp2_seq/dots/768, libtpu 0.0.42.1) 565 of 697 GB of weights and 87 of
# 191 GB of the residual then do so: of a step's 25.1 s, 5.6 are in the way without and 3.8 with them. Either alone
# changes nothing, and neither do on top of them the other options that pods are run with
# (`async_collective_fusion_multiple_steps`, `overlap_compute_collective_tc`, and that fusion, which is on as it is).
# Sums stay as they are: fused with products they gave NaN on v6e beside splash attention in a public report.
_GATHER_EARLY = {
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
}
COMPILER_OPTIONS: dict[str, dict[str, str]] = {
    # Products of queries, keys and values stay apart. Merged, as the compiler does with small ones, each is copied out
    # again: 4% of the bytes that the program for GPT-2 1558M moves at micro-batches of 8 (jaxlib 0.10.2).
    "gpu": {"xla_gpu_dot_merger_threshold_mb": "0"},
    # All but reductions off the YNNPACK path: 10-15% of a step of width 256 (jaxlib 0.10.2).
    "cpu": {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"},
    "TPU v5": _GATHER_EARLY,
}
"""What pays for the train step, by platform or, where chips of one differ, by jax's `device_kind`."""


def compiler_options(device: Any, deterministic: bool = False) -> dict[str, str]:
    """Options for the train step that pay on a device, which may be a stand-in, and that its compiler knows.

    `deterministic` leaves out a GPU's kernels whose sums depend on timing, and the autotuning that may choose another
    kernel after a restart; CPUs and TPUs need nothing.
    """
    wanted = COMPILER_OPTIONS.get(device.platform) or COMPILER_OPTIONS.get(device.device_kind, {})
    options = {name: value for name, value in wanted.items() if _is_known(name, value, device)}
    return options | ({"xla_gpu_deterministic_ops": "True"} if deterministic and device.platform == "gpu" else {})


@cache
def _is_known(name: str, value: str, device: Any) -> bool:
    """Whether a device's compiler takes an option, which a version may drop: tried on an empty program."""
    here = SingleDeviceSharding(device)
    number = jax.ShapeDtypeStruct((), np.float32, sharding=here)
    try:
        jax.jit(lambda x: x, out_shardings=here, compiler_options={name: value}).lower(number).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
