"""T5 and BART in and out against `transformers`. Run: pytest tests/test_convert_encoder_decoders.py"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from converting import bytes_of, config_of, configure, random_params, rewrite, same_bytes

from gptjax import cli
from gptjax.config import ModelConfig
from gptjax.convert.architecture import every_box
from gptjax.convert.huggingface import counterpart, finetune_config, full_name, open_directory, write_directory
from gptjax.convert.tokenizer import write_tokenizer
from gptjax.data.rows import PADDING, PairRows, pair_row
from gptjax.data.tokenizers import load_tokenizer
from gptjax.errors import UserError
from gptjax.infer.engine import Engine
from gptjax.infer.prepare import for_cpu
from gptjax.infer.request import Request
from gptjax.infer.sampling import Sampling
from gptjax.infer.writing import Writing
from gptjax.model.cache import At, empty_cache, memory_of
from gptjax.model.gpt import GPT, forward
from gptjax.model.loss import cross_entropy, logits
from gptjax.parallel.network import EncoderDecoder
from gptjax.sharding.rules import leaf_name
from gptjax.stages.weights import on_device, open_weights

SOURCE, TARGET = 17, 15  # places of each side, more than T5's distances tell apart here
SOURCES, TARGETS = (17, 9, 1), (15, 4, 11)  # tokens of each row
T5_SIZES = {"d_model": 10, "d_kv": 3, "d_ff": 13, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}
T5_SIZES |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "vocab_size": 97}
BART_SIZES = {"d_model": 12, "encoder_layers": 3, "decoder_layers": 2, "max_position_embeddings": 18, "vocab_size": 89}
BART_SIZES |= {"encoder_attention_heads": 3, "decoder_attention_heads": 2, "encoder_ffn_dim": 11, "decoder_ffn_dim": 17}


def t5(transformers: Any, torch: Any, **how: Any) -> Any:
    config = transformers.T5Config(**T5_SIZES, decoder_start_token_id=0, **how)
    return transformers.T5ForConditionalGeneration(config)


def t5_with_a_head(transformers: Any, torch: Any) -> Any:
    peer = t5(transformers, torch, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    peer.lm_head.weight = torch.nn.Parameter(0.3 * torch.randn_like(peer.shared.weight))
    peer.all_tied_weights_keys.pop("lm_head.weight")
    return peer


def bart(transformers: Any, torch: Any) -> Any:
    peer = transformers.BartForConditionalGeneration(transformers.BartConfig(**BART_SIZES, scale_embedding=True))
    peer.final_logits_bias.normal_().requires_grad_(True)
    return peer


PEERS: dict[str, Callable[[Any, Any], Any]] = {"t5_1_0": t5, "t5_1_1": t5_with_a_head, "bart": bart}


@dataclass(frozen=True)
class Both:
    """A model of transformers, its directory, and ours that was read from there."""

    peer: Any
    folder: Path
    network: EncoderDecoder
    params: Any
    rows: PairRows

    @property
    def for_peer(self) -> dict[str, np.ndarray]:
        """The rows as transformers takes them."""
        return {
            "input_ids": self.rows.source,
            "attention_mask": 1 - self.rows.source_segments,
            "decoder_input_ids": self.rows.tokens,
            "decoder_attention_mask": 1 - self.rows.segments,
        }


@pytest.fixture(scope="module", params=PEERS)
def both(request: Any, torch: Any, transformers: Any, tmp_path_factory: pytest.TempPathFactory) -> Both:
    torch.manual_seed(0)
    peer = PEERS[request.param](transformers, torch).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("peer")
    peer.save_pretrained(folder)
    opened = open_directory(folder)
    stacked = {"model": True, "encoder": False}  # each side as it will
    models = {name: replace(model, scan_layers=stacked[name]) for name, model in opened.models.items()}
    config = config_of(**models)
    params = opened.load(config.model, on_device(config, jax.devices()[0]))
    rng, start = np.random.default_rng(0), peer.config.decoder_start_token_id
    texts = [[rng.integers(3, opened.model.vocab_size, n) for n in sizes] for sizes in (SOURCES, TARGETS)]
    rows = [pair_row(*pair, start, SOURCE, TARGET) for pair in zip(*texts, strict=True)]
    return Both(peer, folder, EncoderDecoder(config, "cpu"), params, PairRows(*map(np.stack, zip(*rows, strict=True))))


def test_states_logits_and_gradients_equal_transformers(both: Both, torch: Any) -> None:
    network, rows, model = both.network, both.rows, both.network.config.model

    def loss(params: Any) -> tuple[jax.Array, Any]:
        states = network.encode(params, rows.source, rows.source_segments, None)
        hidden, head, targets = network.before_head(params, rows, None)
        scores = logits(hidden, head, model.vocab_size)[..., : model.vocab_size]
        nats = cross_entropy(hidden, head, targets, model.vocab_size, 256)
        return nats / (rows.targets != PADDING).sum(), (states, scores)

    (value, (states, scores)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(both.params)
    given = {name: torch.tensor(array, dtype=torch.long) for name, array in both.for_peer.items()}
    labels = torch.tensor(np.where(rows.targets == PADDING, -100, rows.targets), dtype=torch.long)
    both.peer.zero_grad()
    out = both.peer(**given, labels=labels)
    out.loss.backward()
    read, written = rows.source_segments == 0, rows.segments == 0
    np.testing.assert_allclose(states[read], out.encoder_last_hidden_state.detach().numpy()[read], atol=1e-4)
    np.testing.assert_allclose(scores[written], out.logits.detach().numpy()[written], atol=1e-4)
    assert float(value) == pytest.approx(out.loss.item(), rel=1e-5)

    theirs = dict(both.peer.named_parameters()) | dict(both.peer.named_buffers())
    leaves = {leaf_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(grads)}
    table = every_box(counterpart(**network.config.models), network.config.models)
    assert {box.leaf for box in table} == leaves.keys()
    architecture = counterpart(**network.config.models)
    for box in table:
        grad = theirs[full_name(architecture, frozenset(), box)].grad.numpy()
        assert np.abs(grad).max() > 1e-6 or "k_proj.bias" in box.tensor, box.tensor  # softmax sees no shift of keys
        np.testing.assert_allclose(box.tensor_of(leaves[box.leaf]), grad, atol=1e-5, err_msg=box.tensor)


def test_the_way_back_is_exact(both: Both, torch: Any, transformers: Any, tmp_path: Path) -> None:
    config = finetune_config(both.folder)
    assert config.start_id == both.peer.config.decoder_start_token_id
    eos = both.peer.config.eos_token_id
    write_directory(tmp_path, both.network.config.models, both.params, eos, start=config.start_id)
    assert same_bytes(bytes_of(tmp_path), bytes_of(both.folder))
    assert open_directory(tmp_path).models == open_directory(both.folder).models
    assert finetune_config(tmp_path).start_id == config.start_id
    again = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    given = {name: torch.tensor(array, dtype=torch.long) for name, array in both.for_peer.items()}
    with torch.no_grad():
        assert torch.equal(again(**given).logits, both.peer(**given).logits)
    for name in ("decoder_start_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(again.config, name) == getattr(both.peer.config, name)


def decoder(both: Both, on_cpu: bool) -> tuple[GPT, Any]:
    """The decoder with its parameters: as they are trained, or as a CPU decodes."""
    if not on_cpu:
        return both.network.decoder, both.params
    model, arrange = for_cpu(both.network.decoder)
    return model, arrange({name: part for name, part in both.params.items() if name != "encoder"})


@pytest.mark.parametrize("on_cpu", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_cached_decoders_greedy_text_is_that_of_transformers(both: Both, torch: Any, on_cpu: bool) -> None:
    network, rows, config = both.network, both.rows, both.network.config.model
    model, params = decoder(both, on_cpu)
    hidden = jax.jit(partial(network.encode, key=None))(both.params, rows.source, rows.source_segments)
    memory = jax.jit(partial(memory_of, config))(both.params, hidden)
    empty = empty_cache(config, len(SOURCES), TARGET, model.dtype, SOURCE)
    cache = tuple((*own[:2], *made) for own, made in zip(empty, memory, strict=True))
    assert jax.tree.map(jnp.shape, cache) == jax.tree.map(jnp.shape, empty)

    @jax.jit
    def step(params: Any, cache: Any, tokens: jax.Array, place: jax.Array) -> tuple[jax.Array, Any]:
        every = jnp.ones(len(tokens), jnp.int32)
        at = At(place * every, every, None, jnp.asarray(SOURCES))
        hidden, head, cache = forward(model, params, tokens[:, None], cache=cache, at=at)
        return logits(hidden[:, 0], head, config.vocab_size, model.parallelism.outputs_first), cache

    forced, ours = cache, [rows.tokens[:, 0]]
    whole, head, _ = jax.jit(partial(network.before_head, key=None))(both.params, rows)
    expected = np.asarray(logits(whole, head, config.vocab_size))[..., : config.vocab_size]
    for place in range(TARGET):
        scores, forced = step(params, forced, rows.tokens[:, place], place)
        there = rows.segments[:, place] == 0
        found = np.asarray(scores)[:, : config.vocab_size]
        np.testing.assert_allclose(found[there], expected[there, place], atol=1e-4)
        scores, cache = step(params, cache, ours[-1], place)
        ours.append(np.asarray(scores).argmax(-1).astype(np.int32))

    # Without their cache, which has as many layers as the encoder (transformers 5.23).
    about = {"do_sample": False, "num_beams": 1, "max_new_tokens": TARGET, "pad_token_id": 0, "use_cache": False}
    both.peer.generation_config.update(eos_token_id=None, forced_eos_token_id=None)
    given = {name: torch.tensor(both.for_peer[name], dtype=torch.long) for name in ("input_ids", "attention_mask")}
    theirs = both.peer.generate(**given, **about)
    assert np.stack(ours, axis=1).tolist() == theirs.tolist()
    assert len({tuple(text) for text in theirs.tolist()}) == len(SOURCES)  # each looks at its own source


T5_DECODER = ModelConfig(
    num_layers=2,
    num_heads=3,
    embed_dim=8,
    vocab_size=261,
    seq_len=512,
    head_size=5,
    mlp_size=7,
    norm="rms",
    norm_eps=1e-6,
    positions="relative",
    position_buckets=6,
    position_reach=9,
    activation="relu",
    scale_scores=False,
    qkv_bias=False,
    biases=False,
    cross_attention=True,
    scale_head=True,
    scan_layers=False,
)
BART_DECODER = ModelConfig(
    num_layers=2,
    num_heads=2,
    embed_dim=8,
    vocab_size=261,
    seq_len=16,
    norm_place="after",
    norm_embedding=True,
    position_offset=2,
    activation="gelu",
    cross_attention=True,
    head_bias=True,
    scan_layers=False,
)
OF_ENCODERS = {"causal": False, "cross_attention": False, "head_bias": False, "scale_head": False, "num_layers": 1}
T5 = {"model": T5_DECODER, "encoder": replace(T5_DECODER, **OF_ENCODERS)}
BART = {"model": BART_DECODER, "encoder": replace(BART_DECODER, **OF_ENCODERS, mlp_size=9)}
LATER = {"model": replace(T5_DECODER, activation="geglu", tied_head=False, scale_head=False)}
LATER |= {"encoder": replace(T5["encoder"], activation="geglu")}
FAMILIES = {"t5_1_0": T5, "t5_1_1": LATER, "bart": BART}


def directory(folder: Path, models: dict[str, ModelConfig]) -> Path:
    """An export of random weights with the bytes tokenizer."""
    folder.mkdir()
    write_directory(folder, models, random_params(**models), 256, start=3)
    write_tokenizer(load_tokenizer("bytes"), folder, 261, 16)
    return folder


@pytest.mark.parametrize("models", FAMILIES.values(), ids=FAMILIES)
def test_a_directory_becomes_a_run_and_a_directory_again(
    models: dict[str, ModelConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, run, again = directory(tmp_path / "a", models), tmp_path / "run", tmp_path / "b"
    assert cli.run(["convert", str(folder), str(run)]) == 0
    assert cli.run(["convert", str(run), str(again)]) == 0
    shown = capsys.readouterr().out
    assert "ForConditionalGeneration.from_pretrained(" in shown and "gptjax sample" not in shown
    assert same_bytes(bytes_of(folder), bytes_of(again))
    first, last = (json.loads((path / "config.json").read_text()) for path in (folder, again))
    assert first == last and first["decoder_start_token_id"] == 3
    for path in (folder, run):
        weights = open_weights(str(path))
        params = weights.load(weights.config.model, on_device(weights.config, jax.devices()[0]))
        jax.tree.map(np.testing.assert_array_equal, params, random_params(**models))


def rename(tensors: dict[str, np.ndarray], old: str, new: str) -> None:
    tensors[new] = tensors.pop(old)


COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")


def copied(tensors: dict[str, np.ndarray]) -> None:
    tensors |= dict.fromkeys(COPIES, tensors["shared.weight"])


@pytest.mark.parametrize("change", [copied, *(partial(rename, old="shared.weight", new=name) for name in COPIES)])
def test_the_embedding_is_read_under_any_of_its_names(change: Callable[[Any], None], tmp_path: Path) -> None:
    folder = directory(tmp_path / "a", T5)
    rewrite(folder, change)
    config = finetune_config(folder)
    params = open_directory(folder).load(config.model, on_device(config, jax.devices()[0]))
    np.testing.assert_array_equal(params["embedding"], random_params(**T5)["embedding"])


def bare(tensors: dict[str, np.ndarray]) -> None:
    """As a BartModel is saved."""
    del tensors["final_logits_bias"]
    for name in list(tensors):
        rename(tensors, name, name.removeprefix("model."))


def test_a_base_model_has_no_bias_of_its_head(tmp_path: Path) -> None:
    folder, expected = directory(tmp_path / "a", BART), random_params(**BART)
    rewrite(folder, bare)
    configure(folder, architectures=["BartModel"])
    config = finetune_config(folder)
    params = open_directory(folder).load(config.model, on_device(config, jax.devices()[0]))
    jax.tree.map(np.testing.assert_array_equal, params, expected | {"head_bias": np.zeros(384, np.float32)})


CROSS = "decoder.block.1.layer.1.EncDecAttention.k.weight"
BAD: dict[str, tuple[dict[str, ModelConfig], Callable[[Path], Any], str]] = {
    "t5 activation": (
        T5,
        lambda f: configure(f, feed_forward_proj="gated-relu"),
        "feed_forward_proj = 'gated-relu': gptjax has only 'relu' or 'gated-gelu' or 'gated-silu'",
    ),
    "t5 function": (T5, lambda f: configure(f, dense_act_fn="gelu"), "dense_act_fn = 'gelu': gptjax has only 'relu'"),
    "t5 width of a head": (T5, lambda f: configure(f, d_kv=None), "d_kv = None: expected a positive whole number"),
    "t5 buckets": (T5, lambda f: configure(f, relative_attention_num_buckets=7), "model.position_buckets = 7"),
    "t5 depth": (T5, lambda f: configure(f, num_decoder_layers=10**12), "1000000000001 layers, and only"),
    "t5 deeper": (T5, lambda f: configure(f, num_layers=2), r"no tensor encoder\.block\.1\.\S+, which config.json"),
    "t5 cross-attention": (T5, lambda f: rewrite(f, lambda t: t.pop(CROSS)), f"no tensor {CROSS}, which config"),
    "t5 head": (T5, lambda f: configure(f, scale_decoder_outputs=False), "no tensor lm_head.weight, which config"),
    "t5 two embeddings": (
        T5,
        lambda f: rewrite(f, lambda t: t.update({"encoder.embed_tokens.weight": t["shared.weight"] + 1})),
        "encoder.embed_tokens.weight differs from shared.weight; config.json says that there is one embedding",
    ),
    "t5 other head": (LATER, lambda f: configure(f, scale_decoder_outputs=True), "lm_head.weight differs from shared"),
    "t5 no start": (
        T5,
        lambda f: configure(f, decoder_start_token_id=None, bos_token_id=None),
        r"source/config.json: decoder_start_token_id = None: expected the id that a text starts with, below 261",
    ),
    "t5 start": (T5, lambda f: configure(f, decoder_start_token_id=261), "decoder_start_token_id = 261: expected"),
    "bart activation": (
        BART,
        lambda f: configure(f, activation_function="silu"),
        "activation_function = 'silu': gptjax has only 'gelu' or 'gelu_new' or 'relu'",
    ),
    "bart norm": (
        BART,
        lambda f: configure(f, normalize_before=True),
        "normalize_before = True: gptjax has only False",
    ),
    "bart head": (BART, lambda f: configure(f, tie_word_embeddings=False), "tie_word_embeddings = False: gptjax has"),
    "bart heads": (
        BART,
        lambda f: configure(f, encoder_attention_heads=3),
        "encoder.num_heads = 3: does not divide encoder.embed_dim = 8",
    ),
    "bart classes": (
        BART,
        lambda f: configure(f, architectures=["BartForSequenceClassification"]),
        "of bart gptjax converts BartForConditionalGeneration",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case: str, tmp_path: Path) -> None:
    models, change, message = BAD[case]
    folder = directory(tmp_path / "source", models)
    change(folder)
    with pytest.raises(UserError, match=message) as error:
        open_directory(folder)
    assert "\n" not in str(error.value) and str(error.value).startswith(str(folder))
    assert str(error.value).count(str(folder)) == 1


@pytest.mark.parametrize(
    ("models", "section", "change", "message"),
    [
        (T5, "model", {"activation": "gelu"}, "model.activation = gelu: T5ForCond.* has relu or geglu or swiglu"),
        (T5, "model", {"scale_head": False}, "model.scale_head = false: .* has true; .* --model.scale_head true"),
        (T5, "encoder", {"mlp_size": 9}, "encoder.mlp_size = 9: .* has 7; .* --encoder.mlp_size 7"),
        (BART, "model", {"norm_place": "before"}, "model.norm_place = before: BartForCond.* has after"),
        (BART, "encoder", {"seq_len": 8}, "encoder.seq_len = 8: .* has 16; .* --encoder.seq_len 16"),
        (BART, "encoder", {"positions": "sinusoidal"}, "encoder.positions = sinusoidal: .* has learned"),
    ],
)
def test_what_no_architecture_computes_is_not_written(
    models: dict[str, ModelConfig], section: str, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        counterpart(**models | {section: replace(models[section], **change)})


def test_a_size_may_be_said_or_left_to_its_rule() -> None:
    assert counterpart(**BART | {"encoder": replace(BART["encoder"], head_size=4)}).model_type == "bart"
    models = {name: replace(model, head_size=0, num_heads=2) for name, model in T5.items()}
    assert counterpart(models["model"], replace(models["encoder"], head_size=4)).model_type == "t5"


def test_init_from_names_the_side_that_differs(tmp_path: Path) -> None:
    weights = open_weights(str(directory(tmp_path / "a", BART)))
    weights.require(BART)
    with pytest.raises(UserError, match=r"its encoder.num_layers is 1, not 2; set --encoder.num_layers 1"):
        weights.require(BART | {"encoder": replace(BART["encoder"], num_layers=2)})
    with pytest.raises(UserError, match=r"it has the sections model and encoder, not model; name another"):
        weights.require({"model": BART["model"]})


@pytest.mark.parametrize("beams", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_texts_of_the_engine_and_of_beams_are_those_of_generate(both: Both, torch: Any, beams: int) -> None:
    """Greedily by the engine, which reads each source once; by beams with texts of several lengths, since the id that
    ends them is one that is often likely."""
    network, rows, size = both.network, both.rows, both.network.config.model.vocab_size
    start = both.peer.config.decoder_start_token_id
    plain = Writing(network, start, size, np.ones(size, bool), max_tokens=TARGET)  # an end that never comes
    first = np.asarray(plain.write(both.params, rows.source, rows.source_segments).tokens)[:, 0]
    ids, counts = np.unique(first[:, 2:], return_counts=True)
    end = int(ids[counts.argmax()])
    writing = replace(plain, end=end, beams=beams)
    memory = network.encode(both.params, rows.source, rows.source_segments, None)
    found = jax.device_get(writing.searched(both.params, memory, rows.source_segments, beams))
    ours = [found.tokens[i, 0, : found.lengths[i, 0]].tolist() for i in range(len(SOURCES))]

    both.peer.generation_config.update(eos_token_id=end, forced_eos_token_id=None)
    given = {name: torch.tensor(both.for_peer[name], dtype=torch.long) for name in ("input_ids", "attention_mask")}
    about = {"do_sample": False, "num_beams": beams, "max_new_tokens": TARGET, "use_cache": False, "pad_token_id": 0}
    theirs = both.peer.generate(**given, **about)[:, 1:].tolist()
    assert ours == [text[: text.index(end) + 1] if end in text else text for text in theirs]
    assert len({len(text) for text in ours}) > 1 or beams > 1
    if beams == 1:
        engine = Engine(network.decoder, both.params, slots=2, encoder=network)
        asked = [[*map(int, source[:n])] for source, n in zip(rows.source, SOURCES, strict=True)]
        how = {"max_tokens": TARGET, "sampling": Sampling(temperature=0), "stop_tokens": (end,)}
        replies = engine.run([Request([start], source=source, **how) for source in asked])
        assert [reply.tokens for reply in replies] == ours
