"""The server over real sockets: what it answers is what the model says, and nobody's request is another's trouble."""

import hashlib
import json
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from jax import nn as jnn
from serving import CONTEXT, Running, events, filling_model, raw, serving, tuned_model, until

from gptjax import api, cli
from gptjax.config import Config, LayoutConfig
from gptjax.data.chat import Message
from gptjax.errors import UserError
from gptjax.serve.guard import HEADERS
from gptjax.serve.keys import Keys, new_key
from gptjax.serve.options import Options

GREEDY = {"temperature": 0}


@pytest.fixture(scope="module")
def model() -> api.Model:
    return tuned_model()


@pytest.fixture(scope="module")
def alone(model: api.Model) -> api.Model:
    """The same with an engine of its own: what the answers are compared with."""
    return replace(model, slots=1)


@pytest.fixture(scope="module")
def server(model: api.Model) -> Iterator[Running]:
    with serving(model, name="tiny", max_queue=200) as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test no row is in use."""
    yield
    if "server" in request.fixturenames:
        request.getfixturevalue("server").idle()


# What is answered


def test_a_text_goes_on_as_the_model_says(server: Running, alone: api.Model) -> None:
    ids = [*b"Hello"]
    how = {"max_tokens": 9, "temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "repetition_penalty": 1.1}
    how |= {"presence_penalty": 0.3, "frequency_penalty": 0.2, "seed": 5}
    answer = server.post("/v1/completions", model="tiny", prompt="Hello", logit_bias={"65": 4, "66": -100}, **how)
    (choice,) = answer["choices"]
    expected = alone.generate(ids, logit_bias={65: 4, 66: -100}, **how)
    assert choice == {"text": expected, "index": 0, "logprobs": None, "finish_reason": "length"}
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 9, "total_tokens": 14}
    assert (answer["object"], answer["model"]) == ("text_completion", "tiny")
    assert answer["id"].startswith("cmpl-") and abs(answer["created"] - time.time()) < 600


def test_every_form_of_prompt(server: Running) -> None:
    one = {"max_tokens": 4, "seed": 1, "n": 2}
    forms: list[Any] = ["ab", ["ab"], [97, 98], [[97, 98]]]
    texts = [[c["text"] for c in server.post("/v1/completions", prompt=form, **one)["choices"]] for form in forms]
    assert texts[0] == texts[1] == texts[2] == texts[3] and len(set(texts[0])) == 2
    both = server.post("/v1/completions", prompt=["zz", "ab"], **one)
    assert [choice["index"] for choice in both["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in both["choices"]][2:] == texts[0]
    assert both["usage"]["prompt_tokens"] == 4 and both["usage"]["completion_tokens"] == 16
    begun = [server.post("/v1/completions", max_tokens=4, seed=1, **prompt) for prompt in ({}, {"prompt": ""})]
    assert begun[0]["choices"] == begun[1]["choices"]


def test_seeds_of_either_sign(server: Running, alone: api.Model) -> None:
    for seed in (-1, -(2**63), 0, 2**64 - 1):
        text = server.post("/v1/completions", prompt="s", seed=seed)["choices"][0]["text"]
        assert text == alone.generate([*b"s"], seed=seed % 2**64)
    texts = {server.post("/v1/completions", prompt="s")["choices"][0]["text"] for _ in range(3)}
    assert len(texts) > 1


def test_log_probabilities_of_prompt_and_reply(server: Running, model: api.Model) -> None:
    """The lists that lm-evaluation-harness reads: one longer than the prompt, of the full softmax whatever is asked."""
    ids = [*"héllo".encode()]
    answer = server.post(
        "/v1/completions",
        prompt=[ids],
        max_tokens=1,
        echo=True,
        logprobs=3,
        temperature=0,
        top_k=1,
        logit_bias={"7": 5},
    )
    (choice,) = answer["choices"]
    told = choice["logprobs"]
    assert {len(values) for values in told.values()} == {len(ids) + 1}
    assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
    drawn = answer["usage"]["completion_tokens"]
    assert drawn == 1
    values = np.asarray(jnn.log_softmax(np.asarray(model.logits(ids), np.float64)))
    np.testing.assert_allclose(told["token_logprobs"][1:-1], values[range(len(ids) - 1), ids[1:]], atol=1e-4)
    for place, top in enumerate(told["top_logprobs"][1:]):
        likeliest = np.sort(values[place])[::-1][:3]
        np.testing.assert_allclose(max(top.values()), likeliest[0], atol=1e-4)
        assert 3 <= len(top) <= 4
        assert top[told["tokens"][place + 1]] == told["token_logprobs"][place + 1]
    assert told["tokens"][:6] == ["h", "bytes:\\xc3", "bytes:\\xa9", "l", "l", "o"]
    assert told["text_offset"][:6] == [0, 1, 2, 2, 3, 4]
    assert choice["text"].startswith("héllo")


def test_only_the_prompt_is_looked_at(server: Running) -> None:
    for more in ({}, {"stream": True}):
        with server.client.stream(
            "POST", "/v1/completions", json={"prompt": "abc", "max_tokens": 0, "echo": True, "logprobs": 0, **more}
        ) as answer:
            text = "".join(answer.iter_text())
        (choice,) = (events(text)[0] if more else json.loads(text))["choices"]
        assert (choice["text"], choice["finish_reason"]) == ("abc", "length")
        assert choice["logprobs"]["tokens"] == ["a", "b", "c"]
        assert [len(top) for top in choice["logprobs"]["top_logprobs"][1:]] == [1, 1]
    plain = server.post("/v1/completions", prompt=["abc", "d"], max_tokens=0, echo=True)
    assert [choice["text"] for choice in plain["choices"]] == ["abc", "d"]


def test_of_two_tokens_with_one_name_the_likelier_is_told(model: api.Model) -> None:
    from gptjax.serve.replies import CompletionForm

    tokenizer = replace(model.tokenizer, pieces=[b"x", b"x", b"y"], join=None)
    form = object.__new__(CompletionForm)
    form.tokenizer = tokenizer
    assert form._top(2, -3.0, [(0, -1.0), (1, -2.0), (2, -3.1)]) == {"x": -1.0, "y": -3.0}
    assert form._top(1, -2.0, [(0, -1.0), (1, -2.1)]) == {"x": -1.0}
    assert form._top(0, -1.0, [(0, -1.1), (1, -2.0)]) == {"x": -1.0}


CASES: list[dict[str, Any]] = [
    {"prompt": [*"日本".encode()][:-1], "max_tokens": 20, "seed": 3},
    {"prompt": [[*"é".encode()][:1], [*"🙂".encode()][:2], [*"🙂".encode()][:3]], "max_tokens": 12, "seed": 4, "n": 2},
    {"prompt": [*"é".encode()][:1], "max_tokens": 12, "seed": 2, "echo": True, "logprobs": 2},
    {"prompt": "Once", "max_tokens": 40, "seed": 8, "logprobs": 0},
    {"prompt": "Once", "max_tokens": 30, "seed": 8, "n": 3, "echo": True},
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_a_stream_says_the_same(case: int, server: Running) -> None:
    body = CASES[case]
    whole = server.post("/v1/completions", **body)
    parts = server.events("/v1/completions", **body, stream_options={"include_usage": True})
    assert parts[-1]["choices"] == [] and parts[-1]["usage"] == whole["usage"]
    assert all(part["usage"] is None for part in parts[:-1])
    for choice in whole["choices"]:
        own = [part["choices"][0] for part in parts[:-1] if part["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in own) == choice["text"]
        assert [part["finish_reason"] for part in own] == [None] * (len(own) - 1) + [choice["finish_reason"]]
        if choice["logprobs"]:
            for name, values in choice["logprobs"].items():
                assert [value for part in own for value in part["logprobs"][name]] == values


def test_a_reply_completes_the_prompts_last_character(server: Running) -> None:
    for whole in ("é", "日", "🙂"):
        *begun, last = whole.encode()
        body = {"prompt": [*b"a", *begun], "max_tokens": 1, "temperature": 0, "logit_bias": {str(last): 100}}
        for echo in (False, True):
            text = server.post("/v1/completions", **body, echo=echo)["choices"][0]["text"]
            assert text == "a" * echo + whole
            parts = server.events("/v1/completions", **body, echo=echo)
            assert "".join(part["choices"][0]["text"] for part in parts) == text


def test_stop_strings_that_span_tokens(server: Running, alone: api.Model) -> None:
    """Of bytes every string of two does; held back in a stream, gone from the text."""
    how = {"max_tokens": 60, "seed": 11, "temperature": 0.8}
    free = alone.generate([*b"stop"], **how)
    for at, size in ((0, 1), (0, 3), (5, 2), (9, 4)):
        word = free[at : at + size]
        expected = free[: free.index(word)]
        for stop in (word, ["never there", word]):
            (choice,) = server.post("/v1/completions", prompt="stop", stop=stop, **how)["choices"]
            assert (choice["text"], choice["finish_reason"]) == (expected, "stop")
            parts = server.events("/v1/completions", prompt="stop", stop=stop, **how)
            assert "".join(part["choices"][0]["text"] for part in parts) == expected
    assert alone.generate([*b"stop"], stop=free[5:7], **how) == free[: free.index(free[5:7])]


def test_a_conversation(server: Running, alone: api.Model) -> None:
    turns = [Message("system", "Be."), Message("user", "Hi"), Message("assistant", "yo"), Message("user", "a b")]
    ids = alone.stage.chat.prompt(turns).tolist()
    said = [{"role": turn.role, "content": turn.content} for turn in turns]
    said[1]["content"] = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    how = {"seed": 2, "temperature": 0.9}
    expected = alone.generate(ids, max_tokens=12, **how)
    for limit in ("max_tokens", "max_completion_tokens"):
        answer = server.post("/v1/chat/completions", messages=said, **{limit: 12}, **how)
        assert answer["object"] == "chat.completion"
        assert answer["choices"][0]["message"] == {"role": "assistant", "content": expected, "refusal": None}
    parts = server.events("/v1/chat/completions", messages=said, max_tokens=12, logprobs=True, top_logprobs=2, **how)
    deltas = [part["choices"][0]["delta"] for part in parts]
    assert deltas[0]["role"] == "assistant" and all("role" not in delta for delta in deltas[1:])
    assert "".join(delta["content"] for delta in deltas) == expected
    assert {part["object"] for part in parts} == {"chat.completion.chunk"}
    told = [token for part in parts for token in part["choices"][0]["logprobs"]["content"]]
    assert b"".join(bytes(token["bytes"]) for token in told).decode(errors="replace").startswith(expected[:1])
    assert all(len(token["top_logprobs"]) == 2 for token in told)
    unbounded = server.post("/v1/chat/completions", messages=said, **how)
    assert unbounded["usage"]["total_tokens"] <= CONTEXT + 1


def test_what_an_assistant_said_can_be_sent_back(server: Running) -> None:
    message = server.post("/v1/chat/completions", messages=[{"role": "user", "content": "x"}], max_tokens=3)
    reply = message["choices"][0]["message"] | {"content": "as it came"}
    again = [{"role": "user", "content": "x"}, reply, {"role": "user", "content": "y"}]
    server.post("/v1/chat/completions", messages=again, max_tokens=2)


def test_the_first_clients_route(server: Running) -> None:
    body = {"prompt": "Say", "max_tokens": 5, "n": 1, "stop": None, "seed": 3}
    old = server.post("/v1/engines/tiny/completions", **body)
    assert old["choices"] == server.post("/v1/completions", model="tiny", **body)["choices"]
    server.post("/v1/engines/davinci/completions", 404, **body)


def test_models_and_tokens(server: Running, model: api.Model) -> None:
    listed = server.client.get("/v1/models").json()
    assert listed["object"] == "list" and [one["id"] for one in listed["data"]] == ["tiny"]
    assert server.client.get("/v1/models/tiny").json() == listed["data"][0]
    text = "a <|endoftext|> é"
    ids = server.post("/tokenize", prompt=text)["tokens"]
    assert ids == [*text.encode()]  # a name that is spelled out is text
    assert server.post("/tokenize", prompt=text, add_special_tokens=False)["tokens"] == ids
    assert server.post("/detokenize", tokens=ids) == {"prompt": text}
    info = server.client.get("/tokenizer_info").json()
    assert info["eos_token"] == "<|endoftext|>" and info["bos_token"] is None
    assert info["chat_template"] == model.stage.chat.template
    assert server.client.get("/health").json()["status"] == "ok"
    assert server.client.get("/openapi.json").json()["openapi"].startswith("3.")


def test_among_fifty_others_the_same_text(server: Running, alone: api.Model) -> None:
    body = {"prompt": "probe: the", "max_tokens": 24, "seed": 77, "temperature": 1.1}
    expected = alone.generate([*b"probe: the"], **{k: v for k, v in body.items() if k != "prompt"})
    rng = random.Random(0)

    def other(i: int) -> None:
        prompt = "probe: the"[: rng.randint(1, 10)] + "x" * rng.randint(0, 40)
        server.post("/v1/completions", prompt=prompt, max_tokens=rng.randint(1, 30), seed=i)

    with ThreadPoolExecutor(20) as pool:
        others = [pool.submit(other, i) for i in range(50)]
        probes = [pool.submit(server.post, "/v1/completions", **body) for _ in range(4)]
        parts = server.events("/v1/completions", **body)
        assert "".join(part["choices"][0]["text"] for part in parts) == expected
        assert [probe.result()["choices"][0]["text"] for probe in probes] == [expected] * 4
        for each in others:
            each.result()


def test_nothing_compiles_once_it_is_ready(server: Running) -> None:
    """After all that came before, and this: the programs are those that it started with."""
    before = server.metric("compiled_programs")
    for n, length in ((1, 3), (4, 20), (3, 70)):
        server.post("/v1/completions", prompt="z" * length, n=n, max_tokens=5, logprobs=1, echo=True, top_p=0.4)
        server.post("/v1/completions", prompt=["y" * length, "v" * length], n=2, max_tokens=5)
    assert server.metric("compiled_programs") == before > 3


# What is refused

WRONG: list[tuple[str, dict[str, Any], str, str]] = [
    ("prompt", {"prompt": []}, "prompt", "empty"),
    ("prompt", {"prompt": [[]]}, "prompt", "empty"),
    ("prompt", {"prompt": 3}, "prompt", "a text, token ids, or a list of either"),
    ("prompt", {"prompt": ["a", 3]}, "prompt", "a text, token ids"),
    ("prompt", {"prompt": [1, 268]}, "prompt", "token 268 is outside the vocabulary, 0 to 267"),
    ("prompt", {"prompt": "\ud800"}, "prompt", "surrogate"),
    ("prompt", {"prompt": "x" * 90}, "max_tokens", f"90 tokens, and max_tokens = 16; the context holds {CONTEXT}"),
    ("prompt", {"prompt": "x" * 10_000}, "prompt", f"at least 769 tokens; the context holds {CONTEXT}"),
    ("prompt", {"max_token": 3}, "max_token", "no such parameter; did you mean max_tokens"),
    ("prompt", {"best_of": 2}, "best_of", "only 1 is offered"),
    ("prompt", {"suffix": "x"}, "suffix", "has not learned to fill in"),
    ("prompt", {"suffix": "x", "echo": True}, "echo", "one of them"),
    ("prompt", {"logprobs": 21}, "logprobs", "21: input should be less than or equal to 20"),
    ("prompt", {"logprobs": -1}, "logprobs", "greater"),
    ("prompt", {"n": 129}, "n", "128"),
    ("prompt", {"n": 65, "prompt": ["a", "b"]}, "n", "at most 128"),
    ("prompt", {"n": "1"}, "n", "integer"),
    ("prompt", {"stop": list("abcde")}, "stop", "4"),
    ("prompt", {"stop": ""}, "stop", "at least 1 character"),
    ("prompt", {"temperature": 2.1}, "temperature", "2"),
    ("prompt", {"top_p": 0}, "top_p", "greater than 0"),
    ("prompt", {"presence_penalty": -3}, "presence_penalty", "-2"),
    ("prompt", {"logit_bias": {"a": 1}}, "logit_bias", "pattern"),
    ("prompt", {"logit_bias": {"300": 1}}, "logit_bias|None", "300"),
    ("prompt", {"logit_bias": {"3": 101}}, "logit_bias", "100"),
    ("prompt", {"seed": 2**64}, "seed", "18446744073709551616"),
    ("prompt", {"stream_options": {"include_usage": True}}, "stream_options", "only where stream is true"),
    ("prompt", {"stream": True, "stream_options": {"x": 1}}, "stream_options", "no such parameter"),
    ("prompt", {"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
    ("messages", {"messages": []}, "messages", "at least 1"),
    ("messages", {"messages": [{"role": "tool", "content": "x"}]}, "messages", "unknown role tool"),
    ("messages", {"messages": [{"role": "assistant", "content": "x"}]}, "messages", "assistant first"),
    ("messages", {"messages": [{"role": "user", "content": None}]}, "messages", "a list of parts"),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "only 'text'|text"),
    ("messages", {"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages", "not offered"),
    ("messages", {"tools": [{}]}, "tools", "at most 0"),
    ("messages", {"functions": [{}]}, "functions", "at most 0"),
    ("messages", {"response_format": {"type": "json_object"}}, "response_format", "only 'text' is offered"),
    ("messages", {"modalities": ["audio"]}, "modalities", "only 'text'"),
    ("messages", {"audio": {}}, "audio", "not offered here"),
    ("messages", {"top_logprobs": 2}, "top_logprobs", "logprobs"),
    ("messages", {"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "one of them"),
    ("messages", {"messages": [{"role": "user", "content": "x" * 95}]}, "messages", f"98 tokens.*{CONTEXT}"),
]


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_a_wrong_parameter_is_named(case: int, server: Running) -> None:
    route, wrong, param, words = WRONG[case]
    right: dict[str, Any] = {"prompt": "a"} if route == "prompt" else {"messages": [{"role": "user", "content": "a"}]}
    path = "/v1/completions" if route == "prompt" else "/v1/chat/completions"
    for stream in (False, True):
        content = json.dumps({**right, "stream": stream, **wrong})
        answer = server.client.post(path, content=content, headers={"Content-Type": "application/json"})
        error = answer.json()["error"]
        assert answer.status_code == 400, error
        assert str(error["param"]) in param.split("|") and re.search(words, error["message"]), error
        assert error["type"] == "invalid_request_error" and error["code"]
        if "stream" in wrong or "stream_options" in wrong:
            break
    server.post("/v1/completions", prompt="a", max_tokens=1)


def test_neutral_values_are_taken(server: Running) -> None:
    neutral = dict.fromkeys(("best_of", "suffix", "logit_bias", "stop", "seed", "stream", "stream_options", "n"))
    server.post("/v1/completions", prompt="a", max_tokens=1, **neutral, user="me", metadata={"a": "b"})
    server.post("/v1/completions", prompt="a", max_tokens=1, best_of=1, top_k=-1, logit_bias={}, stop=[])
    server.post(
        "/v1/chat/completions",
        messages=[{"role": "user", "content": "x"}],
        max_tokens=1,
        tools=None,
        functions=[],
        response_format={"type": "text"},
        modalities=["text"],
        audio=None,
        store=False,
    )


def test_bodies_and_paths_that_are_none(server: Running) -> None:
    post = server.client.post
    kind = {"Content-Type": "application/json"}
    for content in (b"", b"{", b"[]", b"\xff", b"nul", b"[" * 100_000, b'{"prompt": 1e999}', b'{"n": ' + b"9" * 5000):
        answer = post("/v1/completions", content=content, headers=kind)
        assert answer.status_code == 400 and answer.json()["error"]["message"], content[:20]
    for headers in ({"Content-Type": "text/plain"}, {}):
        answer = post("/v1/completions", content=b'{"prompt": "a"}', headers=headers)
        assert answer.status_code == 400 and "application/json" in answer.json()["error"]["message"]
    for path, status in (("/v1/none", 404), ("/v1/models/none", 404), ("/..%2f..%2fetc/passwd", 404)):
        answer = server.client.get(path)
        assert answer.status_code == status and answer.json()["error"]["type"] == "invalid_request_error"
    assert server.client.get("/v1/completions").status_code == 405
    assert server.post("/v1/completions", 404, model="gpt-4", prompt="a")["error"]["code"] == "model_not_found"


def test_a_base_model_fills_in_and_does_not_chat() -> None:
    model = filling_model()
    with serving(model) as running:
        body = {"prompt": "def f(", "suffix": "return x", "max_tokens": 6, "seed": 1}
        text = running.post("/v1/completions", **body)["choices"][0]["text"]
        other = replace(model, slots=1)
        assert text == other.generate("def f(", suffix="return x", max_tokens=6, seed=1)
        assert text != other.generate("def f(", max_tokens=6, seed=1)
        message = [{"role": "user", "content": "x"}]
        error = running.post("/v1/chat/completions", 400, messages=message)["error"]
        assert error["param"] == "messages" and "has not learned conversations" in error["message"]
        assert running.client.get("/tokenizer_info").json()["chat_template"] is None


def test_an_editor_s_requests_are_answered(tmp_path: Path) -> None:
    """As minuet-ai.nvim sends them for its provider openai_fim_compatible: by curl, from a file, streamed, with a key
    that nobody asked for; what follows the cursor may be empty."""
    if not (curl := shutil.which("curl")):
        pytest.skip("no curl")
    optional = {"max_tokens": 8, "top_p": 0.9, "stop": ["\n\n"]}
    with serving(filling_model()) as running:
        for suffix in ("\n    return x\n", ""):
            data = {"model": "filling", "stream": True, **optional, "prompt": "def f(", "suffix": suffix}
            file = tmp_path / "request.json"
            file.write_text(json.dumps(data))
            headers = ("Content-Type: application/json", "Accept: application/json", "Authorization: Bearer xterm")
            words = [curl, "-sN", f"{running.url}/v1/completions", "-d", f"@{file}", "-w", "\n%{http_code}"]
            said = subprocess.run(
                [*words, *(word for header in headers for word in ("-H", header))], capture_output=True, check=True
            ).stdout.decode()
            *lines, status = said.strip().split("\n")
            made = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
            assert status == "200" and made[-1]["choices"][0]["finish_reason"] in ("stop", "length")
            assert all(set(part["choices"][0]) >= {"text", "index"} for part in made)
            assert "data: [DONE]" in lines


# Limits


class Slow:
    """An engine that takes its time, so that what happens meanwhile can be seen."""

    def __init__(self, running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps, self.gate = 0, threading.Semaphore(0)
        engine = running.served.model.engine
        step = engine.step

        def slow(*args: Any) -> None:
            self.gate.acquire(timeout=30)
            self.steps += 1
            step(*args)

        monkeypatch.setattr(engine, "step", slow)

    def go(self, steps: int = 1000) -> None:
        self.gate.release(steps)


def endless(server: Running) -> dict[str, int]:
    """A bias by which no reply ends before its limit, whatever is drawn."""
    return dict.fromkeys(map(str, server.served.model.stage.ends), -100)


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_frees_the_row_within_a_step(
    stream: bool, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, worker = Slow(server, monkeypatch), server.served.worker
    before = server.metric("completion_tokens_total")
    asked = {"prompt": "x", "max_tokens": 80, "n": 2, "stream": stream, "logit_bias": endless(server)}
    body = json.dumps(asked).encode()
    with raw(server.url) as connection:
        connection.sendall(_head(len(body)) + body)
        until(lambda: worker.open == 2)
        slow.go(2)
        until(lambda: slow.steps == 2 and worker.used == 2)
    until(lambda: worker.open == 0)  # the server knows
    slow.go(1)
    server.idle()
    assert slow.steps <= 3
    assert server.metric("completion_tokens_total") > before  # what was drawn in vain is counted, too
    slow.go()


def _head(length: int, path: str = "/v1/completions", more: str = "") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n{more}"
    return f"{head}Content-Length: {length}\r\n\r\n".encode()


def test_a_full_queue_says_when_to_come_again(model: api.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(model, max_queue=1, request_timeout=600) as running, ThreadPoolExecutor(8) as pool:
        slow = Slow(running, monkeypatch)
        under_way = [pool.submit(running.post, "/v1/completions", prompt="q", max_tokens=3) for _ in range(5)]
        until(lambda: running.served.worker.open == 5)
        until(lambda: running.metric("replies_open") == 5)
        answer = httpx.post(f"{running.url}/v1/completions", json={"prompt": "q"})
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) > 0
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"
        slow.go()
        assert [len(each.result()["choices"]) for each in under_way] == [1] * 5
        running.post("/v1/completions", prompt="q", max_tokens=1)


def test_time_limits(model: api.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(model, request_timeout=0.5, idle_timeout=0.6) as running:
        slow = Slow(running, monkeypatch)
        answer = running.client.post("/v1/completions", json={"prompt": "q"})
        assert answer.status_code == 504 and answer.headers["x-should-retry"] == "false"
        slow.go(1)
        running.idle()
        with running.client.stream("POST", "/v1/completions", json={"prompt": "q", "stream": True}) as stream:
            said = "".join(stream.iter_text())
        assert json.loads(said.removeprefix("data: "))["error"]["code"] == "timeout"
        slow.go()
        for begun in (b"POST /v1/comp", _head(100), _head(100) + b"{", b""):  # heads and bodies that do not come
            with raw(running.url) as connection:
                connection.sendall(begun)
                assert b" 408 " in _all(connection).splitlines()[0]
        running.post("/v1/completions", prompt="q", max_tokens=1)


def _all(connection: socket.socket) -> bytes:
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


def test_who_does_not_read_is_cut_off_and_holds_up_nobody(model: api.Model) -> None:
    with serving(model, idle_timeout=1.0, max_queue=200) as running:
        body = json.dumps({"prompt": "x", "max_tokens": 90, "n": 64, "logprobs": 20, "stream": True}).encode()
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.connect(("127.0.0.1", int(running.url.rpartition(":")[2])))
        connection.sendall(_head(len(body)) + body)
        until(lambda: running.served.worker.open > 0)
        running.idle()
        assert running.post("/v1/completions", prompt="q", max_tokens=2)["choices"]
        with pytest.raises(OSError):
            while connection.recv(1 << 20):
                pass
            raise ConnectionResetError  # closed in order: what was sent had fitted into buffers
        connection.close()


def test_bodies_of_every_size(model: api.Model) -> None:
    with serving(model, max_body=1000) as running:
        big = json.dumps({"prompt": "x" * 5000}).encode()
        kind = {"Content-Type": "application/json"}
        parts = iter([big[:100], big[100:]])
        for content in (big, parts):
            answer = running.client.post("/v1/completions", content=content, headers=kind)
            assert answer.status_code == 413 and answer.json()["error"]["code"] == "request_too_large"
        many = {f"X-{i}": "y" * 100 for i in range(HEADERS // 100)}
        assert running.client.get("/health", headers=many).status_code == 431
        with raw(running.url) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"y" * (4 * HEADERS))
            assert b" 431 " in _all(connection).splitlines()[0]
        with raw(running.url) as connection:
            connection.sendall(b"what is this\r\n\r\n")
            told = _all(connection)
            assert b" 400 " in told.splitlines()[0] and b'"error"' in told
        running.post("/v1/completions", prompt="q", max_tokens=1)


def test_an_engine_that_fails_goes_on(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = server.served.model.engine
    decode, left = engine._decode, [1]

    def broken(*args: Any) -> None:
        decode(*args)
        if left[0] == 0:
            raise RuntimeError("the device has gone")
        left[0] -= 1

    monkeypatch.setattr(engine, "_decode", broken)
    asked = {"prompt": "q", "max_tokens": 60, "stream": True, "logit_bias": endless(server)}
    with server.client.stream("POST", "/v1/completions", json=asked) as told:
        parts = "".join(told.iter_text()).strip().split("\n\n")
    assert json.loads(parts[0].removeprefix("data: "))["choices"]
    assert json.loads(parts[-1].removeprefix("data: "))["error"]["type"] == "server_error"
    assert server.post("/v1/completions", 500, prompt="q", max_tokens=60)["error"]["type"] == "server_error"
    monkeypatch.undo()
    server.post("/v1/completions", prompt="q", max_tokens=3)


# Who may ask


def test_keys(model: api.Model, tmp_path: Path) -> None:
    (key, line), (other, more) = new_key("ann"), new_key("bob")
    file, audit = tmp_path / "keys", tmp_path / "audit"
    file.write_text(f"# who\n\n{line}\n{more}:2\n")
    assert hashlib.sha256(key.encode()).hexdigest() in line and key not in line
    with serving(model, api_key_file=str(file), audit_file=str(audit), allow_origin=("https://here",)) as running:
        ask = {"json": {"prompt": "secret", "max_tokens": 2}}
        for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": key}, {"Authorization": "Bearer é"}):
            raw_headers = {name: value.encode() for name, value in headers.items()}
            answer = running.client.post("/v1/completions", headers=raw_headers, **ask)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["error"]["code"] == "invalid_api_key"
        good, few = ({"Authorization": f"Bearer {each}"} for each in (key, other))
        for _ in range(4):
            assert running.client.post("/v1/completions", headers=good, **ask).status_code == 200
        statuses = [running.client.get("/v1/models", headers=few) for _ in range(3)]
        assert [answer.status_code for answer in statuses] == [200, 200, 429]
        assert 0 < int(statuses[2].headers["retry-after"]) <= 30
        for path in ("/health", "/metrics"):
            assert running.client.get(path).status_code == 200
        until(lambda: audit.read_text().count("\n") == 11)
        lines = [json.loads(line) for line in audit.read_text().splitlines()]
        assert [line["status"] for line in lines] == [401] * 4 + [200] * 4 + [200, 200, 429]
        assert [line["key"] for line in lines[4:]] == ["ann"] * 4 + ["bob"] * 3
        used = {name: lines[4][name] for name in ("route", "prompt_tokens", "completion_tokens")}
        assert used == {"route": "/v1/completions", "prompt_tokens": 6, "completion_tokens": 2}
        assert "secret" not in audit.read_text()
        asked = {"Origin": "https://here", "Access-Control-Request-Method": "POST"}
        assert running.client.options("/v1/completions", headers=asked).status_code == 200
        answer = running.client.get("/v1/models", headers=good | {"Origin": "https://here"})
        assert answer.headers["access-control-allow-origin"] == "https://here"
        answer = running.client.get("/v1/models", headers=good | {"Origin": "https://there"})
        assert "access-control-allow-origin" not in answer.headers


def test_the_audit_keeps_texts_where_it_is_told_to(model: api.Model, tmp_path: Path) -> None:
    audit = tmp_path / "audit"
    with serving(model, audit_file=str(audit), audit_text=True) as running:
        text = running.post("/v1/completions", prompt="secret", max_tokens=2)["choices"][0]["text"]
        until(lambda: audit.read_text().endswith("\n"))  # it is written after the answer
        (line,) = map(json.loads, audit.read_text().splitlines())
    assert line["asked"] == {"prompt": "secret"} and line["answered"] == [text]


def test_a_files_lines(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    _, line = new_key("ann")
    for text, words in (
        ("ann:abc", "line 1 is another form"),
        ("", "no key"),
        (f"{line}\n{line}", "second key of ann"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=words):
            Keys(str(file))
    with pytest.raises(UserError, match="--new-key 'a:b'"):
        new_key("a:b")


def test_pages_of_other_sites(server: Running) -> None:
    """A browser that was led to this machine's own address, or to another name for it."""
    ask = {"json": {"prompt": "a", "max_tokens": 1}}
    refused = [
        {"Host": "evil.example"},
        {"Host": "evil.example:8000"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
    ]
    for headers in refused:
        answer = server.client.post("/v1/completions", headers=headers, **ask)
        assert answer.status_code == 403 and answer.json()["error"]["code"] == "forbidden"
    own = [{"Host": "localhost:1"}, {"Host": "[::1]:8000"}, {"Origin": server.url}, {}]
    for headers in own:
        assert server.client.post("/v1/completions", headers=headers, **ask).status_code == 200
    preflight = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in server.client.options("/v1/completions", headers=preflight).headers


def test_an_open_address_asks_for_keys() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.com"):
        with pytest.raises(UserError, match="others can reach it"):
            Options(host=host).require()
        Options(host=host, public=True).require()
        Options(host=host, api_key_file="keys").require()
    for host in ("127.0.0.1", "localhost", "::1", "127.0.0.9"):
        Options(host=host).require()


def test_metrics_add_up(server: Running) -> None:
    before = {name: server.metric(name) for name in ("prompt_tokens_total", "completion_tokens_total")}
    server.post("/v1/completions", prompt="abc", n=2, max_tokens=7, seed=1)
    server.idle()
    assert server.metric("prompt_tokens_total") == before["prompt_tokens_total"] + 3
    assert server.metric("completion_tokens_total") == before["completion_tokens_total"] + 14
    text = server.client.get("/metrics").text
    for name in (
        "queue_length",
        "slots_used",
        "slots_total 4.0",
        "time_to_first_token_seconds_bucket",
        "reused_prompt",
    ):
        assert f"gptjax_{name}" in text
    for name in ("time_to_first_token_seconds", "time_per_token_seconds", "request_seconds"):
        assert server.metric(f"{name}_count") > 0


# The verb


@pytest.mark.slow
def test_two_devices_each_way_say_the_same(alone: api.Model, corpus: Path) -> None:
    from gptjax.api import _layout

    stage = alone.stage
    place = _layout(stage.config, LayoutConfig(data=2, tensor=2))
    cut = type(stage)(stage.config, "cpu", place, stage.known_tokenizer)
    model = api.Model("cut", cut, alone.params, 4)
    with serving(model) as running:
        body = {"prompt": "two by two", "max_tokens": 8, **GREEDY}
        text = running.post("/v1/completions", **body)["choices"][0]["text"]
        assert text == alone.generate([*b"two by two"], max_tokens=8, temperature=0)
        assert "".join(e["choices"][0]["text"] for e in running.events("/v1/completions", **body)) == text


@pytest.fixture(scope="module")
def folder(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps."""
    from gptjax.stages.launch import train

    where = tmp_path_factory.mktemp("served") / "tiny_run"
    steps = replace(tiny.train, total_tokens=3 * 8 * 16, save_interval=1)
    train(replace(tiny, train=steps, run=str(where)), None, named=True)
    return where


def _start(folder: Path, *more: str) -> tuple[subprocess.Popen[str], str]:
    words = ["serve", str(folder), "--port", "0", "--slots", "2", *more]
    process = subprocess.Popen([sys.executable, "-m", "gptjax", *words], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    line = process.stdout.readline()
    assert line.startswith(f"serving {folder.name} at http://127.0.0.1:"), line
    return process, line.split()[-1]


@pytest.mark.slow
def test_the_verb_serves_and_drains(folder: Path) -> None:
    """A signal: who is being answered is answered to the end, who comes is sent away, and it ends in order."""
    process, url = _start(folder)
    try:
        with httpx.Client(base_url=url, timeout=60) as client, ThreadPoolExecutor(1) as pool:
            body = {"prompt": "a", "max_tokens": 15, "n": 64}
            whole = client.post("/v1/completions", json=body | {"n": 1}).json()
            assert whole["model"] == folder.name and whole["usage"]["completion_tokens"] > 0
            running = pool.submit(client.post, "/v1/completions", json=body)
            until(lambda: "gptjax_replies_open 64" in client.get("/metrics").text or running.done())
            process.send_signal(signal.SIGTERM)
            statuses = set()
            while not running.done():
                statuses.add(client.post("/v1/completions", json={"prompt": "b"}).status_code)
            assert len(running.result().json()["choices"]) == 64
            assert 503 in statuses
        assert process.wait(30) == 0
    finally:
        process.kill()


@pytest.mark.slow
def test_a_second_signal_ends_at_once(folder: Path) -> None:
    process, url = _start(folder, "--drain", "600")
    try:
        with raw(url) as connection:
            connection.sendall(_head(50))  # a request that never ends keeps it waiting
            until(lambda: "200" in _status(url))
            process.send_signal(signal.SIGTERM)
            until(lambda: "503" in _status(url))
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 128 + signal.SIGTERM
    finally:
        process.kill()


def _status(url: str) -> str:
    return str(httpx.get(f"{url}/health").status_code)


def test_the_verb_refuses(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for line, words in (
        ("serve", "PATH is missing"),
        ("serve x --host 0.0.0.0", "others can reach it"),
        ("serve x --port 70000", "--port 70000"),
        ("serve x --slots 0", "--slots 0"),
    ):
        with pytest.raises(UserError, match=words):
            cli.run(line.split())
    assert cli.run(["serve", "--new-key", "ann"]) == 0
    key, line = capsys.readouterr().out.splitlines()
    assert line == f"ann:{hashlib.sha256(key.encode()).hexdigest()}"
    for name in [name for name in sys.modules if name.startswith("gptjax.serve.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(UserError, match=r"needs the extra serve: pip install 'gptjax\[serve\]'"):
        cli.run(["serve", "x"])
