"""Is what this accelerator computes right? To be run on it before its speed is measured.

    python tests/gpu/check.py --text tinyshakespeare.txt --out check

1. The attention backend that `auto` chooses here, in bfloat16, against float64: output and gradients, dense and banded,
   no influence from outside the mask; the table of tests/test_attention.py on the real kernel.
2. 200 steps of tiny Shakespeare here and on the CPU: the curves differ by no more than those of two seeds on the CPU.
3. With deterministic kernels a run that stops halfway and resumes has the bits of one that does not.

Writes check.json, prints a line per check, and ends with status 1 if one fails. It runs on a CPU, too.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

ROOT = Path(__file__).parents[2]
LENGTH = 128  # cuDNN takes multiples of it
STEPS, TINY_STEPS, BATCH_TOKENS = 200, 60, 12 * LENGTH  # configs/shakespeare_cpu.py has 12 sequences a step
LENGTHS, WINDOWS, HEAD_DIMS = (128, 256, 1024, 2048), (None, 1, 2, 64, 256, 4096), (64, 80, 96, 128)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--text", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="fewer steps, one head size and two lengths, for a CPU")
    known = parser.parse_args()
    known.out.mkdir(parents=True, exist_ok=True)
    steps = TINY_STEPS if known.tiny else STEPS
    # The runs are processes of their own and come first: an accelerator serves one process at a time.
    checks = {
        "curve": curve(known.text, known.out, steps),
        "resume": resume(known.text, known.out, steps),
        "attention": attention(known.tiny),
    }
    from gptjax.bench.measure import provenance

    result = {**provenance(), "ok": all(check["ok"] for check in checks.values()), **checks}
    (known.out / "check.json").write_text(json.dumps(result, indent=1) + "\n")
    for name, check in checks.items():
        print(f"{name:10}{'ok' if check['ok'] else 'WRONG'}  {check['says']}")
    return int(not result["ok"])


def train(run: Path, text: str, steps: int, *extra: str, cpu: bool = False) -> list[float]:
    """The logged losses of a run of so many steps."""
    tokens = str(steps * BATCH_TOKENS)
    command = [sys.executable, "-m", "gptjax", "train", "configs/shakespeare_cpu.py", "--data.source", text]
    command += ["--run", str(run), "--train.total_tokens", tokens, "--train.eval_batches", "0", "--data.lanes", "1"]
    command += ["--train.log_interval", "10", "--model.seq_len", str(LENGTH)]
    environment = os.environ | ({"JAX_PLATFORMS": "cpu"} if cpu else {})
    done = subprocess.run([*command, *extra], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return losses(run)


def losses(run: Path) -> list[float]:
    from gptjax.train.metrics import read_log
    from gptjax.train.run import LOG

    return [record["loss"] for record in read_log(run / LOG) if record["kind"] == "train"]


def curve(text: str, out: Path, steps: int) -> dict[str, Any]:
    here = np.array(train(out / "here", text, steps))
    cpu = np.array(train(out / "cpu", text, steps, cpu=True))
    other = np.array(train(out / "seed", text, steps, "--train.seed", "1", cpu=True))
    away, noise = np.abs(here - cpu).max(), np.abs(other - cpu).max()
    says = (
        f"{len(here)} logged losses of {steps} steps: at most {away:.4f} nats from the CPU's; another seed {noise:.4f}"
    )
    return {"ok": bool(away <= noise and here[-1] < here[0] - 1), "says": says, "here": [*here], "cpu": [*cpu]}


def resume(text: str, out: Path, steps: int) -> dict[str, Any]:
    import jax
    from test_train import saved

    switch = ("--train.deterministic", "true")
    whole = train(out / "whole", text, steps, *switch)
    train(out / "parts", text, steps // 2, *switch)
    command = [sys.executable, "-m", "gptjax", "train", "--resume", str(out / "parts")]
    tokens = ("--train.total_tokens", str(steps * BATCH_TOKENS))
    subprocess.run([*command, *tokens], cwd=ROOT, check=True, capture_output=True)
    same = losses(out / "parts") == whole
    a, b = (jax.tree.leaves(saved(out / name, steps)["arrays"]) for name in ("whole", "parts"))
    different = sum(x.tobytes() != y.tobytes() for x, y in zip(a, b, strict=True))
    says = f"{len(a)} arrays after step {steps}, {different} differ; the logged losses are {'' if same else 'not '}"
    return {"ok": same and not different, "says": says + "the same"}


def attention(tiny: bool) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    import test_attention as table

    from gptjax.model.attention import Mask, Need
    from gptjax.model.kernels import BACKENDS, choose

    rows, dtype = [], "bfloat16"
    head_dims, lengths = (HEAD_DIMS[:1], LENGTHS[:2]) if tiny else (HEAD_DIMS, LENGTHS)
    for head_dim in head_dims:
        masks = tuple(Mask(window) for window in WINDOWS)
        need = Need(jax.default_backend(), jnp.dtype(dtype), head_dim, LENGTHS[0], masks)
        backend, why = choose("auto", need)
        table.ATTEND[backend] = BACKENDS[backend].attend
        for length in lengths:
            for window in WINDOWS:
                errors = table.measure(backend, Mask(window), length, head_dim, dtype)
                rows.append({"head_dim": head_dim, "length": length, "window": window, "errors": [*map(float, errors)]})
    worst = float(max(max(row["errors"]) for row in rows))
    says = f"{backend} ({why}): {len(rows)} cells, largest error {worst:.1e} of the largest value"
    return {"ok": bool(worst <= table.TOLERANCE[dtype]), "says": says, "backend": backend, "rows": rows}


if __name__ == "__main__":
    sys.exit(main())
