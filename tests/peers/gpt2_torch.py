"""GPT-2 in PyTorch as its users train it: the peer of `gptjax bench single`.

    gptjax bench single configs/gpt2_124m.py --peer tests/peers/gpt2_torch.py

Reads the job from standard input and answers with one line of JSON, like gptjax's own trials: the same sizes, batch,
micro-batches, clip and AdamW groups on random tokens. On a GPU: torch.compile, flash attention through SDPA, bfloat16
autocast, fused AdamW, vocabulary padded to a multiple of 128, TF32 for what stays in float32. On a CPU: eager float32.
"""

import json
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WARMUP = 5  # steps: the compiler and the allocator settle


class Block(nn.Module):
    """x + attention(LN(x)), then x + MLP(LN(x))."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.projection = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp_up, self.mlp_down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        parts = self.qkv(self.norm_attention(x)).split(dim, dim=2)
        q, k, v = (part.view(batch, length, self.heads, -1).transpose(1, 2) for part in parts)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.projection(h.transpose(1, 2).reshape(batch, length, dim))
        return x + self.mlp_down(F.gelu(self.mlp_up(self.norm_mlp(x)), approximate="tanh"))


class GPT2(nn.Module):
    """The decoder with a tied head over the padded vocabulary; the loss is the mean over tokens in nats."""

    def __init__(self, layers: int, heads: int, dim: int, length: int, vocab: int):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(-(-vocab // 128) * 128, dim), nn.Embedding(length, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.norm_final = nn.LayerNorm(dim)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                residual = name.endswith(("projection.weight", "mlp_down.weight"))
                nn.init.normal_(weight, std=0.02 * (2 * layers) ** -0.5 if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def forward(self, tokens: Tensor) -> Tensor:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        x = self.embedding(inputs) + self.positions.weight[: inputs.shape[1]]
        for block in self.blocks:
            x = block(x)
        scores = F.linear(self.norm_final(x), self.embedding.weight)
        return F.cross_entropy(scores.float().flatten(0, 1), targets.flatten())


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each optimizer step, peak bytes, loss."""
    config, micro = job["config"], job["micro_batch_size"]
    model, train, optimizer = config["model"], config["train"], config["optimizer"]
    if "banded" in model["attention_pattern"]:
        return {"status": "failed", "reason": "GPT-2 has no banded layers"}
    fast = torch.cuda.is_available()
    device = "cuda" if fast else "cpu"
    torch.manual_seed(train["seed"])
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    sizes = (model[name] for name in ("num_layers", "num_heads", "embed_dim", "seq_len", "vocab_size"))
    net = GPT2(*sizes).to(device)
    groups = [
        {"params": [p for p in net.parameters() if p.ndim >= 2], "weight_decay": optimizer["weight_decay"]},
        {"params": [p for p in net.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas, lr = (optimizer["b1"], optimizer["b2"]), 0.1 * optimizer["learning_rate"]
    adam = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=optimizer["eps"], fused=fast)
    forward = torch.compile(net) if fast else net
    count = train["batch_size"] // micro
    shape = (count, micro, model["seq_len"] + 1)
    tokens = torch.randint(0, model["vocab_size"], shape, generator=torch.Generator().manual_seed(0)).to(device)

    def step() -> Tensor:
        adam.zero_grad(set_to_none=True)
        total = torch.zeros((), device=device)
        for rows in tokens:
            with torch.autocast(device, torch.bfloat16, enabled=fast):
                loss = forward(rows) / count
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(net.parameters(), optimizer["clip_norm"])
        adam.step()
        return total

    wait = torch.cuda.synchronize if fast else lambda: None
    times = []
    for _ in range(WARMUP + job["steps"]):
        started = time.perf_counter()
        loss = step()
        wait()
        times.append(time.perf_counter() - started)
    how = "torch.compile, flash SDPA, bfloat16 autocast, fused AdamW" if fast else "eager, float32"
    return {
        "status": "ok",
        "times_s": times[WARMUP:],
        "compile_s": times[0],
        "loss": float(loss),
        "memory_bytes": torch.cuda.max_memory_allocated() if fast else 0,
        "how": f"PyTorch {torch.__version__}: {how}",
    }


if __name__ == "__main__":
    job = json.loads(sys.stdin.read())
    try:
        answer = run(job)
    except torch.cuda.OutOfMemoryError as error:
        answer = {"status": "out of memory", "reason": str(error).splitlines()[0][:300]}
    print(json.dumps(answer))
