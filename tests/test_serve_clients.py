"""The server as real clients see it: OpenAI's of today and of 2023, lm-evaluation-harness, schemathesis. Run: pytest
tests/test_serve_clients.py"""

import asyncio
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import urlopen

import numpy as np
import pytest

from gptjax import api
from gptjax.config import LayoutConfig
from gptjax.convert.tokenizer import write_tokenizer
from gptjax.data.chat import Message, chat_format

if TYPE_CHECKING:
    from served import Served

NAME, T = "small", 192
LETTERS = {str(i): -100 for i in (*range(97), *range(123, 265))}
"""A logit_bias that leaves the small letters, so that what comes is text that can be compared with."""
FEW = [Message("user", "hi")]


@pytest.fixture(scope="module")
def openai() -> Any:
    return pytest.importorskip("openai", reason="needs the test extra")


@pytest.fixture(scope="module")
def client(openai: Any, served: "Served") -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")
def local(small_run: Path) -> api.Model:
    """The same model in this process."""
    return api.load(str(small_run), layout=LayoutConfig(fsdp=1), slots=2)


def ids(text: str) -> list[int]:
    return list(text.encode())


# OpenAI's client


def test_a_completion_is_what_the_model_says(client: Any, local: api.Model) -> None:
    for how in ({"temperature": 0}, {"temperature": 0.9, "seed": 7, "top_p": 0.9}, {"seed": 2**40, "stop": ["a", "e"]}):
        made = client.completions.create(model=NAME, prompt=ids("def f"), max_tokens=12, logit_bias=LETTERS, **how)
        own = local.request(ids("def f"), max_tokens=12, logit_bias={int(i): v for i, v in LETTERS.items()}, **how)
        (reply,) = local.engine.run([own])
        choice = made.choices[0]
        assert (choice.text, choice.finish_reason) == (reply.text, reply.reason) and made.object == "text_completion"
        assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (5, len(reply.tokens))
        assert made.usage.total_tokens == 5 + len(reply.tokens) and made.model == NAME
    text = client.completions.create(model=NAME, prompt="def f", max_tokens=12, temperature=0, logit_bias=LETTERS)
    same = client.completions.create(model=NAME, prompt=ids("def f"), max_tokens=12, temperature=0, logit_bias=LETTERS)
    assert text.choices[0].text == same.choices[0].text != "" and text.id != same.id


def test_a_chat_is_what_the_model_says(client: Any, local: api.Model) -> None:
    said = [{"role": "system", "content": "Be é."}, {"role": "user", "content": "hi"}]
    how = {"max_tokens": 20, "temperature": 0, "logit_bias": LETTERS}
    made = client.chat.completions.create(model=NAME, messages=said, **how)
    prompt = chat_format(local.tokenizer).prompt([Message(**each) for each in said])
    expected = local.generate(prompt.tolist(), **how | {"logit_bias": {int(i): v for i, v in LETTERS.items()}})
    assert made.choices[0].message.content == expected != "" and made.choices[0].message.role == "assistant"
    assert made.object == "chat.completion" and made.usage.prompt_tokens == len(prompt)
    parts = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    plain = client.chat.completions.create(model=NAME, messages=said[1:], **how)
    assert client.chat.completions.create(model=NAME, messages=parts, **how).choices == plain.choices


PROMPTS = {
    "text": "one two",
    "several": ["one", "two"],
    "ids": ids("three"),
    "lists of ids": [ids("three"), ids("four")],
    "half a character": [0x61, 0xF0, 0x9F],
}


@pytest.mark.parametrize("how", [
    {"temperature": 0}, {"seed": 1, "n": 3}, {"seed": 1, "stop": ["e", "lo"]}, {"seed": 3, "echo": True},
    {"seed": 4, "logprobs": 2}, {"seed": 4, "logprobs": 0, "echo": True}, {"seed": 5, "stop": "\n", "logprobs": 5},
    {"seed": 6, "presence_penalty": 1.5, "frequency_penalty": 0.5, "top_p": 0.8, "logit_bias": LETTERS},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("prompt", PROMPTS)
def test_streamed_equals_unstreamed(client: Any, prompt: str, how: dict[str, Any]) -> None:
    asked = {"model": NAME, "prompt": PROMPTS[prompt], "max_tokens": 24} | how
    whole = client.completions.create(**asked)
    parts = [*client.completions.create(**asked, stream=True, stream_options={"include_usage": True})]
    assert parts[-1].choices == [] and parts[-1].usage == whole.usage and all(not p.usage for p in parts[:-1])
    assert len({part.id for part in parts}) == 1 and {part.object for part in parts} == {"text_completion"}
    texts: dict[int, str] = defaultdict(str)
    ends, told = dict[int, str](), defaultdict(lambda: defaultdict(list))
    for part in parts[:-1]:
        for choice in part.choices:
            assert choice.index not in ends, "more after its end"
            texts[choice.index] += choice.text
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
            for name, values in choice.logprobs or ():
                told[choice.index][name] += values or []
    assert sorted(ends) == [*range(len(whole.choices))]
    for choice in whole.choices:
        assert (texts[choice.index], ends[choice.index]) == (choice.text, choice.finish_reason)
        if "logprobs" in how:
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                assert told[choice.index][name] == (getattr(choice.logprobs, name) or []), name
    if "n" in how:
        assert len({choice.text for choice in whole.choices}) == len(whole.choices)


@pytest.mark.parametrize("how", [
    {"temperature": 0}, {"seed": 1, "n": 3}, {"seed": 1, "stop": ["e", "lo"]}, {"seed": 4, "logprobs": True},
    {"seed": 4, "logprobs": True, "top_logprobs": 3, "logit_bias": LETTERS}, {"seed": 9, "max_completion_tokens": 5},
], ids=str)  # fmt: skip
def test_a_streamed_chat_equals_an_unstreamed_one(client: Any, how: dict[str, Any]) -> None:
    asked = {"model": NAME, "messages": [{"role": "user", "content": "hé"}]} | how
    asked |= {} if "max_completion_tokens" in how else {"max_tokens": 24}
    whole = client.chat.completions.create(**asked)
    parts = [*client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})]
    assert parts[-1].choices == [] and parts[-1].usage == whole.usage
    texts: dict[int, str] = defaultdict(str)
    ends, roles, told = dict[int, str](), defaultdict(list), defaultdict(list)
    for choice in (choice for part in parts[:-1] for choice in part.choices):
        texts[choice.index] += choice.delta.content or ""
        roles[choice.index] += [choice.delta.role] if choice.delta.role else []
        told[choice.index] += (choice.logprobs and choice.logprobs.content) or []
        if choice.finish_reason:
            ends[choice.index] = choice.finish_reason
    for choice in whole.choices:
        assert (texts[choice.index], ends[choice.index]) == (choice.message.content, choice.finish_reason)
        assert roles[choice.index] == ["assistant"]
        if "logprobs" in how:
            assert told[choice.index] == choice.logprobs.content != []
            assert all(len(each.top_logprobs) == how.get("top_logprobs", 0) for each in choice.logprobs.content)
        assert how.get("max_completion_tokens") in (None, whole.usage.completion_tokens)


def test_log_probabilities_are_those_of_the_full_softmax(client: Any, local: api.Model) -> None:
    """Whatever the token was drawn by."""
    prompt = ids("abcabc")
    made = client.completions.create(
        model=NAME, prompt=prompt, max_tokens=4, seed=3, temperature=0.3, logit_bias=LETTERS, echo=True, logprobs=5
    ).choices[0]
    every = [*prompt, *ids(made.text[len(prompt) :])]
    scores = local.logits(every).astype(np.float64)
    logs = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    expected = [logs[i, token] for i, token in enumerate(every[1:])]
    assert made.logprobs.token_logprobs[0] is None and made.logprobs.tokens == [chr(i) for i in every]
    assert made.logprobs.token_logprobs[1:] == pytest.approx(expected, abs=2e-4)
    assert made.logprobs.text_offset == [*range(len(every))]
    for top, row in zip(made.logprobs.top_logprobs[1:], logs, strict=False):
        assert max(top.values()) == pytest.approx(row.max(), abs=2e-4)
    only = client.completions.create(model=NAME, prompt=prompt, max_tokens=0, echo=True, logprobs=1)
    assert only.choices[0].text == "abcabc" and only.usage.completion_tokens == 0
    assert only.choices[0].logprobs.token_logprobs[1:] == pytest.approx(expected[:5], abs=2e-4)


def test_a_seeded_request_gives_the_same_alone_and_among_others(openai: Any, served: "Served", client: Any) -> None:
    asked = {"model": NAME, "prompt": "who", "max_tokens": 40, "seed": 11, "temperature": 1.2, "logit_bias": LETTERS}
    alone = client.completions.create(**asked).choices[0].text

    async def among() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as many:
            others = [many.completions.create(**asked | {"seed": i, "prompt": f"{i}?"}) for i in range(3)]
            made = await asyncio.gather(many.completions.create(**asked), *others)
            stream = await many.completions.create(**asked, stream=True)
            return [*(each.choices[0].text for each in made), "".join([p.choices[0].text async for p in stream])]

    first, *others, streamed = asyncio.run(among())
    assert first == streamed == alone and alone not in others


def test_errors_become_the_exceptions_that_they_should(openai: Any, client: Any) -> None:
    wrong: list[tuple[type[Exception], dict[str, Any], str]] = [
        (openai.BadRequestError, {"temperature": -1}, "temperature"),
        (openai.BadRequestError, {"max_tokens": T + 1}, str(T)),
        (openai.BadRequestError, {"max_tokens": -1}, "max_tokens"),
        (openai.BadRequestError, {"n": 0}, "n"),
        (openai.BadRequestError, {"prompt": "a" * (T + 1)}, str(T)),
        (openai.BadRequestError, {"prompt": [265]}, "265"),
        (openai.BadRequestError, {"prompt": []}, "prompt"),
        (openai.BadRequestError, {"logprobs": 10_000}, "logprobs"),
        (openai.BadRequestError, {"logit_bias": {"9999": 1}}, "9999"),
        (openai.BadRequestError, {"best_of": 5}, "best_of"),
        (openai.BadRequestError, {"suffix": "x"}, "suffix"),
        (openai.BadRequestError, {"extra_body": {"no_such": 1}}, "no_such"),
        (openai.NotFoundError, {"model": "gpt-5"}, "gpt-5"),
    ]
    for kind, how, word in wrong:
        with pytest.raises(kind) as caught:
            client.completions.create(**{"model": NAME, "prompt": "a"} | how)
        assert word in str(caught.value.body["message"]) and {"message", "type", "param", "code"} <= {
            *caught.value.body
        }
        with pytest.raises(kind):
            client.completions.create(**{"model": NAME, "prompt": "a", "stream": True} | how)
    for said in ([], [{"role": "user", "content": ""}], [{"role": "assistant", "content": "a"}], [{"role": "x"}]):
        with pytest.raises(openai.BadRequestError, match="messages"):
            client.chat.completions.create(model=NAME, messages=said)
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "a"}], tools=[{"type": "x"}])
    with pytest.raises(openai.APIStatusError) as large:
        client.completions.create(model=NAME, prompt="a" * 3_000_000)
    assert large.value.status_code == 413
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=NAME, input="a")
    assert client.completions.create(model=NAME, prompt="a", max_tokens=1).usage.completion_tokens == 1


def test_too_many_at_once_are_told_to_come_back(openai: Any, served: "Served") -> None:
    async def crowd() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as many:
            asked = {"model": NAME, "prompt": "a", "max_tokens": 120, "temperature": 0, "logit_bias": LETTERS}
            return await asyncio.gather(*(many.completions.create(**asked) for _ in range(40)), return_exceptions=True)

    made = asyncio.run(crowd())
    full = [each for each in made if isinstance(each, openai.RateLimitError)]
    served_ = [each for each in made if not isinstance(each, Exception)]
    assert full and len(served_) >= 4 and len(full) + len(served_) == 40
    assert len({each.choices[0].text for each in served_}) == 1
    assert all(int(each.response.headers["retry-after"]) > 0 for each in full)
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=5) as patient:
        assert patient.completions.create(model=NAME, prompt="a", max_tokens=2).usage.completion_tokens == 2


def test_models_and_raw_responses(openai: Any, client: Any) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    raw = client.completions.with_raw_response.create(model=NAME, prompt="a", max_tokens=3, temperature=0)
    assert raw.status_code == 200 and raw.headers["content-type"].startswith("application/json")
    assert raw.parse().usage.completion_tokens <= 3
    with client.completions.with_streaming_response.create(model=NAME, prompt="a", max_tokens=3, stream=True) as stream:
        lines = [line for line in stream.iter_lines() if line]
    assert stream.headers["content-type"].startswith("text/event-stream")
    assert lines[-1] == "data: [DONE]" and all(json.loads(line[6:])["model"] == NAME for line in lines[:-1])


# The client of 2023, in an environment of its own

OLDEST = """
import json, sys
sys.path.append(sys.argv[1])
import openai

openai.api_key, openai.api_base, name = "none", sys.argv[2], sys.argv[3]
prompt = "Is this a dream?"
made = openai.Completion.create(engine=name, prompt=prompt, max_tokens=150, n=1, stop=None, temperature=0.7)
greedy = dict(prompt=prompt, max_tokens=20, temperature=0, logprobs=2)
whole = openai.Completion.create(engine=name, **greedy)
model = openai.Completion.create(model=name, **greedy)
parts = [part["choices"][0] for part in openai.Completion.create(engine=name, stream=True, **greedy)]
said = dict(model=name, messages=[{"role": "user", "content": "hi"}], max_tokens=20, temperature=0)
chat = openai.ChatCompletion.create(**said)
deltas = [part["choices"][0] for part in openai.ChatCompletion.create(stream=True, **said)]
try:
    openai.Completion.create(engine=name, prompt=prompt, temperature=-1)
except openai.error.InvalidRequestError as error:
    refused = [error.http_status, error.param]
try:
    openai.Completion.create(engine="davinci", prompt=prompt)
except openai.error.InvalidRequestError as error:
    unknown = error.http_status
print(json.dumps(dict(
    version=openai.version.VERSION,
    reason=made["choices"][0]["finish_reason"],
    text=made.choices[0].text.strip(),
    tokens=made["usage"]["completion_tokens"],
    greedy=whole["choices"][0],
    model=model["choices"][0],
    streamed="".join(part["text"] for part in parts),
    streamed_reason=parts[-1]["finish_reason"],
    chat=chat["choices"][0]["message"],
    deltas="".join(part["delta"].get("content", "") for part in deltas),
    models=[model["id"] for model in openai.Model.list()["data"]],
    refused=refused,
    unknown=unknown,
)))
"""


@pytest.fixture(scope="module")
def oldest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with openai 0.28 and what it needs."""
    folder = tmp_path_factory.mktemp("oldest")
    words = [sys.executable, "-m", "pip", "install", "-q", "--no-cache-dir", "--target", folder, "openai==0.28"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"pip cannot install openai 0.28: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    return folder


@pytest.mark.slow
def test_code_for_the_first_client_runs_unchanged(oldest: Path, served: "Served", client: Any) -> None:
    words = [sys.executable, "-I", "-S", "-c", OLDEST, oldest, f"{served.url}/v1", NAME]  # no package but that folder's
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["version"] == "0.28.0" and found["reason"] in ("stop", "length") and found["tokens"] <= T - 16
    whole = client.completions.create(model=NAME, prompt="Is this a dream?", max_tokens=20, temperature=0, logprobs=2)
    assert found["greedy"] == found["model"] == whole.choices[0].model_dump(exclude_unset=True)
    assert (found["streamed"], found["streamed_reason"]) == (whole.choices[0].text, whole.choices[0].finish_reason)
    assert found["chat"]["content"] == found["deltas"] and found["chat"]["role"] == "assistant"
    assert found["models"] == [NAME] and found["refused"] == [400, "temperature"] and found["unknown"] == 404


# lm-evaluation-harness


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A cloze test, sums and whole texts of a few lines, as the harness loads them."""
    pytest.importorskip("lm_eval.models.api_models", reason="needs the eval extra")
    pytest.importorskip("tenacity", reason="needs the eval extra")
    from gptjax.evaluate.harness import load_tasks

    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    words = ("alpha", "bravo", "delta", "gamma", "omega", "sigma")
    lines = [" = Greek = \n"]
    for i in range(24):
        lines += [f" {' '.join(rng.choice(words, 9))} . \n", f" = Letter {i} = \n"][: 1 + (i % 6 == 5)]
    (folder / "wikitext.txt").write_text("\n".join(lines))
    sums = [{"question": f"{i} and 1?", "answer": f"It is {i}+1.\n#### {i + 1}"} for i in range(14)]
    (folder / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    loaded = load_tasks(["local_cloze", "local_gsm8k", "local_wikitext"], str(folder), 0)
    how = {"until": ["Question:", "q"], "do_sample": False, "max_gen_toks": 24}
    loaded["tasks"]["local_gsm8k"].set_config("generation_kwargs", how)
    return loaded


def only(tasks: Any, *names: str) -> Any:
    return tasks | {"tasks": {name: tasks["tasks"][name] for name in names}}


def scored(model: Any, tasks: Any, **how: Any) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """(metrics of each task, what the model said to each of its questions)"""
    from lm_eval.evaluator import evaluate

    found = evaluate(model, tasks, bootstrap_iters=0, log_samples=True, **how)
    said = {name: [sample["resps"] for sample in samples] for name, samples in found["samples"].items()}
    plain = {name: {k: v for k, v in row.items() if "stderr" not in k} for name, row in found["results"].items()}
    return plain, said


@pytest.fixture(scope="module")
def in_process(local: api.Model, tasks: Any) -> Any:
    from gptjax.evaluate.adapter import EngineLM

    return scored(EngineLM(local), tasks)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["remote tokenizer", "ids", "text", "ids at once"])
def test_the_harness_scores_over_http_as_in_process(
    kind: str, served: "Served", small_run: Path, local: api.Model, tasks: Any, in_process: Any, tmp_path: Path,
) -> None:  # fmt: skip
    """Log-probabilities to 1e-3, and the same replies."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    eot = local.tokenizer.eot
    how: dict[str, Any] = {"tokenizer_backend": "remote", "custom_prefix_token_id": eot}
    if kind != "remote tokenizer":
        pytest.importorskip("transformers", reason="the harness reads a tokenizer with it")
        write_tokenizer(local.tokenizer, tmp_path, local.tokenizer.vocab_size, T)
        how = {"tokenizer_backend": "huggingface", "tokenizer": str(tmp_path), "tokenized_requests": kind != "text"}
    if kind == "ids at once":
        how |= {"num_concurrent": 4}
    peer = LocalCompletionsAPI(base_url=f"{served.url}/v1/completions", model=NAME, max_length=T, **how)
    results, said = scored(peer, only(tasks, "local_cloze", "local_gsm8k"))
    expected, known = in_process
    assert results["local_cloze"]["acc,none"] == expected["local_cloze"]["acc,none"]
    assert results["local_gsm8k"] == expected["local_gsm8k"] | {"alias": results["local_gsm8k"]["alias"]}
    assert said["local_gsm8k"] == known["local_gsm8k"] and len({str(reply) for reply in said["local_gsm8k"]}) > 3
    ours, theirs = (np.array([[value[0][0] for value in one] for one in each["local_cloze"]]) for each in (said, known))
    assert ours.shape == theirs.shape == (len(ours), 4) and len(ours) > 15 and np.ptp(theirs) > 1
    np.testing.assert_allclose(ours.astype(float), theirs.astype(float), atol=1e-3)
    assert [[v[0][1] for v in one] for one in said["local_cloze"]] == [
        [v[0][1] for v in one] for one in known["local_cloze"]
    ]


@pytest.mark.slow
def test_whole_texts_are_worth_the_same_over_http(
    served: "Served", local: api.Model, tasks: Any, in_process: Any
) -> None:
    """In the harness's windows, which hold two tokens less over HTTP: it keeps room for one that is drawn."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from gptjax.evaluate.adapter import EngineLM

    how = {"tokenizer_backend": "remote", "custom_prefix_token_id": local.tokenizer.eot, "max_length": T}
    peer = LocalCompletionsAPI(base_url=f"{served.url}/v1/completions", model=NAME, **how)
    texts = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(["short é", "x" * 100])]
    ours = EngineLM(local).loglikelihood_rolling(texts, disable_tqdm=True)
    np.testing.assert_allclose(peer.loglikelihood_rolling(texts, disable_tqdm=True), ours, atol=1e-3)


@pytest.mark.slow
def test_the_harness_chats_over_http_as_in_process(served: "Served", local: api.Model, tasks: Any) -> None:
    from lm_eval.models.openai_completions import LocalChatCompletion

    peer = LocalChatCompletion(base_url=f"{served.url}/v1/chat/completions", model=NAME, max_length=T)
    chats = only(tasks, "local_gsm8k")
    results, said = scored(peer, chats, apply_chat_template=True)
    docs = [*chats["tasks"]["local_gsm8k"].eval_docs]
    prompts = [f"Question: {doc['question']}\nAnswer:" for doc in docs]
    how = {"max_tokens": 24, "temperature": 0, "stop": ["Question:", "q"]}
    expected = local.generate([local.prompt(text) for text in prompts], **how)
    assert [reply[0][0] for reply in said["local_gsm8k"]] == expected and len(set(expected)) > 1
    assert "exact_match,none" in results["local_gsm8k"]


# schemathesis


@pytest.mark.slow
def test_schemathesis_finds_nothing(served: "Served", tmp_path: Path) -> None:
    """All its checks but one: a schema cannot say how many tokens a text has, nor what a context holds, so that it may
    allow what is rightly refused."""
    pytest.importorskip("schemathesis", reason="needs the test extra")
    (tmp_path / "schemathesis.toml").write_text(f'[parameters]\n"path.name" = "{NAME}"\n"path.engine" = "{NAME}"\n')
    words = [Path(sys.executable).with_name("schemathesis"), "run", f"{served.url}/openapi.json", "--checks", "all"]
    words += ["--exclude-checks", "positive_data_acceptance", "--max-examples", "5", "--seed", "1", "--no-shrink"]
    words += ["--generation-database", "none", "--phases", "coverage,fuzzing", "--no-color"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-1000:]
    with urlopen(f"{served.url}/openapi.json") as answer:
        routes = json.load(answer)["paths"]
    assert f"Tested: {sum(map(len, routes.values()))}" in done.stdout, done.stdout
