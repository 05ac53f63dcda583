"""Mixtures: which record of which source comes next, and the rows of it. Run: pytest tests/test_mixture.py"""

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import grain
import numpy as np
import pytest
from encoded import refusal, train
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax import cli
from gptjax.config import DataConfig
from gptjax.config.mixture import GPT3, Weighted, later_weights, weighted
from gptjax.data.order import BLOCK, Interleaved, Period, counts, derived, units
from gptjax.data.stream import merge_positions
from gptjax.data.texts import Mixture, build, drawing, epochs, mean_tokens, reopen, stream
from gptjax.data.tokenizers import load_tokenizer
from gptjax.errors import UserError
from gptjax.train.metrics import read_log

BYTES = load_tokenizer("bytes")
T = 64


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=6).filter(any), st.integers(0, 10**15))
def test_counts_follow_the_weights_and_never_fall(weights, number):
    here, following = counts(number, weights), counts(number + 1, weights)
    assert sum(here) == number and sum(following) == number + 1
    assert all(b - a in (0, 1) for a, b in zip(here, following, strict=True))
    for count, weight in zip(here, weights, strict=True):
        exact = Fraction(number * weight, sum(weights))
        assert abs(count - exact) < len(weights) and (weight or not count)


@settings(deadline=None, max_examples=20)
@given(
    st.lists(st.tuples(st.integers(1, 300), st.floats(0.01, 1)), min_size=1, max_size=5),
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(1, 900), max_size=2, unique=True),
)
def test_each_source_comes_in_its_own_order_and_none_twice_before_its_epoch_ends(sources, seed, changes):
    sizes, weights = [size for size, _ in sources], [weight for _, weight in sources]
    starts = [0, *sorted(changes)]
    periods = [Period(start, units(np.roll(weights, i).tolist())) for i, start in enumerate(starts)]
    seeds = [derived(seed, str(i)) for i in range(len(sizes))]
    order, found = Interleaved(sizes, seeds, periods, seed), {i: [] for i in range(len(sizes))}
    borders = np.cumsum([0, *sizes])
    for number in range(5 * BLOCK):
        record = order(number)
        source = int(np.searchsorted(borders, record, side="right")) - 1
        found[source].append(record - int(borders[source]))
        if (number + 1) % BLOCK == 0:
            assert [len(each) for each in found.values()] == order.drawn(number + 1)
    for source, records in found.items():
        alone = grain.MapDataset.range(sizes[source]).seed(seeds[source]).shuffle().repeat()
        assert records == [alone[i] for i in range(len(records))]


def test_a_place_far_ahead_is_as_near_as_the_first():
    """10^12 tokens in records of 1,000: any scan, or table of them, would not end."""
    sizes, weights = [410 * 10**6, 19 * 10**6, 12 * 10**6, 55 * 10**6, 3 * 10**6], [60.0, 22.0, 8.0, 8.0, 3.0]
    periods = [Period(0, units(weights)), Period(7 * 10**8 + 3, units(weights[::-1]))]
    order = Interleaved(sizes, [derived(0, str(i)) for i in range(5)], periods, 0)
    for number in (10**9, 10**12, 10**15):
        assert 0 <= order(number) < sum(sizes) and order(number) == order(number)
        assert sum(order.drawn(number)) == number
    share = np.array(order.drawn(7 * 10**8 + 3)) / (7 * 10**8 + 3)
    np.testing.assert_allclose(share, np.array(weights) / sum(weights), atol=1e-8)


def test_a_lane_of_several_has_all_sources():
    """Were sources in a fixed turn, one of two lanes would be of one source."""
    order = Interleaved([1000, 1000], [1, 2], [Period(0, units([1.0, 1.0]))], 3)
    for lanes in (2, 4, 8):
        firsts = [np.mean([order(place * lanes + lane) < 1000 for place in range(500)]) for lane in range(lanes)]
        assert min(firsts) > 0.4 and max(firsts) < 0.6


def test_the_mixing_within_a_block_is_what_it_was():
    """A run that goes on after an update must draw what it would have drawn."""
    order = Interleaved([10, 10], [1, 2], [Period(0, units([3.0, 1.0]))], 5)
    for block in range(3):
        keys = [splitmix64((5 << 32) + block * BLOCK + i) for i in range(BLOCK)]
        fixed = [False] * (BLOCK * 3 // 4) + [True] * (BLOCK // 4)
        mixed = [fixed[i] for i in sorted(range(BLOCK), key=keys.__getitem__)]
        assert [order(block * BLOCK + i) >= 10 for i in range(BLOCK)] == mixed


def splitmix64(state: int) -> int:
    x, mask = (state + 1) * 0x9E3779B97F4A7C15, 2**64 - 1
    x &= mask
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
    return x ^ x >> 31


@pytest.fixture
def three(tmp_path) -> DataConfig:
    """Documents that say which source they are of: of some 60, 600 and 6,000 bytes."""
    random = np.random.default_rng(0)
    for name, count, least in (("a", 40, 30), ("b", 30, 300), ("c", 10, 3000)):
        with (tmp_path / f"{name}.jsonl").open("w") as file:
            for _ in range(count):
                file.write(json.dumps({"text": name * int(random.integers(least, 3 * least))}) + "\n")
    source = ",".join(f"{tmp_path / name}.jsonl:{weight}" for name, weight in (("a", 0.5), ("b", 0.3), ("c", 0.2)))
    split = {"train_split": "train", "eval_split": "train"}
    return DataConfig(source=source, cache_dir=str(tmp_path / "cache"), max_chars=2000, **split)


def rows_of(config, rows, positions=None, micro=24):
    return stream(config, build(config), BYTES, T, micro_batch=micro, rows=rows, positions=positions)


def test_tokens_follow_the_weights_in_every_window_of_rows(three):
    made = rows_of(three, None, micro=1000)
    drawn = drawing(three, build(three), BYTES)
    for _ in range(6):
        tokens = made.batch(1).tokens.ravel()
        shares = np.array([np.mean(tokens == ord(name)) for name in "abc"])
        # 64,000 tokens are some 100 records of the longest source's mix: what is drawn of it is off by one or two.
        np.testing.assert_allclose(shares, [0.5, 0.3, 0.2], atol=0.05)
    told = made.figures
    assert set(told) == {"epochs_a", "epochs_b", "epochs_c"} and told["epochs_a"] > 20
    for label, count in drawn.epochs(6 * 64_000).items():
        assert told[f"epochs_{label}"] == pytest.approx(count, rel=0.05)


@pytest.mark.parametrize("lanes", [1, 24])
def test_one_then_eight_then_three_hosts_read_what_one_does(three, lanes):
    config = DataConfig(**{**vars(three), "lanes": lanes, "later_weights": "60_000:0.1,0.1,0.8"})
    alone = rows_of(config, None)
    whole = np.concatenate([alone.batch(2).tokens for _ in range(60)])  # 184,320 tokens
    assert min(alone.figures.values()) > 1.5  # all sources have begun a second epoch
    positions, done = None, []
    for hosts in (1, 8, 3):
        each = 24 // hosts
        running = [rows_of(config, range(i * each, (i + 1) * each), positions) for i in range(hosts)]
        done += [np.concatenate([host.batch(2).tokens for host in running], axis=1) for _ in range(20)]
        positions = merge_positions([host.positions for host in running])
    assert (np.concatenate(done) == whole).all() and positions == alone.positions
    assert all(isinstance(position, int) for position in positions)


def test_weights_change_at_about_the_token_that_is_given(three):
    config = DataConfig(**{**vars(three), "later_weights": "100_000:0,0,1"})
    made = rows_of(config, None)
    tokens = np.concatenate([made.batch(1).tokens.ravel() for _ in range(100)])
    last = int(np.flatnonzero((tokens == ord("a")) | (tokens == ord("b")))[-1])
    assert last == pytest.approx(100_000, rel=0.1)


def test_a_record_has_as_many_tokens_as_is_said(three):
    for text in build(three).splits("train", "document"):
        exact = np.mean([len(BYTES.encode(text[i].text)) + 1 for i in range(len(text))])
        assert mean_tokens(text, BYTES) == pytest.approx(exact)


def test_how_sources_are_called_changes_nothing(three, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = DataConfig(**{**vars(three), "source": "c.jsonl:4, a.jsonl:10,b.jsonl:6"})
    first, second = build(three), build(other)
    assert first.digest == second.digest and first.place != second.place
    assert (rows_of(three, None).batch(4).tokens == rows_of(other, None).batch(4).tokens).all()
    again = reopen(other, second.place)
    assert isinstance(again, Mixture) and again.digest == first.digest and again.labels == ("a", "b", "c")[:3]
    changed = DataConfig(**{**vars(three), "source": "c.jsonl:4.1,a.jsonl:10,b.jsonl:6"})
    assert build(changed).digest != first.digest


def test_gpt3_is_a_preset(tmp_path):
    for name in GPT3:
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text(f"{name} " * 500)
    config = DataConfig(source=f"gpt3:{tmp_path}", cache_dir=str(tmp_path / "c"), split_by="position", max_chars=100)
    made = build(config)
    assert dict(zip(made.labels, made.weights, strict=True)) == {
        name: pytest.approx(share / 101)
        for name, share in (("common_crawl", 60), ("webtext2", 22), ("books1", 8), ("books2", 8), ("wikipedia", 3))
    }
    assert sum(epochs(config, made, BYTES, 10**6).values()) > 100


def test_names_with_colons_and_commas_are_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a:0.5", "b,c:1", "d"):
        Path(name).write_text("text")
    assert weighted("a:0.5") == weighted("b,c:1") == weighted("d") == weighted("tfds:x") == weighted("stdlib") == ()
    assert weighted("tfds:x:0.5, d:1e-1,*.txt:2") == (Weighted("tfds:x", 0.5), Weighted("d", 0.1), Weighted("*.txt", 2))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("a:1,b", "b has no weight, others have; write b:1, or none at all"),
        ("a:0,b:0", "weights must be 0 or more, and one of them more"),
        ("a:1e999,b:1", "weights must be 0 or more, and one of them more"),
        ("a:1,a:2", "a is named twice; add up its weights"),
    ],
)
def test_weights_that_make_no_mixture_are_refused(source, said):
    with pytest.raises(UserError) as error:
        weighted(source)
    assert said in str(error.value) and str(error.value).startswith(f"data.source = {source}: ")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1e9", "write TOKENS:WEIGHT,WEIGHT"),
        ("x:1,2", "write TOKENS:WEIGHT,WEIGHT"),
        ("1e9:1,2,3", "3 weight(s) from token 1e9 on; 2 sources need as many"),
        ("0:1,2", "0 must be a number of tokens, above 0"),
        ("2e9:1,2;1e9:1,2", "1e9 must be a number of tokens, above 0 and those before it"),
        ("inf:1,2", "inf must be a number of tokens"),
        ("1e9:0,-1", "weights must be 0 or more"),
    ],
)
def test_later_weights_that_say_nothing_are_refused(text, said):
    with pytest.raises(UserError, match=r"^data\.later_weights = ") as error:
        later_weights(text, 2)
    assert said in str(error.value)


def test_later_weights_are_read():
    assert later_weights("1e9:0.2,0.8; 2_000_000_000:0,1", 2) == ((10**9, (0.2, 0.8)), (2 * 10**9, (0.0, 1.0)))
    assert later_weights("", 0) == ()


def test_a_run_reads_a_mixture_stops_and_goes_on(plain, corpus, tmp_path, capsys):
    """The log knows the epochs of each source, and what was trained in one go and in two is the same."""
    (tmp_path / "other.txt").write_text("other words of another text " * 300)
    source = f"{corpus}:0.75,{tmp_path / 'other.txt'}:0.25"
    data = replace(plain.data, source=source, split_by="position", max_chars=200)
    config = replace(plain, data=data, train=replace(plain.train, eval_interval=60, total_tokens=20 * 128))
    whole = train(config, tmp_path / "whole")
    halves = train(config, tmp_path / "halves", "--train.total_tokens", str(10 * 128))
    assert cli.run(["train", "--resume", str(halves), "--train.total_tokens", str(20 * 128)]) == 0
    first, second = ([r for r in read_log(run / "log.jsonl") if r["kind"] == "train"] for run in (whole, halves))
    assert first[-1]["loss"] == second[-1]["loss"] and first[-1]["step"] == second[-1]["step"]
    assert 0 < first[-1]["epochs_other"] < 1 and 0 < first[-1]["epochs_corpus0"] < 1
    last = [r for r in read_log(whole / "log.jsonl") if r["kind"] == "eval"][-1]
    assert last["loss"] == pytest.approx(0.75 * last["loss_corpus0"] + 0.25 * last["loss_other"])
    assert "corpus0 75.0% of the tokens, read 0." in capsys.readouterr().out

    changed = source.replace("0.75", "0.7")
    with pytest.raises(UserError, match=r"is not the mixture that the run was trained on \(.*75.0000%.* then"):
        cli.run(["train", "--resume", str(halves), "--data.source", changed, "--train.total_tokens", "9999"])
    with pytest.raises(UserError, match=r"data\.later_weights: the run has '', given '5000:0,1'"):
        cli.run(["train", "--resume", str(halves), "--data.later_weights", "5000:0,1"])
    assert "data.max_epochs = 0.01: other would be read 0.0" in refusal(
        config, tmp_path / "a", "--data.max_epochs", "0.01"
    )
    assert "train.total_tokens" in refusal(config, tmp_path / "b", "--train.epochs", "1", "--train.total_tokens", "0")
    bert = str(Path(__file__).parents[1] / "configs" / "bert_cpu.py")
    with pytest.raises(UserError, match="stage masked reads one source"):
        cli.run(["train", bert, "--run", str(tmp_path / "c"), "--data.source", source])
