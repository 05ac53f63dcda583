"""GPT-2 in `transformers` as its users generate with it: the peer of `gptjax bench generate`.

    gptjax bench generate configs/gpt2_124m.py --peer tests/peers/generate_torch.py

Reads the job from standard input and answers with one line of JSON: random weights of the same shape, `generate` with
its cache, greedy, all requests of a workload in one batch, padded on the left to the longest prompt and run to the
longest reply. Only tokens that were asked for count. On a CPU float32, on a GPU bfloat16.
"""

import json
import sys
import time
from typing import Any

import numpy as np
import torch
import transformers


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Tokens per second and seconds to the first token of each workload."""
    model = job["config"]["model"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = transformers.GPT2Config(
        vocab_size=model["vocab_size"],
        n_positions=model["seq_len"],
        n_embd=model["embed_dim"],
        n_layer=model["num_layers"],
        n_head=model["num_heads"],
    )
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    net = transformers.GPT2LMHeadModel(config).to(device, dtype).eval()
    answers = {name: measured(net, work, model["vocab_size"], device) for name, work in job["workloads"].items()}
    how = f"transformers {transformers.__version__}, torch {torch.__version__}, {str(dtype)[6:]}"
    return {"status": "ok", "workloads": answers, "how": how}


@torch.inference_mode()
def measured(net: Any, work: list[list[int]], size: int, device: str) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, size, p) for p, _ in work]
    longest, most = max(p for p, _ in work), max(o for _, o in work)
    ids = np.stack([np.pad(prompt, (longest - len(prompt), 0)) for prompt in prompts])
    mask = np.stack([np.pad(np.ones(len(prompt), int), (longest - len(prompt), 0)) for prompt in prompts])
    inputs = {name: torch.tensor(x, device=device) for name, x in (("input_ids", ids), ("attention_mask", mask))}

    def timed(tokens: int) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        net.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    timed(2)
    first, whole = timed(1), timed(most)
    made = sum(o for _, o in work)
    each = (whole - first) / (most - 1) if most > 1 else None
    return {"seconds": whole, "tokens": made, "tokens_per_s": made / whole, "first_s": first, "each_s": each}


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.stdin.read()))))
