"""What nobody should send to a server: each gets its proper status, and nobody else notices. Run: pytest
tests/test_serve_hostile.py"""

import asyncio
import http.client
import json
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptjax.bench.client import Answer

if TYPE_CHECKING:
    from served import Served

NAME, T = "small", 192
PROBE = {"prompt": "probe", "max_tokens": 16, "seed": 5, "temperature": 1.1, "logprobs": 1}
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
NEVER = (422, 500, 501, 502, 503, 504)
Result = TypeVar("Result")


@pytest.fixture(scope="module")
def known(served: "Served") -> Any:
    """What the server answers to the probe when nobody else asks."""
    return told(asyncio.run(served.post(COMPLETIONS, PROBE)))


def told(answer: Answer) -> Any:
    """The text, its tokens and why it ended."""
    assert answer.status == 200, answer
    (choice,) = answer.json["choices"]
    return choice["text"], choice["logprobs"]["tokens"], choice["finish_reason"]


async def patient(served: "Served") -> Answer:
    """The answer to the probe for a client that comes again when it is told to, as OpenAI's does: on a busy machine
    replies to connections that broke are still under way."""
    for _ in range(9):
        answer = await served.post(COMPLETIONS, PROBE)
        if answer.status != 429:
            break
        await asyncio.sleep(float(answer.headers["retry-after"]))
    return answer


Beside = Callable[[Awaitable[Result]], Result]


@pytest.fixture
def beside(served: "Served", known: Any) -> Beside:
    """Runs something, and asks the probe beside it until it is over, and once more."""

    def run(work: Awaitable[Result]) -> Result:
        async def both() -> Result:
            going, last = asyncio.ensure_future(work), False
            while not last:
                last = going.done()
                assert told(await patient(served)) == known
            return await going

        return asyncio.run(both())

    return run


def proper(answer: Answer, *statuses: int) -> None:
    """It has one of these statuses, and OpenAI's error where it is none of success."""
    assert answer.status in statuses, (answer.status, answer.body[:300])
    if answer.status >= 400 and answer.headers.get("content-type", "").startswith("application/json"):
        error = answer.json["error"]
        assert error.keys() == {"message", "type", "param", "code"} and error["message"].isprintable()


# Bodies


FIELDS = (
    *("model", "prompt", "suffix", "max_tokens", "temperature", "top_p", "n", "stream", "logprobs", "echo", "stop"),
    *("presence_penalty", "frequency_penalty", "best_of", "logit_bias", "user", "seed", "stream_options", "messages"),
    *("max_completion_tokens", "top_logprobs", "tools", "tool_choice", "response_format", "top_k", "min_p", "tokens"),
    *("repetition_penalty", "add_special_tokens", "role", "content", "name", "store", "metadata"),
)
ODD = st.sampled_from(("", " ", "\0", "\ud800", "<|end|>", "a" * 200, "\u202e", "NaN", 2**63, -(2**63) - 1, 10**400))
LEAVES = st.none() | st.booleans() | st.integers(-3, 40) | st.floats() | st.text(max_size=6) | ODD
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4)
)
GOOD: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "ab", "max_tokens": 2},
    "/v1/engines/small/completions": {"prompt": [97], "max_tokens": 2},
    CHAT: {"messages": [{"role": "user", "content": "ab"}], "max_tokens": 2},
    "/tokenize": {"prompt": "ab"},
    "/detokenize": {"tokens": [97, 98]},
}


@st.composite
def bodies(draw: Any) -> tuple[str, bytes]:
    """(route, JSON): anything, a good one with something odd in it, or one with bytes changed."""
    path = draw(st.sampled_from(sorted(GOOD)))
    kind = draw(st.integers(0, 3))
    if kind == 0:
        return path, json.dumps(draw(VALUES)).encode()
    odd = draw(st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=3))
    data = json.dumps(GOOD[path] | odd).encode()
    if kind == 1:
        at, more = draw(st.integers(0, len(data))), draw(st.binary(max_size=6))
        return path, data[:at] + more + data[at + draw(st.integers(0, 6)) :]
    return path, data


@settings(max_examples=200, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(bodies())
def test_whatever_the_json_is(served: "Served", asked: tuple[str, bytes]) -> None:
    connection = http.client.HTTPConnection(served.host, served.port, timeout=60)
    connection.request("POST", asked[0], asked[1], {"Content-Type": "application/json"})
    response = connection.getresponse()
    body = response.read()
    connection.close()
    assert response.status in (200, 400, 404), (response.status, body)
    if response.status != 200:
        error = json.loads(body)["error"]
        assert error.keys() == {"message", "type", "param", "code"} and error["message"].isascii()


def test_what_no_json_is(served: "Served", beside: Beside) -> None:
    deep = 100_000
    wrong = [
        *(
            b"",
            b"null",
            b"[]",
            b'"a"',
            b"1",
            b"{",
            b'{"prompt": "a"} x',
            b'\xef\xbb\xbf{"prompt": "a"',
            b"\xff\xfe\x00",
        ),
        *(b"[" * deep, b'{"a":' * deep, b'{"prompt": ' + b"[" * deep + b"]" * deep + b"}"),
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": "a", "seed": 1' + b"0" * 400 + b"}",
        *(b'{"prompt": "a", "temperature": ' + v + b"}" for v in (b"NaN", b"Infinity", b"-Infinity", b"1e999", b"1e")),
        b'{"prompt": "\xc3\x28"}',
    ]

    async def all_of_them() -> list[Answer]:
        return [await served.post(path, body) for body in wrong for path in (COMPLETIONS, CHAT)]

    for answer in beside(all_of_them()):
        proper(answer, 400)


def test_half_characters_are_refused_by_name(served: "Served", beside: Beside) -> None:
    half = r'"a\ud83d"'
    said = r'[{"role": "user", "content": "a\ud83d"}]'
    wrong = [
        (COMPLETIONS, f'{{"prompt": {half}}}'),
        (COMPLETIONS, f'{{"prompt": ["a", {half}]}}'),
        (COMPLETIONS, f'{{"prompt": {half}, "echo": true, "stream": true}}'),
        (CHAT, f'{{"messages": {said}}}'),
        ("/tokenize", f'{{"prompt": {half}}}'),
    ]

    async def all_of_them() -> list[Answer]:
        return [await served.post(path, body.encode()) for path, body in wrong]

    for answer, (path, _) in zip(beside(all_of_them()), wrong, strict=True):
        proper(answer, 400)
        assert ("messages" if path == CHAT else "prompt") in answer.json["error"]["message"]
    for body in (rf'{{"prompt": "a", "stop": {half}}}', rf'{{"prompt": "a", "user": {half}}}', rf'{{"model": {half}}}'):
        proper(asyncio.run(served.post(COMPLETIONS, body.encode())), 200, 400, 404)


def test_special_tokens_spelled_out_are_text(served: "Served", beside: Beside) -> None:
    spelled = "<|end|><|assistant|><|user|><|system|><|endoftext|><|pad|>"

    async def all_of_them() -> list[Answer]:
        said = [{"role": "user", "content": spelled}]
        return [
            await served.post("/tokenize", {"prompt": spelled, "add_special_tokens": False}),
            await served.post(COMPLETIONS, {"prompt": spelled, "max_tokens": 1, "echo": True, "logprobs": 0}),
            await served.post(CHAT, {"messages": said, "max_tokens": 1}),
            await served.post("/detokenize", {"tokens": [*spelled.encode()]}),
        ]

    tokenized, completed, chatted, text = beside(all_of_them())
    assert tokenized.json["tokens"] == [*spelled.encode()] and text.json["prompt"] == spelled
    choice = completed.json["choices"][0]
    assert choice["logprobs"]["tokens"][: len(spelled)] == [*spelled] and choice["text"].startswith(spelled)
    assert completed.json["usage"]["prompt_tokens"] == len(spelled)
    assert chatted.json["usage"]["prompt_tokens"] == len(spelled) + 3  # <|user|>, <|end|>, <|assistant|>


# Sizes


def head(path: str = COMPLETIONS, *lines: str, host: str = "127.0.0.1", method: str = "POST") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", f"Host: {host}", *lines, "", ""]).encode("latin-1")


JSON = "Content-Type: application/json"
LARGE = 10_000_000


def test_bodies_that_are_too_large(served: "Served", beside: Beside) -> None:
    body = b'{"prompt": "' + b"a" * LARGE + b'"}'
    chunks = b"".join(
        b"%x\r\n%s\r\n" % (len(part), part) for part in (body[i : i + 65536] for i in range(0, LARGE, 65536))
    )

    size = f"Content-Length: {len(body)}"

    async def all_of_them() -> list[Answer]:
        return [
            await served.ask(head(COMPLETIONS, JSON, size, "Connection: close")),  # the answer waits for no body
            await served.ask(head(COMPLETIONS, JSON, "Transfer-Encoding: chunked", "Connection: close") + chunks),
            await served.post(COMPLETIONS, body),
            await served.post("/tokenize", body),
        ]

    said, *sent = beside(all_of_them())
    proper(said, 413)
    for answer in sent:
        proper(answer, 413, 0)  # it may hang up on who goes on sending
    long = beside(served.post(COMPLETIONS, {"prompt": "a" * 1_500_000}))
    proper(long, 400)
    many = beside(served.post(COMPLETIONS, {"prompt": [[97]] * 100_000, "max_tokens": 1}))
    proper(many, 400)


def test_lengths_that_lie(served: "Served", beside: Beside) -> None:
    body = b'{"prompt": "a", "max_tokens": 1}'
    wrong = [
        head(COMPLETIONS, JSON, "Content-Length: -1") + body,
        head(COMPLETIONS, JSON, "Content-Length: x") + body,
        head(COMPLETIONS, JSON, "Content-Length: 5", f"Content-Length: {len(body)}") + body,
        head(COMPLETIONS, JSON, "Content-Length: 99999999999999999999999") + body,
        head(COMPLETIONS, JSON, "Transfer-Encoding: chunked") + b"zz\r\n" + body,
        head(COMPLETIONS, JSON, "Transfer-Encoding: chunked") + b"fffffffffffffffff\r\n" + body,
        head(COMPLETIONS, JSON, "Transfer-Encoding: gzip") + body,
        head(COMPLETIONS, JSON, "Content-Length: 5", "Connection: close") + body,
    ]

    async def all_of_them() -> list[Answer]:
        return [await served.ask(request, within=5) for request in wrong]

    for answer in beside(all_of_them()):
        proper(answer, 400, 413, 501, 0)


def test_floods_of_headers(served: "Served", beside: Beside) -> None:
    async def endless() -> Answer:
        return await served.ask(b"GET /health HTTP/1.1\r\nX: " + b"a" * 5_000_000, within=20)

    async def all_of_them() -> list[Answer]:
        many = [f"X-{i}: {i}" for i in range(20_000)]
        return [
            await served.ask(head("/health", "X: " + "a" * 1_000_000, method="GET"), within=20),
            await served.ask(head("/health", *many, method="GET"), within=20),
            await served.ask(head("/" + "a" * 1_000_000, method="GET"), within=20),
            await endless(),
        ]

    for answer in beside(all_of_them()):
        proper(answer, 400, 404, 413, 414, 431, 0)


# Paths, methods and sites


def test_tricks_with_paths(served: "Served", beside: Beside) -> None:
    paths = [
        *(
            "/../../etc/passwd",
            "/%2e%2e/%2e%2e/etc/passwd",
            "//etc/passwd",
            "/v1/../../etc/passwd",
            "/static/../app.py",
        ),
        *("/v1/models/..%2f..%2fetc%2fpasswd", "/v1/models/%00", "/v1/engines/..%2f..%2f/completions", "/%", "/%ff%fe"),
        *(
            "/v1/models/small/..",
            "/.git/config",
            "/v1/completions/",
            "/V1/completions",
            "/v1/models?x=%00",
            "/?" + "a" * 999,
        ),
        *("http://127.0.0.1/etc/passwd", "/docs", "/redoc", "/v1/models/" + "%41" * 500),
    ]

    async def all_of_them() -> list[Answer]:
        return [await served.ask(head(path, "Connection: close", method="GET")) for path in paths]

    for path, answer in zip(paths, beside(all_of_them()), strict=True):
        assert b"root:" not in answer.body and b"repositoryformatversion" not in answer.body
        proper(answer, *((200,) if path.startswith(("/v1/models?", "/?")) else (400, 404, 405, 307)), 404)
    for method in ("TRACE", "PUT", "DELETE", "PATCH", "CONNECT", "get", "X" * 1000):
        proper(beside(served.ask(head(COMPLETIONS, "Connection: close", method=method))), 400, 404, 405)
    proper(beside(served.ask(head("*", "Connection: close", method="OPTIONS"))), 400, 404, 405)


def test_other_sites_get_nothing(served: "Served", beside: Beside) -> None:
    """CORS is closed: no page of another site may read an answer, have a preflight pass, ask without one, or reach the
    server by a name of its own that it points here (DNS rebinding)."""
    body = b'{"prompt": "a", "max_tokens": 1}'
    foreign, size = "Origin: https://evil.example", f"Content-Length: {len(body)}"
    close, own = "Connection: close", f"{served.host}:{served.port}"
    ask = ("Access-Control-Request-Method: POST", "Access-Control-Request-Headers: content-type")
    asked = [
        head(COMPLETIONS, foreign, *ask, close, host=own, method="OPTIONS"),
        head(COMPLETIONS, foreign, "Content-Type: text/plain", size, close, host=own) + body,
        head(COMPLETIONS, foreign, size, close, host=own) + body,
        head(COMPLETIONS, "Origin: null", "Content-Type: text/plain", size, close, host=own) + body,
        head(COMPLETIONS, foreign, JSON, size, close, host=own) + body,
        head(COMPLETIONS, JSON, size, close, host="evil.example") + body,
        head(COMPLETIONS, JSON, size, close, host=f"evil.example:{served.port}") + body,
        head("/", close, host="evil.example", method="GET"),
        head("/v1/models", foreign, close, host=own, method="GET"),
    ]

    async def all_of_them() -> list[Answer]:
        return [await served.ask(request) for request in asked]

    *refused, models = beside(all_of_them())
    assert not any(name.startswith("access-control") for answer in [*refused, models] for name in answer.headers)
    for answer in refused:
        proper(answer, 400, 403, 404, 405, 415, 421)
    for host in (own, f"localhost:{served.port}"):
        mine = head(COMPLETIONS, f"Origin: http://{host}", JSON, size, close, host=host) + body
        proper(beside(served.ask(mine)), 200)


# Keys, and time


@pytest.fixture(scope="module")
def strict(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple["Served", str]]:
    """A server that wants a key and has little patience, and the key."""
    pytest.importorskip("uvicorn", reason="needs the serve extra")
    from served import serving

    from gptjax.serve.keys import new_key

    key, line = new_key("tester")
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"{line}\n")
    with serving(small_run, "--api-key-file", str(file), "--idle-timeout", "1") as found:
        yield found, key


def test_wrong_keys(strict: tuple["Served", str]) -> None:
    served, key = strict
    openai = pytest.importorskip("openai", reason="needs the test extra")
    data = json.dumps(PROBE).encode()
    size = f"Content-Length: {len(data)}"

    def answered(*lines: str) -> Answer:
        return asyncio.run(served.ask(head(COMPLETIONS, JSON, size, "Connection: close", *lines) + data))

    wrong = ["", "Bearer", "Bearer ", f"Basic {key}", f"Bearer {key}x", f"Bearer {key[:-1]}", f"Bearer {key.upper()}"]
    wrong += [f"bearer{key}", key, "Bearer " + "a" * 20_000, "Bearer \xff\xfe", f"Bearer {key} {key}", "Bearer *"]
    for value in wrong:
        answer = answered(f"Authorization: {value}")
        proper(answer, 401)
        assert key not in answer.body.decode() and answer.headers["www-authenticate"] == "Bearer"
    proper(answered(f"X-Api-Key: {key}"), 401)
    proper(answered(f"Authorization: Bearer {key}"), 200)
    for path in ("/v1/models", "/tokenizer_info", "/V1/models/../models", "//v1/models"):
        proper(asyncio.run(served.get(path)), 401)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="sk-no", max_retries=0).models.list()
    mine = openai.OpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=0)
    assert [model.id for model in mine.models.list()] == [NAME]


def test_a_body_that_never_ends_is_given_up(strict: tuple["Served", str]) -> None:
    """Whether it stops, or drips."""
    served, key = strict
    start = head(COMPLETIONS, JSON, "Content-Length: 1000", f"Authorization: Bearer {key}") + b'{"prompt": "a'

    async def dripping() -> bytes:
        reader, writer = await asyncio.open_connection(served.host, served.port)
        writer.write(start)
        while not reader.at_eof() and not reader._buffer:  # type: ignore[attr-defined]
            writer.write(b"a")
            await asyncio.sleep(0.05)
        answer = await reader.read()
        writer.close()
        return answer

    for work in (served.ask(start), served.ask(start[:30]), asyncio.wait_for(dripping(), 30)):
        answer = asyncio.run(awaited(work))
        assert (answer if isinstance(answer, bytes) else b"%d" % answer.status)[:12] in (b"408", b"HTTP/1.1 408")


async def awaited(work: Awaitable[Result]) -> Result:
    return await work


# Connections


def test_requests_in_a_row_on_one_connection(served: "Served", beside: Beside) -> None:
    one = b'{"prompt": "a", "max_tokens": 3, "seed": 1}'
    request = head(COMPLETIONS, JSON, f"Content-Length: {len(one)}") + one
    last = head("/health", "Connection: close", method="GET")
    made = beside(served.ask(request + head("/nowhere", method="GET") + request + last))
    answers = made.body.count(b'"text_completion"')
    assert made.status == 200 and answers == 2 and made.body.count(b"HTTP/1.1 404") == 1
    assert made.body.index(b"HTTP/1.1 404") < made.body.rindex(b'"text_completion"')


def test_the_connection_breaks_at_every_moment(served: "Served", beside: Beside) -> None:
    """Of the request, and of the answer; nothing stays behind."""
    bodies = [
        {"prompt": "a", "max_tokens": 100, "stream": True, "logit_bias": {"256": -100, "264": -100}},
        {"prompt": ["a", "b"], "n": 2, "max_tokens": 100},
        {"prompt": "a" * 100, "echo": True, "logprobs": 2, "stream": True},
    ]
    requests = [served.posted(COMPLETIONS, body) for body in bodies]

    async def all_of_them() -> None:
        for request in requests:
            for sent in range(0, len(request), 17):
                await served.ask(request[:sent], within=0.002)
            for size in (1, 20, 100, 200, 400, 1000, 3000):
                await served.ask(request, leave_after=size)
            for seconds in (0.001, 0.003, 0.01, 0.03):
                await served.ask(request, within=seconds)

    beside(all_of_them())
    assert_idle(served)


def assert_idle(served: "Served", seconds: float = 10) -> None:
    """Nothing is in progress and nothing waits, soon."""
    end = time.monotonic() + seconds
    while any(left := asyncio.run(served.in_progress()).values()):
        assert time.monotonic() < end, left
        time.sleep(0.02)


def test_those_who_wait_make_nobody_wait(served: "Served", beside: Beside) -> None:
    """Connections that say nothing, that say a letter now and then, and that do not read."""
    request = head(COMPLETIONS, JSON, "Content-Length: 40") + b'{"prompt": "a"'
    loud = served.posted(COMPLETIONS, {"prompt": "a", "max_tokens": 100, "stream": True, "logprobs": 5})
    sockets = [socket.create_connection((served.host, served.port)) for _ in range(100)]
    try:
        for each in sockets[:20]:
            each.sendall(loud[:-1])
        for each in sockets[20:40]:
            each.sendall(request)
        for letter in map(bytes, zip(request[:12], strict=True)):
            for each in sockets[40:80]:
                each.sendall(letter)
            beside(asyncio.sleep(0))
    finally:
        for each in sockets:
            each.close()
    assert_idle(served)
