"""What tests of encoders and encoder-decoders share: a text in sentences, small models, a stage, a run."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest
from flax import linen as nn

from gptjax import cli
from gptjax.config import (
    ClassifyConfig,
    Config,
    DenoiseConfig,
    LabelledConfig,
    LabelsConfig,
    LayoutConfig,
    MaskedConfig,
    ModelConfig,
    OptimizerConfig,
    PairConfig,
    Seq2SeqConfig,
    TrainConfig,
    WindowConfig,
    to_json,
)
from gptjax.data.sources import build
from gptjax.data.tokenizers import load_tokenizer
from gptjax.errors import UserError
from gptjax.sharding.mesh import make_mesh
from gptjax.sharding.rules import Layout, rule_table
from gptjax.stages import AnyStage, stage_class

T, V = 48, 266
SHAPE: dict[str, Any] = {"num_layers": 2, "num_heads": 2, "embed_dim": 16, "seq_len": T, "vocab_size": V}
BERT: dict[str, Any] = {"causal": False, "norm_place": "after", "norm_embedding": True, "token_types": 2}
BERT |= {"head_bias": True, "activation": "gelu"}
T5: dict[str, Any] = {"norm": "rms", "biases": False, "qkv_bias": False, "scale_scores": False, "activation": "relu"}
T5 |= {"positions": "relative", "position_buckets": 8, "position_reach": 12}
LONG_AGO: dict[str, Any] = {"norm_place": "after", "positions": "sinusoidal", "scale_embedding": True}
LONG_AGO |= {"activation": "relu"}
BART: dict[str, Any] = {"norm_place": "after", "norm_embedding": True, "position_offset": 2, "activation": "gelu"}


def write_texts(folder: Path) -> Path:
    """40 records of sentences; each record has a letter of its own in its words, so that they can be told apart."""
    rng = random.Random(0)
    path = folder / "texts.jsonl"
    lines = []
    for number in range(40):
        own = chr(0x4E00 + number)  # three bytes
        sentences = [
            " ".join(own + "".join(rng.choices("abcde", k=rng.randint(1, 3))) for _ in range(rng.randint(1, 2))) + "."
            for _ in range(rng.randint(4, 14))
        ]
        lines.append(json.dumps({"text": " ".join(sentences)}))
    path.write_text("\n".join(lines) + "\n")
    return path


def write_pairs(folder: Path) -> Path:
    """60 pairs: letters and the same ones backwards."""
    rng = random.Random(0)
    path = folder / "pairs.jsonl"
    texts = ["".join(rng.choices("abcd", k=rng.randint(2, 8))) for _ in range(60)]
    path.write_text("".join(json.dumps({"source": text, "target": text[::-1]}) + "\n" for text in texts))
    return path


def write_labels(folder: Path) -> Path:
    """80 texts of which it is told whether they have more of a than of b, and how many of a."""
    rng = random.Random(0)
    path = folder / "labels.jsonl"
    texts = ["".join(rng.choices("ab", k=rng.randint(3, 9))) for _ in range(80)]
    rows = [
        {"text": t, "label": "more" if t.count("a") > t.count("b") else "less", "many": t.count("a")} for t in texts
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def plain_train(tiny: Config, **more: Any) -> TrainConfig:
    given: dict[str, Any] = {"batch_size": 8, "micro_batch_size": 8, "epochs": 1.0, "log_interval": 1}
    given |= {"eval_interval": 0, "save_interval": 0, "tensorboard": False, "compile_cache": tiny.train.compile_cache}
    return TrainConfig(**(given | more))


def common(tiny: Config, name: str) -> dict[str, Any]:
    optimizer = OptimizerConfig(learning_rate=3e-3, warmup_tokens=0, decay_tokens=0, eps=1e-5)
    return {"name": name, "optimizer": optimizer, "train": plain_train(tiny), "layout": LayoutConfig()}


def windows(tiny: Config, path: Path) -> WindowConfig:
    splits = {"train_split": "train[:75%]", "eval_split": "train[75%:]"}
    return WindowConfig(source=str(path), tokenizer="bytes", cache_dir=tiny.data.cache_dir, **splits)


def masked_config(tiny: Config, path: Path, **model: Any) -> MaskedConfig:
    shape = ModelConfig(**(SHAPE | BERT | model))
    return MaskedConfig(model=shape, data=windows(tiny, path), **common(tiny, "masked"))


def two(block: dict[str, Any], **more: Any) -> dict[str, ModelConfig]:
    """Decoder and encoder of a family."""
    shape = SHAPE | {"seq_len": 16} | block | more
    return {
        "model": ModelConfig(**(shape | {"cross_attention": True})),
        "encoder": ModelConfig(**(shape | {"causal": False})),
    }


def pairs_config(tiny: Config, path: Path, block: dict[str, Any] = LONG_AGO, **more: Any) -> Seq2SeqConfig:
    data = PairConfig(source=str(path), tokenizer="bytes", cache_dir=tiny.data.cache_dir)
    data = replace(data, train_split="train[:75%]", eval_split="train[75%:]")
    return Seq2SeqConfig(data=data, **two(block, **more), **common(tiny, "pairs"))


def damaged_config(tiny: Config, path: Path) -> DenoiseConfig:
    made = two(T5, vocab_size=400)
    made = {"model": replace(made["model"], seq_len=24), "encoder": replace(made["encoder"], seq_len=48)}
    return DenoiseConfig(data=windows(tiny, path), **made, **common(tiny, "damaged"))


def labels_config(tiny: Config, path: Path) -> ClassifyConfig:
    data = LabelledConfig(source=str(path), tokenizer="bytes", cache_dir=tiny.data.cache_dir)
    data = replace(data, fields=("text", "label"), train_split="train[:75%]", eval_split="train[75%:]")
    labels = LabelsConfig(names=("less", "more"))
    return ClassifyConfig(model=ModelConfig(**(SHAPE | BERT)), data=data, labels=labels, **common(tiny, "labels"))


def made(config: Config, devices: int = 1) -> AnyStage:
    layout = Layout(make_mesh(config, jax.devices()[:devices]), rule_table(config.layout))
    kind = stage_class(config)
    tokenizer = kind.fit_tokenizer(config, load_tokenizer("bytes"))
    return kind(config, "cpu", layout, tokenizer, build(config.data))


def params_of(stage: AnyStage, seed: int = 0) -> Any:
    return nn.unbox(jax.jit(stage.init)(jax.random.key(seed)))


def file_of(config: Config, folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.py"
    text = f"from gptjax.config import from_json\n\n\ndef config():\n    return from_json({to_json(config)!r})\n"
    path.write_text(text)
    return str(path)


def train(config: Config, folder: Path, *words: str) -> Path:
    """A run in folder/run, to its end."""
    run = folder / "run"
    assert cli.run(["train", file_of(config, folder), "--run", str(run), *words]) == 0
    return run


def refusal(config: Config, folder: Path, *words: str) -> str:
    """The one line that a user gets who trains it."""
    with pytest.raises(UserError) as caught:
        cli.run(["train", file_of(config, folder), "--run", str(folder / "run"), *words])
    assert "\n" not in str(caught.value) and not (folder / "run").exists()
    return str(caught.value)
