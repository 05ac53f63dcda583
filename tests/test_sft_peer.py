"""Supervised fine-tuning against PyTorch: 20 steps from the same weights, losses and gradient norms compared.

The peer is a plain loop over the GPT-2 of `transformers`, with its own template, mask, AdamW and schedule. It gives
every conversation to the model alone, so that neither packing nor padding nor accumulation can hide in it; of ours it
takes which conversations a step has. Run: pytest tests/test_sft_peer.py

With TRL_PYTHON, a Python that has `trl`, trl's SFTTrainer is a second peer (tests/peers/trl_sft.py).
"""

import dataclasses
import json
import os
import random
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import pytest
from flax import linen as nn

from gptjax import cli
from gptjax.config import Config, DialogueConfig, LayoutConfig, LoRAConfig, SFTConfig, to_json
from gptjax.convert.tokenizer import write_tokenizer
from gptjax.data.chat import chat_format, with_chat
from gptjax.data.sources import build
from gptjax.data.tokenizers import load_tokenizer
from gptjax.sharding.rules import leaf_name
from gptjax.stages.sft import SFT
from gptjax.stages.weights import chat_model
from gptjax.train.metrics import read_log
from gptjax.train.run import open_run, saved_tokenizer

torch: Any = pytest.importorskip("torch", reason="needs the peers extra")
transformers: Any = pytest.importorskip("transformers", reason="needs the peers extra")

STEPS, WARMUP, LENGTH, LAYERS = 20, 4, 96, 2
TRL = os.environ.get("TRL_PYTHON")
Talk = list[dict[str, str]]
Step = list[list[Talk]]  # the conversations of each row


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a random GPT-2 of `transformers` and a tokenizer of bytes and chat tokens."""
    folder = tmp_path_factory.mktemp("start")
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    sizes = {"vocab_size": 261, "n_positions": LENGTH, "n_embd": 32, "n_layer": LAYERS, "n_head": 4}
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **rates, bos_token_id=256, eos_token_id=256))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    write_tokenizer(with_chat(chat_format(load_tokenizer("bytes")).tokenizer), folder, 261, LENGTH)
    return folder


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 conversations of one to three turns, with answers of unequal length; some are longer than the context."""
    rng = random.Random(0)
    words = ["ask", "tell", "über", "東京", "the", "of", "stone", "{{ x }}", "\n", "we've", "12"]

    def talk() -> Talk:
        turns = [{"role": "system", "content": "Be brief."}] * (rng.random() < 0.2)
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            turns.append({"role": "user", "content": "ask " + " ".join(rng.choices(words, k=rng.randint(0, 4)))})
            answer = rng.choice(["a", "yes it is", "no", "the stone of 東京 is über 12, we've told", " 12\n"])
            turns.append({"role": "assistant", "content": answer * rng.choice([1, 1, 2])})
        return turns

    file = tmp_path_factory.mktemp("talks") / "talks.jsonl"
    file.write_text("".join(json.dumps({"messages": talk()}) + "\n" for _ in range(120)))
    return file


pytestmark = pytest.mark.usefixtures("one_torch_thread")


@dataclass(frozen=True)
class Trained:
    """What a run of ours logged, and what its steps were made of."""

    config: SFTConfig
    stage: SFT
    losses: list[float]
    norms: list[float]
    steps: list[Step]


@pytest.fixture
def trained(start: Path, talks: Path, tiny: Config, tmp_path: Path) -> Callable[..., Trained]:
    """Runs `gptjax train`."""

    def run(
        packing: bool,
        batch: int = 8,
        micro: int = 0,
        epochs: float = 0.0,
        layout: LayoutConfig | None = None,
        lora: LoRAConfig | None = None,
        too_long: Literal["cut", "drop"] = "cut",
    ) -> Trained:
        tokens = batch * LENGTH
        config = SFTConfig(
            name="peer",
            model=replace(chat_model(str(start)), scan_layers=True),
            data=DialogueConfig(str(talks), cache_dir=tiny.data.cache_dir, packing=packing, too_long=too_long),
            optimizer=replace(
                tiny.optimizer,
                learning_rate=3e-3,
                final_ratio=0.0,
                warmup_tokens=WARMUP * tokens,
                decay_tokens=STEPS * tokens,
                weight_decay=0.5,
            ),
            train=replace(
                tiny.train,
                batch_size=batch,
                micro_batch_size=micro,
                ramp_start=0,
                ramp_tokens=0,
                total_tokens=STEPS * tokens,
                epochs=epochs,
                log_interval=1,
                eval_batches=0,
                save_interval=0,
            ),
            layout=layout or LayoutConfig(),
            lora=lora or LoRAConfig(),
            init_from=str(start),
        )
        file, folder = tmp_path / "peer.py", tmp_path / "run"
        file.write_text(
            f"from gptjax.config import from_json\n\n\ndef config():\n    return from_json({to_json(config)!r})\n"
        )
        assert cli.run(["train", str(file), "--run", str(folder)]) == 0
        saved = open_run(str(folder))[1]
        stage = SFT(saved, "cpu", tokenizer=saved_tokenizer(folder), corpus=build(saved.data))
        logged = [record for record in read_log(folder / "log.jsonl") if record["kind"] == "train"]
        assert [record["step"] for record in logged] == [*range(1, STEPS + 1)]
        losses, norms = ([record[name] for record in logged] for name in ("loss", "grad_norm"))
        return Trained(saved, stage, losses, norms, steps_of(stage))

    return run


def steps_of(stage: SFT) -> list[Step]:
    """Which conversations each row of each step has; the last step may have fewer rows."""
    found, train = stage.training, stage.config.train
    end = round(train.epochs * found.num_rows) or STEPS * train.batch_size

    def row(number: int) -> list[Talk]:
        epoch, place = divmod(number, found.num_rows)
        indices = found.epoch(stage.config.data.seed, epoch).row(place)
        return [talk(found.source[int(found.numbers[index])].text) for index in indices]

    rows = [row(number) for number in range(end)]
    return [rows[step * train.batch_size :][: train.batch_size] for step in range(STEPS)]


def talk(text: str) -> Talk:
    return [{"role": role, "content": content} for role, content in json.loads(text)]


class Adapted(torch.nn.Module):
    """x W + b + scale * x A B with W and b as they are."""

    def __init__(self, base: Any, a: Any, b: Any, scale: float) -> None:
        super().__init__()
        self.base, self.a, self.b, self.scale = base, torch.nn.Parameter(a), torch.nn.Parameter(b), scale

    def forward(self, x: Any) -> Any:
        return self.base(x) + self.scale * (x @ self.a @ self.b)


PLACES = {"qkv": "attn.c_attn", "projection": "attn.c_proj", "mlp_up": "mlp.c_fc", "mlp_down": "mlp.c_proj"}


def adapt(model: Any, stage: SFT) -> None:
    """Freeze a model and put adapters into it, with the A that a run of ours starts from."""
    lora, born = stage.config.lora, nn.unbox(jax.jit(stage.init)(jax.random.key(stage.config.train.seed)))
    leaves = {leaf_name(path): np.array(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(born)}
    model.requires_grad_(False)
    for layer, block in enumerate(model.transformer.h):
        for name in lora.matrices:
            where, _, what = PLACES[name].partition(".")
            part = block.get_submodule(where)
            base = getattr(part, what)
            ins, outs = base.weight.shape
            a = leaves[f"units/block_0/{name}/lora/a"][layer].reshape(ins, lora.rank)
            setattr(part, what, Adapted(base, torch.tensor(a), torch.zeros(lora.rank, outs), lora.scale))


def in_torch(start: Path, run: Trained) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of the same steps."""
    model = transformers.AutoModelForCausalLM.from_pretrained(start)
    tokenizer = transformers.AutoTokenizer.from_pretrained(start)
    if run.config.adapter:
        adapt(model, run.stage)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    c = run.config.optimizer
    groups = [
        {"params": [p for p in learned if p.ndim > 1], "weight_decay": c.weight_decay},
        {"params": [p for p in learned if p.ndim == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, c.learning_rate, (c.b1, c.b2), c.eps)
    schedule = transformers.get_cosine_schedule_with_warmup(adam, WARMUP, STEPS)
    losses, norms = [], []
    for step in run.steps:
        made = [rendered(tokenizer, each) for row in step for each in row]
        count = sum(int((labels[1:] != -100).sum()) for _, labels in made)
        adam.zero_grad()
        losses.append(0.0)
        for ids, labels in made:
            scores = model(ids[None, :-1]).logits[0]
            loss = torch.nn.functional.cross_entropy(scores, labels[1:], reduction="sum") / count
            loss.backward()
            losses[-1] += loss.item()
        norms.append(torch.nn.utils.clip_grad_norm_(learned, c.clip_norm).item())
        adam.step()
        schedule.step()
    return losses, norms


def rendered(tokenizer: Any, messages: Talk) -> tuple[Any, Any]:
    """Ids and labels of a conversation by the template; of one that is too long the end."""
    made = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids = torch.tensor(made["input_ids"][-LENGTH - 1 :])
    return ids, torch.where(torch.tensor(made["assistant_masks"][-LENGTH - 1 :]) > 0, ids, -100)


CASES: dict[str, dict[str, Any]] = {
    "one a row, to the end of an epoch": {
        "packing": False,
        "epochs": 1.39,  # of 113 rows: the last of 20 steps has 5 of 8
        "layout": LayoutConfig(fsdp=4, tensor=2),
    },
    "packed": {"packing": True},
    "accumulated": {"packing": False, "batch": 16, "micro": 8},
    "LoRA": {"packing": True, "lora": LoRAConfig(4, matrices=("qkv", "projection", "mlp_up", "mlp_down"))},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [case if case != "accumulated" else pytest.param(case, marks=pytest.mark.whole) for case in CASES]
)
def test_losses_equal_those_of_a_pytorch_loop(case: str, start: Path, trained: Callable[..., Trained]) -> None:
    run = trained(**CASES[case])
    assert len(run.steps[-1]) == (5 if "epochs" in CASES[case] else run.config.train.batch_size)
    losses, norms = in_torch(start, run)
    far, norms_far = np.abs(np.subtract(run.losses, losses)).max(), np.abs(np.divide(run.norms, norms) - 1).max()
    print(f"{case}: largest difference {far:.1e} nats; of gradient norms {norms_far:.1e}")
    assert losses[-1] < losses[0] - 0.4  # there was something to learn
    assert far < 1e-4 and norms_far < 1e-3


@pytest.mark.skipif(not TRL, reason="TRL_PYTHON names no Python that has trl")
@pytest.mark.parametrize(("packing", "batch", "micro"), [(False, 8, 8), (False, 16, 8), (True, 8, 8), (True, 16, 8)])
def test_losses_equal_those_of_trl(
    packing: bool, batch: int, micro: int, start: Path, trained: Callable[..., Trained]
) -> None:
    """Without conversations that are too long: trl would cut off a token more."""
    run = trained(packing, batch, micro, too_long="drop")
    job = {
        "model": str(start),
        "rows": [row for step in run.steps for row in step],
        "packing": packing,
        "length": LENGTH,
        "batch_size": batch,
        "micro_batch_size": micro,
        "steps": STEPS,
        "warmup": WARMUP,
        **dataclasses.asdict(run.config.optimizer),
    }
    script = Path(__file__).parent / "peers" / "trl_sft.py"
    done = subprocess.run([str(TRL), str(script)], input=json.dumps(job), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])
    losses = theirs.pop("losses")
    far = np.abs(np.subtract(run.losses, losses)).max()
    print(f"{theirs}: largest difference {far:.1e} nats, {losses[0]:.3f} to {losses[-1]:.3f}")
    assert far < 1e-4
