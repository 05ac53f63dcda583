"""The train step against PyTorch's GPT-2 on this CPU, in one run, and where our time goes.

    .venv-test/bin/pip install -c constraints.txt -e '.[peers]'
    .venv-test/bin/python tests/peers/bench_step.py

Same sizes, same batch, float32, forward + backward + clip + AdamW. Each side is a process of its own that
waits while the other one steps, so neither's threads disturb the other; the medians of many short turns are
compared. gptjax runs with the malloc settings that its command line sets for itself, PyTorch as its users run
it, and once more with the same settings. Writes step.json beside this file.
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median

from gptjax.malloc import SETTINGS as MALLOC

SIZES = {  # layers, heads, width, context, batch, vocabulary: those of nanoGPT's CPU run, and a wider one
    "width 128, context 64": (4, 4, 128, 64, 12, 65),
    "width 256, context 256": (4, 4, 256, 256, 12, 65),
}
TURNS, STEPS = 10, 5


def main() -> None:
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("jax", "torch", "transformers")},
        "sizes": {},
    }
    print(f"{'size':24}{'gptjax':>11}{'PyTorch':>11}{'ratio':>7}{'same malloc':>13}{'ratio':>7}   share of our step")
    for name, size in SIZES.items():
        row = compare(size)
        result["sizes"][name] = row
        parts = ", ".join(f"{part} {share:.0%}" for part, share in row["parts"].items())
        figures = f"{row['gptjax_ms']:>8.1f} ms{row['torch_ms']:>8.1f} ms{row['ratio']:>7.2f}"
        figures += f"{row['torch_same_malloc_ms']:>10.1f} ms{row['ratio_same_malloc']:>7.2f}"
        print(f"{name:24}{figures}   {parts}", flush=True)
    Path(__file__).with_name("step.json").write_text(json.dumps(result, indent=2) + "\n")


def compare(size: tuple[int, ...]) -> dict:
    """Median milliseconds of all sides, the medians of the turn-by-turn ratios, and our parts."""
    default = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    tuned = default | {"GLIBC_TUNABLES": MALLOC, "JAX_PLATFORMS": "cpu"}
    workers = Worker("gptjax", size, tuned), Worker("torch", size, default), Worker("torch", size, tuned)
    turns = [[worker.turn("step") for worker in workers] for _ in range(TURNS)]
    parts = {part: median(workers[0].turn(part) for _ in range(5)) for part in ("forward", "gradient", "step")}
    for worker in workers:
        worker.close()
    forward, gradient, step = (parts[name] for name in ("forward", "gradient", "step"))
    ours, theirs, same = (median(column) for column in zip(*turns, strict=True))
    return {
        "gptjax_ms": ours,
        "torch_ms": theirs,
        "torch_same_malloc_ms": same,
        "ratio": median(a / b for a, b, _ in turns),
        "ratio_same_malloc": median(a / c for a, _, c in turns),
        "parts": {
            "forward": forward / step,
            "backward": (gradient - forward) / step,
            "clip and AdamW": (step - gradient) / step,
        },
    }


class Worker:
    """One side in its own process: a line in names what to time, a line out is milliseconds per step."""

    def __init__(self, side: str, size: tuple[int, ...], environment: dict[str, str]):
        command = [sys.executable, __file__, side, *map(str, size)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=environment, **pipes)
        self.turn("step")  # compiles, warms up

    def turn(self, what: str) -> float:
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def serve(functions: dict[str, Callable[[], None]]) -> None:
    """The worker's loop."""
    for line in sys.stdin:
        run = functions[line.strip()]
        run()  # caches are the other side's
        start = time.perf_counter()
        for _ in range(STEPS):
            run()
        print((time.perf_counter() - start) / STEPS * 1e3, flush=True)


def gptjax_side(layers: int, heads: int, width: int, context: int, batch: int, vocab: int) -> dict[str, Callable]:
    import jax
    import numpy as np

    from gptjax.config import Config, ModelConfig, TrainConfig
    from gptjax.data.rows import next_token
    from gptjax.hardware import compiler_options
    from gptjax.sharding.mesh import make_mesh
    from gptjax.sharding.rules import Layout, rule_table
    from gptjax.stages.pretrain import Pretrain
    from gptjax.train.step import abstract_state, init_state, make_step

    model = ModelConfig(layers, heads, width, seq_len=context, vocab_size=vocab, scan_layers=False)
    config = Config("bench", model, train=TrainConfig(batch_size=batch))
    layout = Layout(make_mesh(config), rule_table(config.layout))
    stage = Pretrain(config, "cpu", layout)
    step = make_step(config, stage, layout.shardings(abstract_state(config, stage)), layout)
    options = compiler_options("cpu")
    forward = jax.jit(lambda p, r: stage.loss(p, r, stage.counts(r), None), compiler_options=options)
    gradient = jax.jit(jax.grad(lambda p, r: stage.loss(p, r, stage.counts(r), None)), compiler_options=options)
    rows = next_token(np.random.default_rng(0).integers(0, vocab, (1, batch, context + 1)).astype(np.int32))
    first = jax.tree.map(lambda leaf: leaf[0], rows)
    held = {"state": init_state(config, stage, layout.shardings(abstract_state(config, stage)))}

    def one_step() -> None:
        held["state"], metrics = step(held["state"], rows, np.float32(1e-3), np.int32(1), np.int32(0))
        jax.block_until_ready(metrics)

    return {
        "step": one_step,
        "forward": lambda: jax.block_until_ready(forward(held["state"].params, first)),
        "gradient": lambda: jax.block_until_ready(gradient(held["state"].params, first)),
    }


def torch_side(layers: int, heads: int, width: int, context: int, batch: int, vocab: int) -> dict[str, Callable]:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    sizes = {"n_layer": layers, "n_head": heads, "n_embd": width, "n_positions": context, "vocab_size": vocab}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    decay = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    ids = torch.randint(0, vocab, (batch, context + 1), generator=torch.Generator().manual_seed(0))

    def one_step() -> None:
        optimizer.zero_grad(set_to_none=True)
        scores = model(ids[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(scores.reshape(-1, vocab), ids[:, 1:].reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return {"step": one_step}


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        sides = {"gptjax": gptjax_side, "torch": torch_side}
        serve(sides[sys.argv[1]](*map(int, sys.argv[2:])))
