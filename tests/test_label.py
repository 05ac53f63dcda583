"""What labellers say: its file, which training reads, its order, and how far two of them agree. Run: pytest
tests/test_label.py"""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import jax
import pytest
from fastapi.testclient import TestClient
from flax import linen as nn
from paged import Written, asked
from scipy.stats import kendalltau

from gptjax import api, cli
from gptjax.commands.label import Command
from gptjax.config import RankingConfig, SFTConfig
from gptjax.data.chat import Message, with_chat
from gptjax.data.rankings import parse
from gptjax.data.sources import build, dropped
from gptjax.data.tokenizers import load_tokenizer
from gptjax.errors import UserError
from gptjax.label.agreement import agreements
from gptjax.label.answers import Answer, Lines, Record, key_of
from gptjax.label.app import create_app
from gptjax.label.drawn import How, draw
from gptjax.label.session import Session, order
from gptjax.stages import SFT


def session(out: Path, texts: list[str], labeller: str = "ann", **how: Any) -> Session:
    return Session([asked(text) for text in texts], Written(), Record(out), labeller, **how)


def shown(of: Session) -> Any:
    future = of.ask()
    assert future
    return of.show(future.result())


def rank(of: Session, *ranks: int) -> None:
    """Ranks of the replies in the order in which they were drawn."""
    found = shown(of)
    of.answer(found, [ranks[place] for place in found.places] if ranks else [])


def test_an_order_depends_on_seed_prompt_and_labeller_alone() -> None:
    assert order(0, "p", "ann", 4) == order(0, "p", "ann", 4) == [0, 3, 1, 2]
    several = [order(seed, prompt, name, 9) for seed in (0, 1) for prompt in "pq" for name in ("ann", "bob")]
    assert len({tuple(each) for each in several}) == 8 and all(sorted(each) == list(range(9)) for each in several)
    firsts = [order(0, str(i), "ann", 4)[0] for i in range(400)]
    assert all(70 < firsts.count(place) < 130 for place in range(4))


def test_training_reads_what_is_written(tmp_path: Path) -> None:
    """By the reader of `gptjax train configs/reward.py`, which refuses what is no ranking."""
    out = tmp_path / "rankings.jsonl"
    with session(out, ["one", "tie ü\n<|end|>", "skip", "all", "gap"]) as of:
        rank(of, 1, 2, 3, 4)
        rank(of, 2, 1, 1, 3)
        rank(of)
        rank(of, 2, 2, 2, 2)
        rank(of, 9, 1, 4, 4)
    corpus = build(RankingConfig(source=str(out), cache_dir=str(tmp_path / "cache"), invalid="refuse", max_replies=4))
    source = corpus.split("train", "document")
    found = [parse(source[number].text) for number in range(len(source))]
    assert not dropped(source)
    assert [(each.prompt, each.replies, each.ranks) for each in found] == [
        ([Message("user", text)], [f"{text}: reply {i}" for i in range(4)], ranks)
        for text, ranks in [("one", [1, 2, 3, 4]), ("tie ü\n<|end|>", [2, 1, 1, 3]), ("gap", [3, 1, 2, 2])]
    ]
    assert [json.loads(line)["ranks"] for line in (tmp_path / "rankings.jsonl.aside").open()] == [[], [1, 1, 1, 1]]


def test_it_goes_on_where_it_stopped(tmp_path: Path) -> None:
    out, texts = tmp_path / "rankings.jsonl", ["one", "two", "same", "three"]
    with session(out, texts) as of:
        rank(of, 1, 2, 3, 4)
        rank(of)
        assert of.state()["done"] == 2 and not shown(of), "one reply is nothing to rank"
        assert of.state()["total"] == 3 and shown(of).prompt.messages[0].content == "three"
    with session(out, texts) as of:
        assert [prompt.messages[0].content for prompt in of.left] == ["same", "three"]
    with session(out, texts, "bob") as of:
        assert len(of.left) == 4 and shown(of).replies == [
            "one: reply 0",
            "one: reply 1",
            "one: reply 2",
            "one: reply 3",
        ]


def test_one_step_back(tmp_path: Path) -> None:
    out = tmp_path / "rankings.jsonl"
    with session(out, ["one", "two"]) as of:
        with pytest.raises(UserError, match="undo: nothing was answered"):
            of.undo()
        rank(of, 1, 2, 3, 4)
        before = out.read_bytes()
        rank(of, 4, 3, 2, 1)
        assert of.ask() is None
        of.undo()
        assert out.read_bytes() == before and shown(of).prompt.messages[0].content == "two"
        rank(of)
        of.undo()
        of.undo()
        assert out.read_bytes() == b"" and not of.can_undo and of.state()["done"] == 0
        assert (tmp_path / "rankings.jsonl.aside").read_bytes() == b""


def test_what_is_no_answer(tmp_path: Path) -> None:
    with session(tmp_path / "rankings.jsonl", ["one", "two"]) as of:
        first = shown(of)
        for ranks in ([1, 2], [1, 2, 3, 0]):
            with pytest.raises(UserError, match="ranks: "):
                of.answer(first, ranks)
        rank(of, 1, 1, 1, 2)
        with pytest.raises(UserError, match="not the one that is asked for"):
            of.answer(first, [1, 2, 3, 4])


@pytest.mark.parametrize("half", ['{"prompt": "a', '{"prompt": "a", "replies": ["x"], "ranks": [', "\x00\x00"])
def test_half_a_line_is_cut_off(half: str, tmp_path: Path) -> None:
    out, whole = tmp_path / "r.jsonl", '{"prompt": "a", "replies": ["x", "y"], "ranks": [1, 2]}'
    out.write_text(f"{whole}\n{half}")
    lines = Lines(out)
    lines.append({"b": 1})
    assert out.read_text() == f'{whole}\n{{"b": 1}}\n' and len(lines.rows) == 2
    lines.close()
    out.write_text(whole)  # by an editor that ends no line
    lines = Lines(out)
    lines.append({"b": 1})
    assert out.read_text() == f'{whole}\n{{"b": 1}}\n'
    lines.close()


def test_a_file_of_other_things_or_of_another_process(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    out.write_text("1\n{}\n")
    with pytest.raises(UserError, match=r"r.jsonl: line 1 is no JSON object; mend or remove it"):
        Lines(out)
    out.write_text("")
    lines = Lines(out)
    with pytest.raises(UserError, match="another gptjax label adds to it"):
        Lines(out)
    lines.close()
    with pytest.raises(UserError, match=r"--out .*: Is a directory"):
        Lines(tmp_path)


KILLED = """
import itertools, sys
from pathlib import Path
from gptjax.label.answers import Lines
lines = Lines(Path(sys.argv[1]))
for i in itertools.count():
    lines.append({"number": i, "text": "é" * 2000})
    print(i, flush=True)
"""


def test_a_kill_leaves_whole_lines(tmp_path: Path) -> None:
    """What was told to be kept is there, and no half of the next."""
    out = tmp_path / "r.jsonl"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(out)], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    told = [int(process.stdout.readline()) for _ in range(30)]
    os.kill(process.pid, signal.SIGKILL)
    told += [int(line) for line in process.stdout.read().split()]
    process.wait()
    data = out.read_bytes()
    numbers = [json.loads(line)["number"] for line in data.splitlines()]
    assert data.endswith(b"\n") and numbers == list(range(len(numbers))) and len(numbers) > told[-1]


def said(name: str, prompt: str, ranks: list[int]) -> Answer:
    return Answer(name, [Message("user", prompt)], [f"reply {i}" for i in range(len(ranks))], ranks)


def test_agreement_of_two() -> None:
    """Against SciPy's tau-b, prompt by prompt, and by hand."""
    rng = random.Random(0)
    for _ in range(40):
        a, b = ([rng.randint(1, 3) for _ in range(6)] for _ in range(2))
        (found,) = agreements([said("ann", "p", a), said("bob", "p", b)])
        assert found.tau == pytest.approx(kendalltau(a, b).statistic)
    (found,) = agreements(
        [said("bob", "p", [1, 2, 3]), said("ann", "p", [1, 3, 2]), said("ann", "q", [1, 1]), said("bob", "q", [1, 2])]
    )
    assert (found.names, found.prompts, found.same, found.opposite, found.pairs) == (("ann", "bob"), 2, 2, 1, 4)
    assert found.share == pytest.approx(2 / 3) and found.tau == pytest.approx(1 / math.sqrt(3 * 4))
    assert str(found) == "ann and bob: 2 prompts, the same order in 2 of 3 pairs (67%), Kendall's tau-b 0.29"
    (tied,) = agreements([said("ann", "p", [1, 1, 2]), said("bob", "p", [2, 1, 1])])
    assert math.isclose(tied.tau, -0.5) and str(tied).endswith("0 of 1 pairs (0%), Kendall's tau-b -0.50")


def test_agreement_is_of_the_same_replies_only() -> None:
    assert agreements([said("ann", "p", [1, 2]), said("bob", "q", [1, 2])]) == []
    assert agreements([said("ann", "p", [1, 2]), said("bob", "p", [1, 2, 3])]) == []
    shuffled = Answer("bob", [Message("user", "p")], ["reply 1", "reply 0"], [2, 1])
    (found,) = agreements([said("ann", "p", [2, 1]), said("ann", "p", [1, 2]), shuffled])
    assert (found.same, found.opposite) == (1, 0), "the last counts, whatever the order of replies"
    names = [found.names for found in agreements([said(name, "p", [1, 2]) for name in ("c", "a", "b")])]
    assert names == [("a", "b"), ("a", "c"), ("b", "c")]


def test_two_labellers_of_one_file(tmp_path: Path) -> None:
    out = tmp_path / "rankings.jsonl"
    with session(out, ["one", "two"]) as of:
        rank(of, 1, 2, 3, 4)
        rank(of, 1, 2, 3, 4)
        assert of.state()["agreement"] == []
    with session(out, ["one", "two"], "bob", others=[said("cid", "x", [1, 2])]) as of:
        rank(of, 1, 2, 4, 3)
        words = "ann and bob: 1 prompts, the same order in 5 of 6 pairs (83%), Kendall's tau-b 0.67"
        assert of.state()["agreement"] == [words]
        assert of.summary() == [
            f"3 rankings in {out}, 0 skipped or all tied in {out}.aside",
            "1 prompts are left for bob; the same command goes on",
            words,
        ]


@pytest.fixture
def client(tmp_path: Path) -> Any:
    with session(tmp_path / "rankings.jsonl", ["one", "same", "two"]) as of:
        yield TestClient(create_app(of, "127.0.0.1"), base_url="http://127.0.0.1:8001")


def test_the_routes(client: Any, tmp_path: Path) -> None:
    page = client.get("/")
    assert "script-src 'sha256-" in page.headers["Content-Security-Policy"] and "<!doctype html>" in page.text
    first = client.get("/next").json()
    assert first["turns"] == [{"role": "user", "content": "one"}] and len(first["replies"]) == 4
    assert (first["done"], first["total"], first["undo"], first["labeller"]) == (0, 3, False, "ann")
    second = client.post("/answer", json={"prompt": first["prompt"], "ranks": [1, 2, 2, 4]}).json()
    assert second["turns"][0]["content"] == "two" and (second["done"], second["total"]) == (1, 2)
    (line,) = (tmp_path / "rankings.jsonl").read_text().splitlines()
    row = json.loads(line)
    by_rank = [
        sorted(reply for reply, rank in zip(row["replies"], row["ranks"], strict=True) if rank == r) for r in (1, 2, 3)
    ]
    assert by_rank == [[first["replies"][0]], sorted(first["replies"][1:3]), [first["replies"][3]]]
    assert row["replies"] == [f"one: reply {i}" for i in range(4)] != first["replies"]
    again = client.post("/answer", json={"prompt": first["prompt"], "ranks": [1, 2, 3, 4]})
    assert again.status_code == 409
    over = client.post("/answer", json={"prompt": second["prompt"], "ranks": []}).json()
    assert "prompt" not in over and over["done"] == over["total"] == 2
    assert client.post("/undo", json={}).json()["turns"][0]["content"] == "two"


@pytest.mark.parametrize(
    ("headers", "body", "status", "words"),
    [
        ({"Host": "evil.example"}, {}, 403, "Host 'evil.example'"),
        ({"Origin": "http://evil.example"}, {}, 403, "Origin 'http://evil.example'"),
        ({"Origin": "null"}, {}, 403, "Origin 'null'"),
        ({}, {"prompt": "x", "ranks": "1"}, 400, "ranks"),
        ({}, {"prompt": "x", "ranks": [0, 1]}, 400, "ranks"),
        ({}, {"ranks": []}, 400, "prompt: missing"),
        ({}, {"prompt": "x", "ranks": [], "more": 1}, 400, "more: no such parameter"),
        ({"Content-Type": "text/plain"}, {}, 400, "must be a JSON object"),
    ],
)
def test_what_is_refused(
    headers: dict[str, str], body: Any, status: int, words: str, client: Any, tmp_path: Path
) -> None:
    answer = client.post("/answer", content=json.dumps(body), headers={"Content-Type": "application/json"} | headers)
    assert answer.status_code == status and words in answer.json()["error"]["message"]
    assert (tmp_path / "rankings.jsonl").read_bytes() == b""


def test_a_disk_that_is_full_loses_nothing(client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = client.get("/next").json()
    write = os.write
    monkeypatch.setattr(
        os, "write", lambda file, data: write(file, data[:20]) if b"reply 0" in data else write(file, data)
    )
    answer = {"prompt": first["prompt"], "ranks": [1, 2, 3, 4]}
    refused = client.post("/answer", json=answer)
    assert refused.status_code == 507 and "the answer is not kept" in refused.json()["error"]["message"]
    assert (tmp_path / "rankings.jsonl").read_bytes() == b"" and client.get("/next").json() == first
    monkeypatch.undo()
    assert client.post("/answer", json=answer).json()["done"] == 1


@pytest.fixture(scope="module")
def talker(tuned: SFTConfig) -> api.Model:
    """Random weights."""
    config = replace(tuned, model=replace(tuned.model, seq_len=64))
    stage = SFT(config, "cpu", tokenizer=SFT.fit_tokenizer(config, with_chat(load_tokenizer("bytes"))))
    return api.Model("talker", stage, nn.unbox(stage.init(jax.random.key(0))), 4)


def test_replies_differ_and_are_a_function_of_the_seed(talker: api.Model) -> None:
    ids = talker.prompt("Hi")
    how = How(replies=4, seed=3, tokens=6, temperature=1.0, top_k=0, top_p=1.0)
    found = draw(talker, ids, how)
    assert len(found) == 4 == len(set(found)) and all(text.strip() for text in found)
    assert draw(talker, ids, how) == found != draw(talker, ids, replace(how, seed=4))
    assert len(draw(talker, ids, replace(how, temperature=0.0))) <= 1
    assert len(draw(talker, ids, replace(how, tokens=1, top_k=2))) <= 2


def test_the_verb_finds_its_prompts(talker: api.Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the forms that PPO reads; what is twice there, too long or none is not asked."""
    prompts = tmp_path / "prompts.jsonl"
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    rows = [{"prompt": "Hi"}, {"prompt": talk}, {"prompt": "Hi"}, {"prompt": "x" * 90}, {"prompt": " "}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    beside = tmp_path / "others.jsonl"
    beside.write_text('{"prompt": "Hi", "replies": ["x", "y"], "ranks": [1, 2], "labeller": "eve"}\n')
    verb = Command(
        "talker", str(prompts), out=str(tmp_path / "r.jsonl"), tokens=8, replies=2, labeller="ann",
        beside=(str(beside),), cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    with verb.session(talker) as of:
        assert [[m.content for m in prompt.messages] for prompt in of.prompts] == [["Hi"], ["a", "b", "c"]]
        first = shown(of)
        assert len(first.replies) == 2 and [answer.labeller for answer in of.others] == ["eve"]
        of.answer(first, [1, 2])
    said = capsys.readouterr().out
    assert "1 prompts left out: longer than 56 tokens" in said and "1 prompts left out: empty message" in said
    with verb.session(talker) as of:
        assert [key_of(prompt.messages) for prompt in of.left] == [key_of([Message(**turn) for turn in talk])]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--prompts is missing"),
        (["--prompts", "p", "--host", "0.0.0.0"], "--host 0.0.0.0: others could reach it"),
        (["--prompts", "p", "--host", "example.org"], "--host example.org: others could reach it"),
        (["--prompts", "p", "--replies", "10"], "--replies"),
    ],
)
def test_what_cannot_be_is_one_line(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        cli.run(["label", "x", *words])


def test_a_model_that_has_not_learned_conversations(monkeypatch: pytest.MonkeyPatch, talker: api.Model) -> None:
    monkeypatch.setattr(api, "load", lambda *_, **__: talker)
    monkeypatch.setattr(api.Model, "chats", False)
    with pytest.raises(UserError, match="x: has not learned conversations; rank the replies of a run of the stage sft"):
        cli.run(["label", "x", "--prompts", "p"])


def _start(folder: Path, prompts: Path, tmp_path: Path) -> tuple[subprocess.Popen[str], str]:
    words = ["label", str(folder), "--prompts", str(prompts), "--out", str(tmp_path / "r.jsonl"), "--port", "0"]
    words += ["--replies", "2", "--tokens", "8", "--labeller", "ann", "--cache-dir", str(tmp_path / "cache")]
    process = subprocess.Popen([sys.executable, "-m", "gptjax", *words], stdout=-1, stderr=-1, text=True)
    assert process.stdout
    line = process.stdout.readline()
    assert line.startswith("rank replies at http://127.0.0.1:"), line
    return process, line.split()[3]


@pytest.mark.slow
def test_the_verb_goes_on_and_ends(tuned: SFTConfig, tmp_path: Path) -> None:
    """On a run of a few steps, from a file that has one answer, to Ctrl-C."""
    from gptjax.stages.launch import train

    steps = replace(tuned.train, epochs=0.1, eval_interval=0, save_interval=0)
    train(replace(tuned, train=steps, run=str(tmp_path / "run")), None, named=True)
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "r.jsonl"
    prompts.write_text('{"prompt": "Hi"}\n{"prompt": "Yo"}\n{"prompt": "Oh"}\n{"prompt": "Ah"}\n')
    with session(out, ["Hi"]) as of:
        rank(of, 1, 2, 3, 4)
    process, url = _start(tmp_path / "run", prompts, tmp_path)
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(httpx.get, f"{url}/next", timeout=120)
        time.sleep(0.5)
        assert not waits.done(), "a first draw compiles; this one was done before it could be interrupted"
        process.send_signal(signal.SIGTERM)
        assert waits.result().status_code == 503
        assert process.communicate(timeout=120)[1] == ""
    process, url = _start(tmp_path / "run", prompts, tmp_path)
    try:
        first = httpx.get(f"{url}/next", timeout=120).json()
        assert (first["done"], first["total"], first["turns"][0]["content"]) == (1, 4, "Yo")
        ranked = {"prompt": first["prompt"], "ranks": [2, 1]}
        second = httpx.post(f"{url}/answer", json=ranked, timeout=120).json()
        httpx.post(f"{url}/answer", json={"prompt": second["prompt"], "ranks": []}, timeout=120)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert said.splitlines() == [
        f"2 rankings in {out}, 1 skipped or all tied in {out}.aside",
        "1 prompts are left for ann; the same command goes on",
    ]
    row = json.loads(out.read_text().splitlines()[1])
    assert process.returncode == 0
    assert [row["replies"][row["ranks"].index(rank)] for rank in (2, 1)] == first["replies"]
