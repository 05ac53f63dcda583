"""Supervised fine-tuning: rows of conversations, adapters, epochs, the best checkpoint. Run: pytest
tests/test_sft.py"""

import json
import random
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict
from joined import together
from toy import records

from gptjax import cli
from gptjax.config import (
    Config,
    DataConfig,
    DialogueConfig,
    LayoutConfig,
    LoRAConfig,
    ModelConfig,
    OptimizerConfig,
    SFTConfig,
    TrainConfig,
    from_json,
    to_json,
    validate,
)
from gptjax.data.chat import Message
from gptjax.data.dialogues import Dropped, parse
from gptjax.data.examples import ExampleFeed, open_examples, stacked
from gptjax.data.rows import PADDING, Rows
from gptjax.data.sources import build
from gptjax.data.tokenizers import load_tokenizer
from gptjax.errors import UserError
from gptjax.model.kernels import BACKENDS
from gptjax.model.lora import is_adapter, merge
from gptjax.model.loss import Head, log_probs
from gptjax.parallel.network import Network
from gptjax.sharding.mesh import make_mesh
from gptjax.sharding.rules import Layout, rule_table
from gptjax.stages import SFT, launch
from gptjax.stages.weights import chat_model, on_device, open_weights
from gptjax.train import loop
from gptjax.train.checkpoint import restore_params
from gptjax.train.parts import split
from gptjax.train.run import open_run
from gptjax.train.step import abstract_state, init_state

T = 64
WORDS = [f"w{i}" for i in range(9)]


def _conversation(rng: random.Random, turns: int) -> dict[str, Any]:
    """The assistant says the user's words backwards: something to learn."""
    messages = []
    for _ in range(turns):
        words = rng.choices(WORDS, k=rng.randint(1, 3))
        messages += [{"role": "user", "content": " ".join(words)}]
        messages += [{"role": "assistant", "content": " ".join(reversed(words))}]
    return {"messages": messages}


@pytest.fixture(scope="session")
def dialogues(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 conversations of one to six turns, a few of them longer than the context."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("dialogues") / "all.jsonl"
    lines = [json.dumps(_conversation(rng, rng.choice([1, 1, 2, 6]))) for _ in range(60)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def small(dialogues: Path, tiny: Config) -> SFTConfig:
    """Fine-tuning of a random model, two epochs of it."""
    return SFTConfig(
        name="sft",
        model=ModelConfig(
            num_layers=2,
            num_heads=2,
            embed_dim=32,
            seq_len=T,
            vocab_size=261,
            attention_pattern=("dense", "banded"),
            window=16,
            qkv_bias=False,
        ),
        data=DialogueConfig(
            source=str(dialogues),
            tokenizer="bytes",
            cache_dir=tiny.data.cache_dir,
            train_split="train[:80%]",
            eval_split="train[80%:]",
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_tokens=0, decay_tokens=0),
        train=TrainConfig(
            batch_size=8,
            micro_batch_size=8,
            epochs=2,
            log_interval=1,
            eval_interval=0,
            save_interval=0,
            tensorboard=False,
            compile_cache=tiny.train.compile_cache,
        ),
    )


def made(config: SFTConfig, devices: int = 1) -> SFT:
    layout = Layout(make_mesh(config, jax.devices()[:devices]), rule_table(config.layout))
    tokenizer = SFT.fit_tokenizer(config, load_tokenizer("bytes"))
    return SFT(config, "cpu", layout, tokenizer, build(config.data))


@pytest.fixture(scope="session")
def stage(small: SFTConfig) -> SFT:
    return made(small)


def file_of(config: Config, folder: Path) -> str:
    """A config as a user's file."""
    path = folder / "config.py"
    text = f"from gptjax.config import from_json\n\n\ndef config():\n    return from_json({to_json(config)!r})\n"
    path.write_text(text)
    return str(path)


def train(config: Config, folder: Path, *words: str) -> Path:
    """A run in folder/run, to its end."""
    run = folder / "run"
    assert cli.run(["train", file_of(config, folder), "--run", str(run), *words]) == 0
    return run


# Rows


def test_a_row_asks_for_the_assistants_words_alone(stage: SFT) -> None:
    """Each example again from its row: its tokens, what is asked of them, where it stands, and nothing else."""
    found, chat = stage.training, stage.chat
    epoch = found.epoch(0, 0)
    indices = max((epoch.row(place) for place in range(found.num_rows)), key=len)
    assert len(indices) > 1
    row, start = found.row(indices), 0
    for number, index in enumerate(indices):
        example = found[index]
        part = slice(start, start + len(example.ids) - 1)
        assert row.tokens[part].tolist() == example.ids[:-1].tolist()
        asked = np.where(example.trained[1:], example.ids[1:], PADDING)
        assert np.maximum(row.targets[part], PADDING).tolist() == asked.tolist()
        assert row.positions[part].tolist() == list(range(len(example.ids) - 1))
        assert set(row.segments[part]) == {number}
        ends = row.tokens[part][np.flatnonzero(asked == chat.end)]
        assert len(ends) == asked.tolist().count(chat.end) > 0  # the end of a turn is learned
        start = part.stop
    assert (row.targets[start:] == PADDING).all() and set(row.segments[start:]) <= {len(indices)}


def test_what_is_too_long_loses_its_beginning_or_is_left_out_and_counted(stage: SFT, small: SFTConfig) -> None:
    source, chat = stage.training_text, stage.chat
    lengths = [len(chat.render(_messages(source[i].text)).ids) for i in range(len(source))]
    long = sum(length - 1 > T for length in lengths)
    assert long
    cut = stage.training
    assert (len(cut), cut.num_cut, cut.left_out.total()) == (len(source), long, 0)
    where = lengths.index(max(lengths))
    whole = chat.render(_messages(source[where].text))
    assert cut[where].ids.tolist() == whole.ids[-T - 1 :].tolist()
    dropped = open_examples(replace(small.data, too_long="drop"), source, chat, T)
    assert (len(dropped), dropped.left_out) == (len(source) - long, Counter({"longer than the context": long}))
    alone = open_examples(small.data, source, chat, 4)
    assert alone.left_out["of the part in the context all is reply"]
    assert all(not alone[i].trained.all() for i in range(len(alone)))


def _messages(text: str) -> list[Message]:
    found = parse(text)
    assert not isinstance(found, Dropped)
    return found


def test_each_example_is_seen_once_an_epoch_whoever_reads_and_wherever_it_goes_on(stage: SFT) -> None:
    """Three epochs in batches that do not divide them, by one process, by two, and from any row on."""
    found, epochs, micro = stage.training, 3, 8
    end = epochs * found.num_rows

    def tokens_of(start: int, rows: range, batches: int) -> list[np.ndarray]:
        feed = ExampleFeed(found, 0, micro, rows, start, end)
        return [np.asarray(feed.batch(1).tokens[0]) for _ in range(batches)]

    count = -(-end // micro)
    every = np.concatenate(tokens_of(0, range(micro), count))
    halves = [tokens_of(0, rows, count) for rows in (range(4), range(4, 8))]
    assert np.array_equal(every, np.concatenate([np.concatenate(pair) for pair in zip(*halves, strict=True)]))
    assert np.array_equal(every[16:], np.concatenate(tokens_of(16, range(micro), count - 2)))
    threads = ExampleFeed(found, 0, micro, range(micro), 0, end, threads=3)
    assert np.array_equal(every[:16], np.concatenate(np.asarray(threads.batch(2).tokens)))
    threads.close()
    wanted = Counter(tuple(found.row([index]).tokens[: found.packing.lengths[index]]) for index in range(len(found)))
    for epoch in range(epochs):
        drawn = found.epoch(0, epoch)
        indices = [index for place in range(found.num_rows) for index in drawn.row(place)]
        assert sorted(indices) == list(range(len(found)))
        rows = every[epoch * found.num_rows : (epoch + 1) * found.num_rows]
        seen = Counter(
            tuple(row[start : start + found.packing.lengths[index]])
            for place, row in enumerate(rows)
            for index, start in _starts(drawn.row(place), found.packing.lengths)
        )
        assert seen == wanted
    assert not every[end:].any()


def _starts(indices: list[int], lengths: np.ndarray) -> list[tuple[int, int]]:
    return list(zip(indices, np.cumsum([0, *lengths[indices]]).tolist()[:-1], strict=True))


# What a packed conversation sees


def _params(stage: SFT) -> Any:
    """Of a size at which attention is far from even."""
    return jax.tree.map(lambda p: 4 * p, nn.unbox(jax.jit(stage.init)(jax.random.key(0))))


def _stacked(rows: list[Rows]) -> Rows:
    return jax.tree.map(jnp.asarray, stacked(rows))


@pytest.mark.parametrize(
    ("backend", "ways"), [("blockwise", 1), ("reference", 1), pytest.param("blockwise", 2, marks=pytest.mark.slow)]
)
def test_packed_rows_learn_what_single_ones_do(backend: str, ways: int, small: SFTConfig) -> None:
    """Loss and gradients of a whole split, packed and one a row, with the sequence whole and over two devices."""
    model = replace(small.model, attention=backend)
    config = replace(small, model=model, layout=LayoutConfig(fsdp=1, context=ways))
    answers = []
    for packing in (True, False):
        stage = made(replace(config, data=replace(config.data, packing=packing)), ways)
        found = stage.training
        epoch = found.epoch(0, 0)
        batch = _stacked([found.row(epoch.row(place)) for place in range(found.num_rows)])
        rows = batch._replace(targets=jnp.maximum(batch.targets, PADDING))
        answer = jax.jit(jax.value_and_grad(lambda p, r, s=stage: s.loss(p, r, s.counts(r), None)))
        answers.append((found.num_rows, *answer(_params(stage), rows)))
    (packed_rows, packed, packed_grads), (rows_alone, alone, alone_grads) = answers
    assert packed_rows < rows_alone
    assert float(packed) == pytest.approx(float(alone), rel=1e-5)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(alone_grads))
    for a, b in zip(jax.tree.leaves(packed_grads), jax.tree.leaves(alone_grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name in ("blockwise", "reference")])
def test_no_conversation_sees_another(backend: str, stage: SFT, small: SFTConfig) -> None:
    """Another token in one changes no bit of its neighbours, and their loss has no gradient at its tokens. The kernels
    of accelerators are held against the same reference, segments and all, in tests/test_attention.py."""
    config = replace(small, model=replace(small.model, attention=backend))
    stage = made(config)
    found, params = stage.training, _params(stage)
    epoch = found.epoch(0, 0)
    indices = max((epoch.row(place) for place in range(found.num_rows)), key=len)
    rows = _stacked([found.row(indices)])
    (_, begin), *_ = _starts(indices[1:], found.packing.lengths)
    own = slice(found.packing.lengths[indices[0]], found.packing.lengths[indices[:2]].sum())  # the second of the row
    others = np.ones(T, bool)
    others[own] = False
    hidden = jax.jit(lambda tokens: stage.network.before_head(params, rows._replace(tokens=tokens), None)[0])
    before, after = (np.asarray(hidden(rows.tokens.at[0, own.start].add(shift))) for shift in (0, 1))
    assert begin == 0 and not np.array_equal(before[0, own], after[0, own])
    assert np.array_equal(before[0, others], after[0, others])

    def theirs(embedding: Any) -> Any:
        whole = params | {"embedding": embedding}
        hidden, _, targets = stage.network.before_head(whole, rows, None)
        asked = jnp.where(jnp.asarray(others), jnp.maximum(targets, PADDING), PADDING)
        head = jax.lax.stop_gradient(embedding)
        return jnp.sum(log_probs(hidden, Head(head), asked, config.model.vocab_size, 64))

    # A token of its own for the second conversation: whatever reaches its row in the table has leaked.
    rows = rows._replace(tokens=rows.tokens.at[0, own].set(200))
    grads = jax.jit(jax.grad(theirs))(params["embedding"])
    assert not grads[200].any() and grads.any()


# Epochs, kill and resume


def test_training_ends_with_its_epochs_and_the_decay_with_it(small: SFTConfig, stage: SFT, tmp_path: Path) -> None:
    run = train(small, tmp_path)
    steps = [r["step"] for r in records(run, "train")]
    rows = stage.training.num_rows
    assert steps[-1] == -(-2 * rows // 8) and records(run, "train")[-1]["tokens"] == 2 * rows * T
    saved = from_json((run / "config.json").read_bytes())
    assert saved.stage == "sft" and saved.train.epochs == 2
    assert saved.optimizer.decay_tokens == 2 * rows * T  # what was meant by 0, whatever becomes of the epochs
    evaluation = records(run, "eval")[-1]
    assert evaluation["loss"] < evaluation["prompt_loss"] < 5.5  # 5.6 of a model that knows nothing
    assert cli.run(["train", "--resume", str(run), "--train.epochs", "3"]) == 0
    assert records(run, "train")[-1]["tokens"] == 3 * rows * T


@pytest.mark.parametrize(
    "devices",
    [*(pytest.param(count, marks=pytest.mark.whole) for count in (1, 2)), pytest.param(8, marks=pytest.mark.slow)],
)
def test_a_run_that_is_stopped_mid_epoch_ends_where_it_would_have(
    devices: int, small: SFTConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a signal in step 2, on so many devices, and going on there: the same bits; on others the same but for
    rounding."""
    monkeypatch.setattr(launch, "make_mesh", lambda config: make_mesh(config, jax.devices()[:devices]))
    config = replace(small, model=replace(small.model, dropout=0.1), train=replace(small.train, eval_batches=0))
    whole = train(config, _folder(tmp_path / "whole"))
    plain, left = loop.learning_rate, [True]

    def rate(optimizer: Any, tokens: int) -> float:
        if tokens == 8 * T and left:
            left.clear()
            signal.raise_signal(signal.SIGTERM)
            time.sleep(0.2)
        return plain(optimizer, tokens)

    monkeypatch.setattr(loop, "learning_rate", rate)
    folder = _folder(tmp_path / "cut")
    run = folder / "run"
    assert cli.run(["train", file_of(config, folder), "--run", str(run)]) == 128 + 15
    assert records(run, "train")[-1]["step"] < records(whole, "train")[-1]["step"]
    assert cli.run(["train", "--resume", str(run)]) == 0
    ours, theirs = (_saved(each, config) for each in (run, whole))
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert [r["loss"] for r in records(run, "train")] == [r["loss"] for r in records(whole, "train")]


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def _saved(run: Path, config: Config) -> list[np.ndarray]:
    """The parameters of the newest checkpoint."""
    weights = open_weights(str(run))
    params = weights.load(config.model, on_device(weights.config, jax.local_devices()[0]))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]


# Adapters


@pytest.fixture(scope="session")
def base(small: SFTConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to start from: the end of an epoch over all parameters."""
    return train(replace(small, train=replace(small.train, epochs=1)), tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def adapted(small: SFTConfig, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of adapters beside it."""
    config = replace(
        small,
        init_from=str(base),
        data=replace(small.data, tokenizer=""),
        lora=LoRAConfig(rank=2),
        optimizer=replace(small.optimizer, learning_rate=1e-2),
    )
    return train(config, tmp_path_factory.mktemp("adapted"))


def test_adapters_start_as_their_base_and_learn_beside_it(base: Path, adapted: Path) -> None:
    first, *_, last = records(adapted, "train")
    assert last["loss"] < first["loss"] < records(base, "train")[0]["loss"]
    held = json.loads((adapted / "checkpoints" / str(last["step"]) / "meta" / "metadata").read_text())["arrays"]
    assert all("lora" in name for name in held if name.startswith(("params/", "opt_state/")) and "count" not in name)
    assert sum(f.stat().st_size for f in (adapted / "checkpoints").rglob("*") if f.is_file()) < sum(
        f.stat().st_size for f in (base / "checkpoints").rglob("*") if f.is_file()
    )


@pytest.mark.slow
def test_merged_adapters_are_the_same_function(adapted: Path, stage: SFT) -> None:
    """With layers stacked and apart, against the model that has them beside its kernels."""
    _, config = open_run(str(adapted))
    assert isinstance(config, SFTConfig)
    rows = _stacked([stage.training.row([0])])
    for scanned in (True, False):
        model = replace(config.model, scan_layers=scanned)
        beside = Network(replace(config, model=model), "cpu")
        plain = Network(replace(config, model=model, lora=LoRAConfig()), "cpu")
        params = nn.unbox(jax.jit(beside.init)(jax.random.key(0)))
        params = jax.tree.map(lambda p: p + 0.02, params)
        function = jax.jit(lambda p, network=plain: network.before_head(p, rows, None)[0])
        ours = jax.jit(lambda p, network=beside: network.before_head(p, rows, None)[0])(params)
        np.testing.assert_allclose(ours, function(merge(params, config.lora)), rtol=1e-3, atol=1e-3)
        assert not np.allclose(ours, function(_without(params)), atol=1e-2)


def _without(params: Any) -> Any:
    return split(params, is_adapter)[0]


@pytest.mark.slow
def test_a_run_of_adapters_is_sampled_exported_and_goes_on(
    adapted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["sample", str(adapted), "--prompt", "w1 w2", "--tokens", "20", "--temperature", "0"]) in (0, None)
    assert cli.run(["convert", str(adapted), str(tmp_path / "out")]) in (0, None)
    run = tmp_path / "run"
    shutil.copytree(adapted, run)
    config = from_json((run / "config.json").read_bytes())
    (run / "config.json").write_text(to_json(replace(config, run=str(run))))
    assert cli.run(["train", "--resume", str(run), "--train.epochs", "3"]) == 0


@pytest.mark.whole  # two processes pretrain, by the same loop, in every run of the tests; here they pack conversations
def test_two_processes_learn_what_one_does_and_one_goes_on(base: Path, small: SFTConfig, tmp_path: Path) -> None:
    """Adapters beside a base that both load, to the middle of an epoch; then by one process alone."""
    config = replace(
        small,
        init_from=str(base),
        data=replace(small.data, tokenizer=""),
        lora=LoRAConfig(rank=2),
        optimizer=replace(small.optimizer, decay_tokens=10_000),
        train=replace(small.train, eval_batches=0),
    )
    whole = train(config, _folder(tmp_path / "whole"))
    folder = _folder(tmp_path / "cut")
    run = folder / "run"
    words = [file_of(config, folder), "--run", str(run), "--train.total_steps", "2"]
    done = together(words, words)
    assert [status for status, _, _ in done] == [0, 0], done[1][2]
    assert cli.run(["train", "--resume", str(run), "--train.total_steps", "0"]) == 0
    ours, theirs = ([r["loss"] for r in records(each, "train")] for each in (run, whole))
    assert len(ours) == len(theirs) > 3
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert records(run, "train")[-1]["tokens"] == records(whole, "train")[-1]["tokens"]


def test_a_chat_template_for_other_tokens_is_one_line(base: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(base, run)
    template = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    (run / "tokenizer" / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match=r"chat template is written for other tokens: <\|im_start\|>, <\|im_end\|>"):
        cli.run(["sample", str(run), "--tokens", "1"])


def test_another_base_is_refused(base: Path, adapted: Path, small: SFTConfig, tmp_path: Path) -> None:
    other, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(adapted, run)
    config = from_json((run / "config.json").read_bytes())
    folder = _folder(tmp_path / "other")
    train(replace(small, train=replace(small.train, epochs=1, seed=5)), folder)
    shutil.copytree(folder / "run", other)
    (run / "config.json").write_text(to_json(replace(config, run=str(run), init_from=str(other))))
    with pytest.raises(UserError, match=r"not the weights that .* was started from"):
        cli.run(["train", "--resume", str(run), "--train.epochs", "3"])
    with pytest.raises(UserError, match=r"not the weights that .* was started from"):
        cli.run(["sample", str(run), "--tokens", "1"])


# The best checkpoint


@pytest.mark.slow
def test_the_best_checkpoint_is_kept_and_is_what_others_take(small: SFTConfig, tmp_path: Path) -> None:
    """A learning rate that ruins what it has learned: the last is not the best."""
    config = replace(
        small,
        optimizer=replace(small.optimizer, learning_rate=0.2, final_ratio=1.0, clip_norm=100.0),
        train=replace(small.train, total_steps=2, epochs=0, eval_interval=1, keep_best=True, keep_last=1),
    )
    run = train(config, tmp_path)
    losses = {r["step"]: r["loss"] for r in records(run, "eval")}
    best = min(losses, key=losses.__getitem__)
    kept = sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())
    assert kept == [best, 2] == [1, 2]
    stage = made(config)
    state = init_state(config, stage, stage.layout.shardings(abstract_state(config, stage)))  # type: ignore[arg-type]
    abstract = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding), state.params)
    params = restore_params(run, abstract, best=True)
    place: Callable[[Rows], Rows] = partial(jax.tree.map, jnp.asarray)
    assert stage.evaluate(params, place, range(8))["loss"] == pytest.approx(losses[best], rel=1e-6)
    loaded = jax.tree.leaves(params)
    assert all(np.array_equal(a, b) for a, b in zip(loaded, _saved(run, config), strict=True))


# Where it starts


@pytest.mark.slow
def test_chat_tokens_find_room_in_a_vocabulary_that_has_none(small: SFTConfig, tmp_path: Path) -> None:
    """The model of a pretraining run with an id for each byte and the end of text alone."""
    model = replace(small.model, vocab_size=257)
    text = tmp_path / "text.txt"
    text.write_text("some text to learn from, over and over again\n" * 400)
    data = DataConfig(source=str(text), cache_dir=str(tmp_path / "cache"), split_by="position", max_chars=1000)
    tokens = 4 * 8 * T
    train_ = replace(small.train, epochs=0, total_tokens=tokens, eval_batches=0)
    pretraining = Config(name="base", model=model, data=data, optimizer=OptimizerConfig(warmup_tokens=0), train=train_)
    base = train(pretraining, tmp_path)
    grown = chat_model(str(base))
    assert (grown.vocab_size, grown.padded_vocab_size) == (261, model.padded_vocab_size)
    config = replace(small, model=grown, init_from=str(base), data=replace(small.data, tokenizer=""))
    run = train(replace(config, train=replace(small.train, total_steps=1)), _folder(tmp_path / "tuned"))
    learned = flatten_dict(_tree(run, config))[("embedding",)]
    assert learned.shape == (grown.padded_vocab_size, 32)
    old = flatten_dict(_tree(base, pretraining))[("embedding",)]
    weights = open_weights(str(base))
    started = weights.start(grown, on_device(config, jax.local_devices()[0]))
    np.testing.assert_array_equal(started["embedding"][:257], old[:257])
    np.testing.assert_allclose(started["embedding"][257:261], np.tile(old[:257].mean(0), (4, 1)), rtol=1e-5, atol=1e-7)
    assert not started["embedding"][261:].any()
    with pytest.raises(UserError, match=re.escape("model.vocab_size is 257, not 300; set --model.vocab_size 257")):
        weights.require({"model": replace(grown, vocab_size=300)})


def _tree(run: Path, config: Config) -> Any:
    return open_weights(str(run)).load(config.model, on_device(config, jax.local_devices()[0]))


# What a user does wrong


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.lanes", "2"], "--data.lanes: no such field in stage sft; did you mean --data."),
        (["--model.separate_documents", "true"], "--model.separate_documents: no such field in stage sft"),
        (["--lora.rank", "-1"], "lora.rank = -1: must not be negative; nearest 0"),
        (["--lora.matrices", "qvk"], "choose from qkv, projection, mlp_up, mlp_down, embedding; nearest qkv"),
        (["--data.too_long", "keep"], "--data.too_long keep: choose from cut, drop; nearest"),
        (["--train.epochs", "-1"], "train.epochs = -1.0: must not be negative; nearest 0"),
        (["--data.tokenizer", ""], "data.tokenizer: empty, and no init_from whose tokenizer it could be"),
        (
            ["--model.vocab_size", "258"],
            "no room for the chat tokens <|user|> <|assistant|> <|end|>; make",
        ),
        (["--model.seq_len", "2", "--model.window", "2"], "no conversation to learn from in a split"),
        (["--optimizer.warmup_tokens", "1000000"], "longer than the training of"),
        (["--lora.rank", "2"], "lora.rank = 2: adapters stand beside trained weights; name them with init_from"),
        (["--train.sample_interval", "5"], "train.sample_prompt"),
        (["--data.tokenizer", "sentencepiece:261"], "sentencepiece:261: is made of a text, not of conversations"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    words: list[str], message: str, small: SFTConfig, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        cli.run(["train", file_of(small, tmp_path), "--run", str(tmp_path / "run"), *words])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_field_that_the_stage_does_not_use_is_refused_in_a_file_too(small: SFTConfig) -> None:
    with pytest.raises(UserError, match=r"separate_documents = True: stage sft has no use for it; leave it out"):
        validate(replace(small, model=replace(small.model, separate_documents=True)))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}'], "roles out of order"),
        (['{"messages": [{"role": "tool", "content": "a"}]}'], "unknown role tool"),
        (['{"messages": []}'], "no message"),
        (['{"messages": [{"role": "user", "content": "a"}]}'], "no assistant turn"),
        (['{"prompt": "a", "completion": " "}'], "empty message"),
        (['{"prompt": "a", "completion": "b"}'], "split train[:80%]: empty"),
    ],
)
def test_bad_conversations_are_one_line_and_counted(
    lines: list[str], message: str, small: SFTConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last is a data set of one example."""
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(lines) + "\n")
    data = replace(small.data, source=str(path), cache_dir=str(tmp_path / "cache"))
    config = file_of(replace(small, data=data), tmp_path)
    with pytest.raises(UserError) as error:
        cli.run(["train", config, "--run", str(tmp_path / "run")])
    assert message in str(error.value) and "\n" not in str(error.value)
    if "split" in message:
        return
    assert f"{path}:1" in str(error.value)
    good = [json.dumps({"prompt": f"say {i}", "completion": str(i)}) for i in range(30)]
    path.write_text("\n".join([*lines, *good]) + "\n")
    cli.run(["data", config, "--data.invalid", "drop", "--examples", "2"])
    out = capsys.readouterr().out
    assert f"1 left out: {message}" in out and "[[" in out


def test_the_help_of_a_stage_has_its_fields_alone(
    small: SFTConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fields(*words: str) -> set[str]:
        cli.run(["train", *words, "--help"])
        return set(re.findall(r"^  --([a-z_]+\.[a-z_0-9]+) ", capsys.readouterr().out, re.M))

    ours, theirs = fields(file_of(small, tmp_path)), fields()
    assert {"lora.rank", "data.too_long", "data.packing", "data.fields"} <= ours - theirs
    assert {"data.lanes", "data.text_field", "data.max_chars", "model.separate_documents"} <= theirs - ours
    assert {"model.num_layers", "train.epochs", "optimizer.learning_rate", "layout.fsdp"} <= ours & theirs


@pytest.mark.slow
def test_overwrite_starts_anew_in_the_place_of_a_run_and_of_nothing_else(
    small: SFTConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(small, train=replace(small.train, total_steps=2, eval_batches=0))
    run = train(config, tmp_path)
    command = ["train", file_of(config, tmp_path), "--run", str(run)]
    with pytest.raises(UserError, match=r"exists and is not empty; .*--overwrite, or name another"):
        cli.run(command)
    (run / "note.txt").write_text("of the first")
    assert cli.run([*command, "--overwrite", "--dry-run"]) == 0
    assert "in the place of the run that is there" in capsys.readouterr().out and (run / "note.txt").exists()
    assert cli.run([*command, "--overwrite", "--train.total_steps", "1"]) == 0
    assert [r["step"] for r in records(run, "train")] == [1] and not (run / "note.txt").exists()
    other = _folder(tmp_path / "letters")
    (other / "letter.txt").write_text("Dear")
    with pytest.raises(UserError, match="exists and is not empty"):
        cli.run(["train", file_of(config, tmp_path), "--run", str(other), "--overwrite"])
    assert (other / "letter.txt").read_text() == "Dear"
    with pytest.raises(UserError, match="is also init_from"):
        cli.run([*command, "--overwrite", "--init_from", str(run)])
    assert (run / "config.json").is_file()
