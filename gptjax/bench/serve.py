"""`gptjax bench serve PATH`: what HTTP costs beside the bare engine, and what the server loses under load.

The server and the engine are processes of their own, warm before they are timed; they take turns, so that a machine
whose speed drifts does so for both. Either has as many requests in progress as there are streams, until each stream has
had its share.
"""

import asyncio
import json
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from threading import Thread, Timer
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from gptjax.api import Model, load
from gptjax.bench.client import Answer, Server
from gptjax.bench.measure import percentiles, provenance, save
from gptjax.bench.storm import Storm, told
from gptjax.errors import UserError
from gptjax.files import json_text
from gptjax.infer.request import Reply

EACH = 4
"""Requests of a stream in one turn."""
NEVER = -100.0
"""Added to the logits of tokens that would end a reply, so that all are of one length."""
Row = dict[str, Any]
Prompts = list[list[int]]


@dataclass(frozen=True)
class Options:
    """How to measure; the fields of the command say what each is."""

    streams: int = 16
    prompt: int = 64
    tokens: int = 64
    slots: int = 16
    rounds: int = 5
    weights: str = "auto"
    seed: int = 0
    timeout: float = 600.0


def run(path: str, options: Options, seconds: int, out: Path) -> str:
    """Measure, or put under load for so many seconds; write OUT/serve.json or OUT/serve-load.json; the figures as
    text. Raises UserError where nothing can be measured, and for lengths that the context does not hold."""
    job = json.dumps({"path": path, "weights": options.weights, "slots": options.slots})
    with _started([sys.executable, "-m", "gptjax.bench.serve", job], "{", options.timeout) as (engine, line):
        about = json.loads(line)
        if options.prompt + options.tokens > about["context"]:
            fields = f"--prompt {options.prompt} --tokens {options.tokens}"
            raise UserError(f"{fields}: the context holds {about['context']} together")
        if not seconds:
            with _serving(path, options) as (_, server):
                found = asyncio.run(_turns(server, engine, about, options))
    if seconds:
        with _serving(path, options) as (process, server):
            storm = Storm(server, process.pid, about["ids"], options.streams, options.prompt, options.tokens)
            found = asyncio.run(storm.run(seconds, options.seed))
    result = {"benchmark": "serve", **about, "path": Path(path).name, "settings": asdict(options), **found}
    result.pop("ids")
    file = out / ("serve-load.json" if seconds else "serve.json")
    save(result, file)
    return f"{_title(result)}\n\n{told(result) if seconds else _table(result)}\n\n{file}"


def _title(result: Row) -> str:
    how, versions = result["settings"], ", ".join(f"{name} {v}" for name, v in result["versions"].items())
    return (
        f"{result['path']}: {result['parameters']:,} parameters in {result['dtype']}; {result['device']}, {versions}, "
        f"{result['date']}; {how['streams']} streams over loopback, prompts of {how['prompt']} tokens, replies of "
        f"{how['tokens']}, {how['slots']} slots; nothing compiles while it is timed"
    )


# Processes


@contextmanager
def _started(command: list[str], ready: str, timeout: float) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process, and the line by which it said that it is ready. Raises UserError where it does not within the time."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    late = Timer(timeout, process.kill)
    late.start()
    try:
        assert process.stdout
        line = next((line for line in process.stdout if line.startswith(ready)), "")
        late.cancel()
        if not line:
            raise UserError(f"bench serve: {' '.join(command[2:4])} ended with status {process.wait()}, never ready")
        yield process, line
    finally:
        late.cancel()
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()


@contextmanager
def _serving(path: str, options: Options) -> Iterator[tuple[subprocess.Popen[str], Server]]:
    """The server in a process of its own, warm, with room in its queue for every stream."""
    flags = {"port": 0, "slots": options.slots, "max-queue": options.streams, "weights": options.weights}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "gptjax", "serve", path, *words]
    with _started(command, "serving ", options.timeout) as (process, line):
        assert process.stdout
        Thread(target=process.stdout.read, daemon=True).start()  # else what it prints would fill the pipe
        place = urlsplit(line.split()[-1])
        yield process, Server(place.hostname or "", place.port or 0)


# In turns


async def _turns(server: Server, engine: subprocess.Popen[str], about: Row, options: Options) -> Row:
    rows: dict[str, list[Row]] = {"server": [], "engine": []}
    for turn in range(options.rounds + 1):  # in the first both get warm
        prompts = _prompts(about, options, turn)
        rows["server"].append(await _over_http(server, prompts, about, options))
        rows["engine"].append(_bare(engine, prompts, options))
    sides = {name: _summary(each[1:]) for name, each in rows.items()}
    rates = zip(*([row["tokens_per_s"] for row in each[1:]] for each in rows.values()), strict=True)
    return {"ratios": [http / bare for http, bare in rates], **sides}


def _prompts(about: Row, options: Options, turn: int) -> Prompts:
    """Token ids of all requests of a turn, of which no two begin alike."""
    rng = np.random.default_rng((options.seed, turn))
    found: Prompts = rng.choice(about["ids"], (options.streams * EACH, options.prompt)).tolist()
    return found


async def _over_http(server: Server, prompts: Prompts, about: Row, options: Options) -> Row:
    bias = {str(token): NEVER for token in about["ends"]}
    fixed = {"max_tokens": options.tokens, "temperature": 0, "logit_bias": bias, "stream": True}
    bodies = [fixed | {"prompt": prompt, "stream_options": {"include_usage": True}} for prompt in prompts]

    async def stream(number: int) -> list[Answer]:
        return [await server.post("/v1/completions", body) for body in bodies[number :: options.streams]]

    started = time.perf_counter()
    lanes = await asyncio.gather(*(stream(number) for number in range(options.streams)))
    seconds, answers = time.perf_counter() - started, [answer for lane in lanes for answer in lane]
    wrong = next((answer for answer in answers if answer.status != 200), None)
    if wrong:
        raise UserError(f"bench serve: status {wrong.status}: {wrong.body.decode(errors='replace')[:200]}")
    times = [(answer.arrivals[0][0], answer.arrivals[-1][0], answer.tokens) for answer in answers]
    return _row(seconds, times)


def _bare(engine: subprocess.Popen[str], prompts: Prompts, options: Options) -> Row:
    assert engine.stdin and engine.stdout
    engine.stdin.write(json.dumps({"prompts": prompts, "streams": options.streams, "tokens": options.tokens}) + "\n")
    engine.stdin.flush()
    row: Row = json.loads(engine.stdout.readline())
    return row


def _row(seconds: float, times: list[tuple[float, float, int]]) -> Row:
    """Of requests, each (seconds to the first token, to the last, tokens)."""
    tokens = sum(made for *_, made in times)
    return {
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "first_s": [first for first, *_ in times],
        "each_s": [(last - first) / (made - 1) for first, last, made in times if made > 1],
    }


def _summary(rows: list[Row]) -> Row:
    rates = [row["tokens_per_s"] for row in rows]
    times = {name: [value for row in rows for value in row[name]] for name in ("first_s", "each_s")}
    tokens = sum(row["tokens"] for row in rows)
    return {"tokens_per_s": median(rates), "rates": rates, "tokens": tokens, **percentiles(**times)}


def _table(result: Row) -> str:
    head = ["side", "tokens/s", "first token p50", "p99", "each token p50", "p99"]
    lines = [head, ["---"] * len(head)]
    for name in ("server", "engine"):
        row = result[name]
        times = [row[key] for key in ("first_s_p50", "first_s_p99", "each_s_p50", "each_s_p99")]
        shown = ["" if value is None else f"{1e3 * value:,.1f} ms" for value in times]
        lines.append([name, f"{row['tokens_per_s']:,.0f}", *shown])
    low, middle, high = np.percentile(result["ratios"], (0, 50, 100))
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{table}\n\nserver / engine: {middle:.3f} ({low:.3f} to {high:.3f} over {len(result['ratios'])} turns)"


# The bare engine


def _child() -> None:
    """One line of what it is; then for each line of prompts one of what it measured."""
    job = json.loads(sys.argv[1])
    try:
        model = load(job["path"], weights=job["weights"], slots=job["slots"])
    except UserError as error:
        sys.exit(f"error: {error}")
    print(json_text(_about(model)), flush=True)
    for line in sys.stdin:
        print(json_text(_measured(model, **json.loads(line))), flush=True)


def _about(model: Model) -> Row:
    import jax

    leaves = jax.tree.leaves(model.params)
    return {
        **provenance(),
        "dtype": str(model.stage.network.decoder.dtype),
        "parameters": sum(leaf.size for leaf in leaves),
        "context": model.context,
        "ids": np.flatnonzero(model.tokenizer.possible).tolist(),
        "ends": model.stage.ends,
    }


def _measured(model: Model, prompts: Prompts, streams: int, tokens: int) -> Row:
    engine, waiting, going, times = model.engine, deque(prompts), list[tuple[Reply, float]](), []
    bias = dict.fromkeys(model.stage.ends, NEVER)
    first: dict[int, float] = {}
    begun = time.perf_counter()
    while waiting or going:
        while waiting and len(going) < streams:
            request = model.request(waiting.popleft(), max_tokens=tokens, temperature=0.0, logit_bias=bias)
            going.append((engine.submit(request), time.perf_counter()))
        engine.step()
        now = time.perf_counter()
        for reply, since in going:
            if reply.tokens:
                first.setdefault(id(reply), now - since)
        times += [(first.pop(id(r)), now - since, len(r.tokens)) for r, since in going if r.reason]
        going = [(reply, since) for reply, since in going if not reply.reason]
    return _row(time.perf_counter() - begun, times)


if __name__ == "__main__":
    _child()
