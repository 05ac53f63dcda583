"""Checkpoints in and out against `transformers`, and what is refused. Run: pytest tests/test_convert.py"""

import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from converting import bytes_of, configure, random_params, rewrite, same_bytes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gptjax
from gptjax import cli
from gptjax.config import Config, LayoutConfig, ModelConfig
from gptjax.convert.architecture import Box, assemble, boxes
from gptjax.convert.huggingface import HEAD, counterpart, open_directory, write_directory
from gptjax.convert.tensors import Outgoing, write_tensors
from gptjax.convert.tokenizer import tokenizer_spec, write_tokenizer
from gptjax.data.sources import build
from gptjax.data.tokenizers import SPECIALS, load_tokenizer, train_sentencepiece
from gptjax.errors import UserError
from gptjax.infer.request import Request
from gptjax.infer.sampling import Sampling
from gptjax.model.gpt import forward
from gptjax.model.loss import cross_entropy, logits
from gptjax.parallel.network import Network
from gptjax.sharding.mesh import make_mesh
from gptjax.sharding.rules import Layout, leaf_name, rule_table
from gptjax.stages.launch import train
from gptjax.stages.pretrain import Pretrain
from gptjax.stages.weights import on_device, open_weights
from gptjax.train.step import placed

TEXT = "def f(x, y=12):\n    return {'a': [x]}  # naïve Größe, 東京 😀!\r\n\t\tpass\n\n"
SMALL = ModelConfig(3, 4, 32, seq_len=12, vocab_size=261, scan_layers=False)


def directory(folder: Path, model: ModelConfig = SMALL, **how: Any) -> Path:
    """An export of random weights with the bytes tokenizer."""
    folder.mkdir(parents=True)
    write_directory(folder, {"model": model}, random_params(model), 256, **how)
    write_tokenizer(load_tokenizer("bytes"), folder, model.vocab_size, model.seq_len)
    return folder


def load(path: Path) -> tuple[Config, Any]:
    weights = open_weights(str(path))
    return weights.config, weights.load(weights.config.model, on_device(weights.config, jax.devices()[0]))


def logits_and_gradient(config: Config, params: Any, tokens: np.ndarray) -> tuple[np.ndarray, float, Any]:
    """Over all positions but the last, whose targets are the next tokens."""
    model, vocab = Network(config, "cpu").model, config.model.vocab_size

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        hidden, embedding, _ = forward(model, params, tokens)
        nats = cross_entropy(hidden[:, :-1], embedding, tokens[:, 1:], vocab, 256)
        return nats / tokens[:, 1:].size, logits(hidden, embedding, vocab)[..., :vocab]

    (value, scores), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return np.asarray(scores), float(value), grads


@st.composite
def peer_configs(draw: st.DrawFn, transformers: Any, family: str) -> Any:
    """Random `transformers` configs of odd sizes; a local window is shorter than the sequence."""
    heads, head_dim, layers = draw(st.integers(1, 4)), draw(st.integers(3, 11)), draw(st.integers(3, 6))
    vocab, length = draw(st.integers(70, 300)), draw(st.integers(9, 40))
    common = {"vocab_size": vocab, "bos_token_id": 0, "eos_token_id": 0}
    if family == "llama":
        biases, heads, shared = draw(st.booleans()), 2 * heads, draw(st.sampled_from([2, 1, 2 * heads]))
        return transformers.LlamaConfig(
            max_position_embeddings=length,
            hidden_size=heads * head_dim,
            intermediate_size=draw(st.integers(5, 90)),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=shared,
            head_dim=2 * draw(st.integers(1, 6)),
            rms_norm_eps=draw(st.sampled_from([1e-6, 1e-5])),
            rope_parameters={"rope_type": "default", "rope_theta": draw(st.sampled_from([10_000.0, 500_000.0]))},
            tie_word_embeddings=draw(st.booleans()),
            attention_bias=biases,
            mlp_bias=biases,
            **common,
        )
    if family == "falcon":
        later = draw(st.sampled_from([True, False]))  # the first of what is drawn is the simplest
        return transformers.FalconConfig(
            max_position_embeddings=length,
            hidden_size=2 * heads * head_dim,
            ffn_hidden_size=draw(st.integers(5, 90)),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_kv_heads=draw(st.sampled_from([h for h in (1, 2, 3, 4) if heads % h == 0])) if later else None,
            new_decoder_architecture=later,
            num_ln_in_parallel_attn=draw(st.sampled_from([None, 1, 2])) if later else None,
            multi_query=draw(st.booleans()),
            parallel_attn=later or draw(st.booleans()),
            bias=draw(st.booleans()),
            **common,
        )
    if family == "gpt2":
        return transformers.GPT2Config(
            n_positions=length, n_embd=heads * head_dim, n_layer=layers, n_head=heads, **common
        )
    kinds = draw(st.lists(st.sampled_from(["global", "local"]), min_size=layers, max_size=layers))
    return transformers.GPTNeoConfig(
        max_position_embeddings=length,
        hidden_size=heads * head_dim,
        num_layers=layers,
        num_heads=heads,
        attention_types=[[[kind], 1] for kind in kinds],
        window_size=draw(st.integers(2, length - 1)),
        **common,
    )


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo", "llama", "falcon"])
@settings(max_examples=2, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_logits_and_gradients_equal_transformers_and_the_way_back_is_exact(
    torch: Any, transformers: Any, tmp_path_factory: pytest.TempPathFactory, family: str, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("peer")
    torch.manual_seed(0)
    peer = transformers.AutoModelForCausalLM.from_config(data.draw(peer_configs(transformers, family))).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    peer.save_pretrained(folder)
    opened = open_directory(folder)
    model = replace(opened.model, scan_layers=True, attention="reference")  # compiles faster
    config = Config("x", model)
    params = opened.load(model, on_device(config, jax.devices()[0]))
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (2, model.seq_len))
    scores, value, grads = logits_and_gradient(config, params, tokens)

    ids = torch.tensor(tokens)
    out = peer(ids, labels=ids)
    out.loss.backward()
    np.testing.assert_allclose(scores, out.logits.detach().numpy(), atol=1e-4)
    assert (scores.argmax(-1) == out.logits.detach().numpy().argmax(-1)).all()
    assert value == pytest.approx(out.loss.item(), rel=1e-5)
    theirs = dict(peer.named_parameters())
    leaves = {leaf_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(grads)}
    for box in boxes(counterpart(model), model):
        name = box.tensor if box.tensor == HEAD else counterpart(model).prefix + box.tensor
        expected = theirs[name].grad.numpy()
        np.testing.assert_allclose(box.tensor_of(leaves[box.leaf]), expected, atol=1e-5, err_msg=box.tensor)

    (folder / "back").mkdir()
    write_directory(folder / "back", {"model": model}, params, 0)
    assert same_bytes(bytes_of(folder / "back"), bytes_of(folder))
    assert open_directory(folder / "back").model == opened.model


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    heads, unit = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    biased = draw(st.booleans())
    if draw(st.booleans()):
        return ModelConfig(
            num_layers=unit,
            num_heads=2 * heads,
            embed_dim=draw(st.integers(1, 9)),
            seq_len=draw(st.integers(2, 9)),
            vocab_size=draw(st.integers(1, 300)),
            qkv_bias=biased,
            biases=biased,
            num_kv_heads=draw(st.sampled_from([0, 1, 2])),
            head_size=2 * draw(st.integers(1, 3)),
            mlp_size=draw(st.integers(1, 9)),
            norm="rms",
            positions="rotary",
            activation="swiglu",
            tied_head=draw(st.booleans()),
            scan_layers=draw(st.booleans()),
        )
    kinds = st.sampled_from(["dense"] if biased else ["dense", "banded"])
    return ModelConfig(
        num_layers=unit * draw(st.integers(1, 3)),
        num_heads=heads,
        embed_dim=heads * draw(st.integers(1, 4)),
        seq_len=draw(st.integers(2, 9)),
        vocab_size=draw(st.integers(1, 300)),
        window=2,
        attention_pattern=tuple(draw(st.lists(kinds, min_size=unit, max_size=unit))),
        qkv_bias=biased,
        scale_scores=biased,
        scan_layers=draw(st.booleans()),
    )


@settings(max_examples=20)
@given(models(), st.data())
def test_boxes_tile_every_leaf_and_any_slice_of_it_reads_alone(model: ModelConfig, data: st.DataObject) -> None:
    params = random_params(model)
    leaves = {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    table = boxes(counterpart(model), model)
    assert {box.leaf for box in table} == leaves.keys()
    name = data.draw(st.sampled_from(sorted(leaves)))
    leaf = leaves[name]

    def opened(box: Box) -> tuple[Box, Callable[[], np.ndarray]]:
        tensor = box.tensor_of(leaf)
        assert tensor.shape == box.shape
        return box, lambda: tensor

    bounds = [sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n)))) for n in leaf.shape]
    index = tuple(slice(*bound) for bound in bounds)
    parts = [opened(box) for box in table if box.leaf == name]
    np.testing.assert_array_equal(assemble(index, leaf.shape, parts), leaf[index])
    assert sum(np.prod(box.extent) for box, _ in parts) == np.count_nonzero(leaf)


@pytest.fixture(scope="module")
def trained(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps on eight devices: GPT-Neo's layers, but with scaled scores."""
    run = tmp_path_factory.mktemp("trained") / "run"
    config = replace(
        tiny,
        run=str(run),
        model=replace(tiny.model, num_layers=2, qkv_bias=False, attention="reference"),
        train=replace(tiny.train, batch_size=8, ramp_start=0, total_tokens=6 * 8 * 16, eval_batches=0),
    )
    assert train(config, None) == 0
    return run


def require_agreement(run: Path, out: Path, torch: Any, transformers: Any) -> None:
    """Raises where a run and its export differ in logits, in the likeliest token or in token ids."""
    config, params = load(run)
    peer = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, (2, config.model.seq_len))
    model, vocab = Network(config, "cpu").model, config.model.vocab_size
    scores = jax.jit(lambda p: logits(*forward(model, p, tokens)[:2], vocab))(params)[..., :vocab]
    theirs = peer(torch.tensor(tokens)).logits.detach().numpy()
    np.testing.assert_allclose(scores, theirs, atol=1e-4)
    assert (scores.argmax(-1) == theirs.argmax(-1)).all()
    names = transformers.AutoTokenizer.from_pretrained(out)
    ours = load_tokenizer("bytes")
    assert names(TEXT).input_ids == ours.encode(TEXT).tolist() and names.decode(ours.encode(TEXT)) == TEXT
    assert names("<|user|>x<|end|>").input_ids == [ours.special["<|user|>"], ord("x"), ours.special["<|end|>"]]
    assert (names.eos_token_id, peer.config.eos_token_id) == (ours.eot, ours.eot)


def test_a_trained_model_gives_the_same_logits_and_ids_in_transformers(
    torch: Any, transformers: Any, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, back, again = tmp_path / "out", tmp_path / "run", tmp_path / "again"
    assert cli.run(["convert", str(trained), str(out)]) == 0
    assert "folded into q" in capsys.readouterr().out
    require_agreement(trained, out, torch, transformers)

    assert cli.run(["convert", str(out), str(back)]) == 0 and cli.run(["convert", str(back), str(again)]) == 0
    assert same_bytes(bytes_of(out), bytes_of(again)) and "folded" not in capsys.readouterr().out
    texts = []
    for path in (out, back):
        assert cli.run(["sample", str(path), "--prompt", "a", "--tokens", "9"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_finetuning_a_directory_starts_from_its_weights_and_resumes_without_it(
    torch: Any, transformers: Any, tiny: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, run = directory(tmp_path / "source"), tmp_path / "run"
    quick = ["--train.eval_batches", "0", "--train.log_interval", "1", "--train.tensorboard", "false"]
    quick += ["--model.scan_layers", "true", "--model.attention", "reference"]
    quick += ["--data.source", tiny.data.source, "--data.cache_dir", tiny.data.cache_dir]
    quick += ["--train.compile_cache", tiny.train.compile_cache]
    assert cli.run(["train", str(source), "--run", str(run), "--train.total_tokens", "200", *quick]) == 0
    assert f"weights   {source}" in capsys.readouterr().out
    logged = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    config, after = load(run)
    before = open_directory(source).load(config.model, on_device(config, jax.devices()[0]))
    moved = max(jax.tree.leaves(jax.tree.map(lambda a, b: float(abs(a - b).max()), before, after)))
    assert 0 < moved < 1e-5  # three steps of warm-up
    task = Pretrain(config, "cpu", tokenizer=load_tokenizer("bytes"), corpus=build(config.data))
    stream = task.feed(None, range(config.micro_batch_size))
    rows = jax.tree.map(lambda leaf: leaf[0], stream.batch(1))
    loss = jax.jit(lambda p, r: task.loss(p, r, task.counts(r), None))(before, rows)
    stream.close()
    losses = [entry["loss"] for entry in logged if entry.get("loss") is not None]
    assert losses[0] == pytest.approx(float(loss), rel=1e-5)

    shutil.rmtree(source)
    assert cli.run(["train", "--resume", str(run), "--train.total_tokens", "400", "--train.eval_batches", "0"]) == 0
    assert cli.run(["convert", str(run), str(source)]) == 0
    require_agreement(run, source, torch, transformers)


def test_init_from_names_the_first_field_that_differs(tiny: Config, tmp_path: Path) -> None:
    source = directory(tmp_path / "source")
    config = replace(tiny, model=replace(SMALL, embed_dim=64), init_from=str(source), run=str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"its model.embed_dim is 32, not 64; set --model.embed_dim 32"):
        train(config, None)
    assert not (tmp_path / "run").exists()


def test_init_from_a_run_loads_its_weights_onto_a_mesh(trained: Path) -> None:
    weights = open_weights(str(trained))
    layout = LayoutConfig(fsdp=2, tensor=4)
    config = replace(weights.config, layout=layout)
    there = Layout(make_mesh(config), rule_table(layout))
    abstract = jax.eval_shape(Pretrain(config, "cpu").init, jax.random.key(0))
    spread = weights.load(config.model, placed(abstract, there.shardings(abstract)))
    _, alone = load(trained)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), alone, spread))
    assert len(spread["embedding"].addressable_shards) == 8


@pytest.mark.parametrize("scan", [True, False])
def test_loading_onto_a_mesh_equals_loading_onto_one_device(tmp_path: Path, scan: bool) -> None:
    model = replace(SMALL, num_layers=4, attention_pattern=("dense", "banded"), window=5, qkv_bias=False)
    model = replace(model, scan_layers=scan, scale_scores=False)
    opened = open_directory(directory(tmp_path / "source", model, shard_bytes=20_000))
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 3
    layout = LayoutConfig(fsdp=2, tensor=4)
    config = Config("x", model, layout=layout)
    there = Layout(make_mesh(config), rule_table(layout))
    abstract = jax.eval_shape(Pretrain(config, "cpu").init, jax.random.key(0))
    spread = opened.load(model, placed(abstract, there.shardings(abstract)))
    alone = opened.load(model, on_device(config, jax.devices()[0]))
    jax.tree.map(np.testing.assert_array_equal, alone, random_params(model))
    jax.tree.map(np.testing.assert_array_equal, alone, spread)
    assert {shard.data.shape for shard in spread["embedding"].addressable_shards} == {(96, 16)}


MEMORY = r"""
import re, sys
from pathlib import Path
import jax
from gptjax.stages.weights import on_device, open_weights
weights = open_weights(sys.argv[1])
abstract = on_device(weights.config, jax.devices()[0])
status = lambda field: 1024 * int(re.search(field + r":\s+(\d+)", Path("/proc/self/status").read_text())[1])
now = status("VmRSS")
params = jax.block_until_ready(weights.load(weights.config.model, abstract))
print(status("VmHWM") - now, sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_host_never_holds_the_model_twice(tmp_path: Path) -> None:
    model = ModelConfig(8, 12, 768, seq_len=64, vocab_size=10_000, scan_layers=False)
    rng = np.random.default_rng(0)
    values = rng.standard_normal(4 * 768 * 768 * 4, np.float32)
    tensors = [
        Outgoing(box.tensor, box.shape, lambda box=box: np.resize(values, box.shape))
        for box in boxes(counterpart(model), model)
    ]
    config = counterpart(model).write(model) | {"model_type": "gpt2", "vocab_size": model.vocab_size}
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_tensors(tmp_path, tensors, np.dtype(np.float32))
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_FLAGS": ""},
        check=True,
    )
    grown, size = map(int, done.stdout.split())
    print(f"peak {grown / 1e6:.0f} MB over {size / 1e6:.0f} MB of model: {grown / size:.2f}")
    assert size > 2e8
    assert grown < 1.5 * size


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16)])
def test_half_precision_widens_to_float32_exactly(
    torch: Any, transformers: Any, tmp_path: Path, dtype: str, kind: Any
) -> None:
    source = directory(tmp_path / "half", dtype=dtype)
    config, params = load(source)
    rounded = jax.tree.map(lambda leaf: leaf.astype(kind).astype(np.float32), random_params(config.model))
    jax.tree.map(np.testing.assert_array_equal, params, rounded)
    peer = transformers.AutoModelForCausalLM.from_pretrained(source)
    assert str(peer.dtype) == f"torch.{dtype}"


def test_pytorch_bin_reads_with_torch_alone(torch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = directory(tmp_path / "source")
    expected = bytes_of(source)
    tensors = {name: torch.from_numpy(array) for name, array in expected.items()}
    tensors |= {"lm_head.weight": tensors["transformer.wte.weight"], "transformer.h.0.attn.bias": torch.ones(1, 1, 2)}
    (source / "model.safetensors").unlink()
    for new in (True, False):
        torch.save(tensors, source / "pytorch_model.bin", _use_new_zipfile_serialization=new)
        _, params = load(source)
        jax.tree.map(np.testing.assert_array_equal, params, jax.tree.map(np.asarray, random_params(SMALL)))
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"needs torch to read; pip install 'gptjax\[torch\]'"):
        open_directory(source)


class Bomb:
    """What a hostile pickle does when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def cut(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 4)


def flip(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1000] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def disguise(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb(folder / "executed")))


def bomb(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(folder / "executed")))


def zipped_bomb(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"wte.weight": Bomb(folder / "executed")}))
        archive.writestr("archive/version", "3\n")


def shard_elsewhere(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"wte.weight": "../other/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def lost_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    where = dict.fromkeys(bytes_names(folder / "model-00001-of-00002.safetensors"), "model-00001-of-00002.safetensors")
    where["transformer.wte.weight"] = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def bytes_names(file: Path) -> list[str]:
    return list(safetensors.numpy.load_file(file))


def nan(tensors: dict[str, np.ndarray]) -> None:
    tensors["transformer.h.1.mlp.c_fc.weight"][3, 3] = np.nan


def untie(tensors: dict[str, np.ndarray]) -> None:
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (cut, r"model.safetensors: not a whole safetensors file"),
    "flipped": (flip, r"model.safetensors: transformer\.\S+ does not match its checksum"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), r"not a whole safetensors file"),
    "disguised pickle": (disguise, r"not a whole safetensors file"),
    "hostile bin": (bomb, r"pytorch_model.bin: refused"),
    "hostile zip": (zipped_bomb, r"pytorch_model.bin: refused"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"no weights; expected model.safetensors"),
    "shard elsewhere": (shard_elsewhere, r"\.\./other/model.safetensors is not a file of this folder"),
    "lost shard": (lost_shard, r"model-00002-of-00002.safetensors: not a whole safetensors file"),
    "unknown architecture": (lambda f: configure(f, model_type="mamba"), r"model_type = 'mamba': gptjax converts gpt2"),
    "another head": (lambda f: configure(f, architectures=["GPT2ForTokenClassification"]), r"gptjax converts GPT2LM"),
    "activation": (lambda f: configure(f, activation_function="relu"), r"activation_function = 'relu': .* 'gelu_new'"),
    "inner": (lambda f: configure(f, n_inner=77), r"n_inner = 77: gptjax has only None or 128"),
    "epsilon": (lambda f: configure(f, layer_norm_epsilon=1e-6), r"layer_norm_epsilon = 1e-06"),
    "untied": (lambda f: configure(f, tie_word_embeddings=False), r"tie_word_embeddings = False"),
    "too deep": (lambda f: configure(f, n_layer=4), r"no tensor h\.3\.\S+, which config.json asks for"),
    "far too deep": (lambda f: configure(f, n_layer=10**12), r"1000000000000 layers, and only"),
    "too shallow": (lambda f: configure(f, n_layer=2), r"unexpected tensor h\.2\."),
    "too wide": (lambda f: configure(f, n_embd=36), r"wte.weight is \[261, 32\], but config.json makes it \[261, 36\]"),
    "heads": (lambda f: configure(f, n_head=5), r"config.json: model.num_heads = 5: does not divide"),
    "no number": (lambda f: configure(f, n_head="4"), r"n_head = '4': expected a positive whole number"),
    "not JSON": (lambda f: (f / "config.json").write_text("{"), r"config.json: not whole JSON"),
    "not finite": (lambda f: rewrite(f, nan), r"h.1.mlp.c_fc.weight: holds values that are not finite"),
    "extra": (lambda f: rewrite(f, lambda t: t.update(x=t["transformer.wpe.weight"])), r"unexpected tensor x;"),
    "missing": (lambda f: rewrite(f, lambda t: t.pop("transformer.ln_f.bias")), r"no tensor ln_f.bias"),
    "head differs": (lambda f: rewrite(f, untie), r"lm_head.weight differs from wte.weight"),
    "integers": (
        lambda f: rewrite(f, lambda t: t.update({"transformer.ln_f.bias": np.ones(32, np.int32)})),
        r"ln_f.bias is I32; weights are",
    ),
    "no tokenizer": (
        lambda f: (f / "vocab.json").unlink(),
        r"a directory without a tokenizer; use .* vocab.json and merges.txt",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(case: str, tmp_path: Path, torch: Any) -> None:
    source = directory(tmp_path / "source")
    change, message = BAD[case]
    change(source)
    with pytest.raises(UserError, match=message) as error:
        cli.run(["convert", str(source), str(tmp_path / "target")])
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert not (source / "executed").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_types": [[["global", "sideways"], 2]]}, "attention_types = "),
        ({"attention_types": [[["global", "local"], 3]]}, "4 layers together"),
        ({"attention_types": [[["global"], 10**15]]}, "4 layers together"),
        ({"window_size": 0}, "window_size = 0: expected a positive"),
        ({"intermediate_size": 9}, "intermediate_size = 9: gptjax has only None or 128"),
    ],
)
def test_bad_gpt_neo_configs(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    model = replace(SMALL, num_layers=4, attention_pattern=("dense", "banded"), window=5, qkv_bias=False)
    source = directory(tmp_path / "source", model)
    configure(source, **changes)
    with pytest.raises(UserError, match=message):
        open_directory(source)


LLAMA = ModelConfig(
    num_layers=2,
    num_heads=4,
    embed_dim=32,
    seq_len=24,
    vocab_size=261,
    num_kv_heads=2,
    head_size=6,
    mlp_size=40,
    norm="rms",
    positions="rotary",
    activation="swiglu",
    qkv_bias=False,
    biases=False,
    tied_head=False,
    scan_layers=False,
)
NEO = replace(SMALL, num_layers=2, attention_pattern=("dense", "banded"), window=5, qkv_bias=False, seq_len=24)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu': gptjax has only 'silu'"),
        ({"mlp_bias": True}, "mlp_bias = True: gptjax has only False"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_parameters = .*'llama3'.* only 'default'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling = .*'linear'.* only 'default'"),
        ({"rms_norm_eps": 0}, "rms_norm_eps = 0: expected a number above 0"),
        ({"num_key_value_heads": 3}, "model.num_kv_heads = 3: does not divide model.num_heads = 4; nearest"),
        ({"head_dim": 7}, "model.head_size = 7: rotary positions turn pairs; nearest 8"),
        ({"tie_word_embeddings": True}, "lm_head.weight differs from embed_tokens.weight"),
    ],
)
def test_bad_llama_configs(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    source = directory(tmp_path / "source", LLAMA)
    configure(source, **changes)
    with pytest.raises(UserError, match=message) as error:
        open_directory(source)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "relu"}, "model.activation = relu: LlamaForCausalLM, .* has swiglu; .* --model.activation swi"),
        ({"positions": "learned"}, "model.biases = false: GPTNeoForCausalLM, which is nearest .* --model.biases true"),
        ({"attention_pattern": ("banded",)}, "model.attention_pattern = banded: .* --model.attention_pattern dense"),
        (
            {"norm": "layer", "num_kv_heads": 0},
            "model.activation = swiglu: FalconForCausalLM, .* --model.activation gelu",
        ),
    ],
)
def test_what_no_architecture_computes_is_not_written(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        counterpart(replace(LLAMA, **change))


LATER = replace(SMALL, seq_len=24, positions="rotary", activation="gelu", biases=False, qkv_bias=False)
FALCONS = (
    replace(LATER, parallel_mlp="one_norm", num_kv_heads=1),
    replace(LATER, parallel_mlp="two_norms", num_kv_heads=2),
)
FAMILIES = {
    "gpt2": replace(SMALL, seq_len=24),
    "gpt_neo": NEO,
    "llama": LLAMA,
    "falcon_7b": FALCONS[0],
    "falcon_40b": FALCONS[1],
}


@pytest.mark.parametrize("model", FAMILIES.values(), ids=FAMILIES)
def test_the_engines_greedy_text_is_that_of_transformers(
    model: ModelConfig, torch: Any, transformers: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = directory(tmp_path / "peer", model)
    assert cli.run(["convert", str(folder), str(tmp_path / "run")]) == 0
    assert cli.run(["convert", str(tmp_path / "run"), str(tmp_path / "again")]) == 0
    assert "folded into q" not in capsys.readouterr().out
    assert same_bytes(bytes_of(folder), bytes_of(tmp_path / "again"))
    peer, ours = transformers.AutoModelForCausalLM.from_pretrained(folder).eval(), gptjax.load(str(folder))
    for length in (1, 7):
        prompt = np.random.default_rng(length).integers(0, 256, length).tolist()
        (reply,) = ours.engine.run([Request(prompt, 15, Sampling(0.0))])
        ids = torch.tensor([prompt])
        theirs = peer.generate(ids, max_new_tokens=15, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert reply.tokens == theirs[0, length:].tolist()


@settings(max_examples=100)
@given(data=st.data())
def test_no_flipped_bit_passes(whole: Path, data: st.DataObject) -> None:
    """In the weights every one is caught; config.json is either refused in one line or still a config."""
    file, must_fail = data.draw(st.sampled_from([("model.safetensors", True), ("config.json", False)]))
    good = (whole / file).read_bytes()
    broken = bytearray(good)
    # Half of the weights' flips go to the header, a small part of the file.
    most = data.draw(st.sampled_from([len(good), 8 + int.from_bytes(good[:8], "little")])) if must_fail else len(good)
    broken[data.draw(st.integers(0, most - 1))] ^= 1 << data.draw(st.integers(0, 7))
    expected = bytes_of(whole)
    (whole / file).write_bytes(broken)
    try:
        open_directory(whole)
        assert not must_fail or same_bytes(bytes_of(whole), expected)  # such as a flip in "format"
    except UserError as error:
        assert "\n" not in str(error)
    finally:
        (whole / file).write_bytes(good)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return directory(tmp_path_factory.mktemp("whole") / "folder", replace(SMALL, embed_dim=8))


def test_the_command_line_says_one_line_and_fails(tmp_path: Path) -> None:
    source = directory(tmp_path / "source")
    disguise(source)
    command = [sys.executable, "-m", "gptjax", "convert", str(source), str(tmp_path / "target")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and not (source / "executed").exists()
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_what_cannot_be_exported(tiny: Config, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"attention_pattern = dense,banded.*--model.qkv_bias false"):
        counterpart(tiny.model)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").touch()
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        cli.run(["convert", str(trained), str(taken)])
    with pytest.raises(UserError, match=r"cannot write \(Not a directory\)"):
        cli.run(["convert", str(trained), str(taken / "file" / "below")])
    with pytest.raises(UserError, match="not a run folder"):
        cli.run(["convert", str(taken), str(tmp_path / "target")])
    big = [Outgoing("wte.weight", (2,), lambda: np.array([1.0, 1e30], np.float32))]
    with pytest.raises(UserError, match=r"wte.weight: holds values that are not finite in float16"):
        write_tensors(tmp_path, big, np.dtype(np.float16))
    damaged = tmp_path / "damaged"
    shutil.copytree(trained, damaged)
    for file in damaged.glob("checkpoints/*/state/**/d/*"):
        file.write_bytes(b"\0" * file.stat().st_size)
    with pytest.raises(UserError, match=r"checkpoint .* is damaged"):
        cli.run(["convert", str(damaged), str(tmp_path / "target")])
    assert not (tmp_path / "target").exists() and not list(tmp_path.glob(".*"))


def with_vocabulary(folder: Path, size: int) -> Path:
    """Random weights for `size` ids beside the bytes tokenizer of 261."""
    folder.mkdir()
    model = replace(SMALL, vocab_size=size)
    write_directory(folder, {"model": model}, random_params(model), 256)
    write_tokenizer(load_tokenizer("bytes"), folder, 261, 12)
    return folder


def test_a_model_with_fewer_ids_than_its_tokenizer_is_refused_by_every_verb(tmp_path: Path) -> None:
    folder = with_vocabulary(tmp_path / "a", 256)
    for words in (["sample"], ["convert"], ["train", "--data.source", "README.md"]):
        target = [str(tmp_path / "b")] * (words[0] == "convert")
        with pytest.raises(UserError, match=r"model.vocab_size = 256: the tokenizer .* needs 257"):
            cli.run([words[0], str(folder), *target, *words[1:]])
    assert not (tmp_path / "b").exists()


def test_a_model_with_more_ids_than_its_tokenizer_samples_only_those(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = with_vocabulary(tmp_path / "a", 2000)
    assert cli.run(["sample", str(folder), "--tokens", "60", "--roll", "--temperature", "9", "--prompt", "a"]) == 0
    assert len(capsys.readouterr().out) > 15  # each of 60 ids has a name, a byte or a part of a character
    assert cli.run(["convert", str(folder), str(tmp_path / "b")]) == 0
    assert cli.run(["convert", str(tmp_path / "b"), str(tmp_path / "c")]) == 0
    again = load_tokenizer(tokenizer_spec(tmp_path / "c"))
    assert again.special == load_tokenizer("bytes").special and again.vocab_size == 261


texts = st.lists(st.one_of(st.text(), st.sampled_from(["  ", "\n\n", "\r\n", "'ll", " 12", "é", "e\u0301", "😀"])))


@pytest.fixture(scope="module")
def exported(shared: Path, transformers: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """GPT-2's tokenizer: ours, ours again from its export, and transformers' from the same."""
    folder = tmp_path_factory.mktemp("tokenizer")
    ours = load_tokenizer(f"gpt2:{shared / 'gpt2-bpe'}")
    assert write_tokenizer(ours, folder, 50257, 1024) == ""
    peer = transformers.AutoTokenizer.from_pretrained(folder)
    return ours, load_tokenizer(tokenizer_spec(folder)), peer


@settings(max_examples=100)
@given(text=texts.map("".join))
def test_gpt2_ids_survive_the_export(exported: Any, text: str) -> None:
    ours, again, peer = exported
    assert ours.encode(text).tolist() == again.encode(text).tolist() == peer(text).input_ids


def test_gpt2_specials_and_the_single_file_of_transformers(exported: Any, tmp_path: Path) -> None:
    ours, again, peer = exported
    assert len(peer) == 50257 and peer.eos_token_id == ours.eot == 50256
    assert again.pieces == ours.pieces and again.special == ours.special
    peer.save_pretrained(tmp_path)
    assert not (tmp_path / "vocab.json").exists()
    single = load_tokenizer(tokenizer_spec(tmp_path))
    assert single.encode(TEXT).tolist() == ours.encode(TEXT).tolist() and single.pieces == ours.pieces
    assert write_tokenizer(single, tmp_path, 50261, 9) == ""  # now with the chat tokens
    assert load_tokenizer(tokenizer_spec(tmp_path)).special == ours.special


@settings(max_examples=100)
@given(text=texts.map("".join))
def test_bytes_survive_the_export(bytes_exported: Any, text: str) -> None:
    again, peer = bytes_exported
    assert list(text.encode()) == again.encode(text).tolist() == peer(text).input_ids


@pytest.fixture(scope="module")
def bytes_exported(transformers: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    ours = load_tokenizer("bytes")
    assert write_tokenizer(ours, folder, 261, 1024) == ""
    again = load_tokenizer(tokenizer_spec(folder))
    assert again.pieces == ours.pieces and again.special == ours.special
    return again, transformers.AutoTokenizer.from_pretrained(folder)


def test_byte_level_pairs_of_another_size_and_order(transformers: Any, tmp_path: Path) -> None:
    """A tokenizer of transformers' own making: special tokens first, then bytes, then merges."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator([TEXT * 3, "the theme then there"] * 5, 300, 2, special_tokens=["<pad>", SPECIALS[0]])
    made.save_model(str(tmp_path))
    ours = load_tokenizer(tokenizer_spec(tmp_path))
    assert ours.eot == 1 and ours.vocab_size == len(made.get_vocab()) + 4
    assert ours.encode(TEXT).tolist() == made.encode(TEXT).ids and ours.decode(ours.encode(TEXT)) == TEXT


@pytest.fixture(scope="module")
def sentencepiece_exported(transformers: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_sentencepiece([TEXT * 9, "the theme then there     these =====\n" * 9], 360, folder / "some.model")
    ours = load_tokenizer(str(folder / "some.model"))
    (folder / "out").mkdir()
    assert "U+2581" in write_tokenizer(ours, folder / "out", 360, 9)
    (folder / "out" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    again = load_tokenizer(tokenizer_spec(folder / "out"))
    assert again.pieces == ours.pieces and again.special == ours.special
    peer = transformers.AutoTokenizer.from_pretrained(folder / "out")
    assert (len(peer), peer.eos_token_id) == (360, ours.eot)
    return ours, again, peer


@settings(max_examples=100)
@given(text=texts.map("".join) | st.text(" =the\n"))
def test_sentencepiece_ids_survive_the_export(sentencepiece_exported: Any, text: str) -> None:
    ours, again, peer = sentencepiece_exported
    assert ours.encode(text).tolist() == again.encode(text).tolist()
    spelled = ("\u2581", "<unk>", *ours.special)  # transformers takes a reserved name in a text for the token
    if not any(name in text for name in spelled):
        assert ours.encode(text).tolist() == peer(text).input_ids
