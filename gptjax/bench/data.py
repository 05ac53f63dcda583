"""`gptjax bench data`: what reading, order, packing and threads cost beside turning the same text into ids, and how
fast a text is built.

Processor seconds of the whole process count, all its threads together, so that the figures are those of one core and
neighbours on the machine move them little. Both sides take turns.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from gptjax.bench.measure import provenance, save
from gptjax.config import Config, DataConfig
from gptjax.data.pool import cores
from gptjax.data.sources import TextSource, build
from gptjax.data.stream import TokenStream
from gptjax.data.tokenizers import Tokenizer
from gptjax.data.vocabulary import open_tokenizer

MOST_BYTES = 1 << 28  # of text
SECONDS = 2.0  # that a turn takes, about
NUM_MICRO = 8  # rows of a turn come in batches of so many micro-batches, as in training


def run(config: Config, tokenizers: list[str], rounds: int, out: Path) -> str:
    """Measure, write OUT/data.json, return the tables as text. Raises what building and loading raise."""
    rates = [_building(config.data, processes) for processes in sorted({1, cores()})]
    corpus = build(config.data)
    text = corpus.split(config.data.train_split, config.data.split_by)
    made = [open_tokenizer(replace(config.data, tokenizer=spec), corpus) for spec in tokenizers]
    rows = [_compare(config, text, each, spec, rounds) for each, spec in zip(made, tokenizers, strict=True)]
    result = {**provenance(), "source": config.data.source, "build": rates, "stream": rows}
    save(result, out / "data.json")
    return f"{table(result)}\n\n{out / 'data.json'}"


def _building(data: DataConfig, processes: int) -> dict[str, Any]:
    """How fast the text is built anew."""
    heard = [0]
    with tempfile.TemporaryDirectory() as folder:
        began, used = time.perf_counter(), os.times()
        build(replace(data, cache_dir=folder), lambda what, done, total: heard.append(done), processes)
        wall, cpu = time.perf_counter() - began, sum(os.times()[:4]) - sum(used[:4])  # of children, too
    return {"processes": processes, "bytes": heard[-1], "wall_s": wall, "cpu_s": cpu}


def _compare(config: Config, text: TextSource, tokenizer: Tokenizer, spec: str, rounds: int) -> dict[str, Any]:
    """Ids of whole records by the tokenizer alone, their text at hand, against rows of a stream of them."""
    data, micro, length = config.data, config.micro_batch_size, config.model.seq_len
    texts: list[str] = []
    size, tokens, began = 0, 0, time.process_time()
    while len(texts) < len(text) and size < MOST_BYTES and time.process_time() - began < SECONDS:
        texts.append(text[len(texts)].text)
        size += len(texts[-1].encode())
        tokens += len(tokenizer.encode(texts[-1]))
    some = replace(text, chosen=text.chosen[: len(texts)])
    stream = TokenStream(
        some, tokenizer, length, lanes=data.lanes, seed=data.seed, micro_batch=micro, threads=data.threads
    )
    batch = NUM_MICRO * micro * length
    batches, times = max(tokens // batch, 1), max(batch // tokens, 1)  # of a turn: all texts once, or a batch

    def encode() -> None:
        for _ in range(times):
            for each in texts:
                tokenizer.encode(each)

    def rows() -> None:
        for _ in range(batches):
            stream.batch(NUM_MICRO)

    again = max(round(SECONDS / max(_cpu(rows), 1e-3)), 1)
    turns = [(_cpu(encode, again) / (tokens * times), _cpu(rows, again) / (batches * batch)) for _ in range(rounds)]
    stream.close()
    encoded, packed = (statistics.median(column) for column in zip(*turns, strict=True))
    ratios = sorted(raw / made for raw, made in turns)
    return {
        "tokenizer": spec,
        "record_bytes": size / len(texts),
        "encode_bytes_s": size / tokens / encoded,
        "stream_bytes_s": size / tokens / packed,
        "ratio": statistics.median(ratios),
        "ratio_span": [ratios[0], ratios[-1]],
    }


def _cpu(action: Callable[[], None], times: int = 1) -> float:
    """Processor seconds of the process for each time."""
    began = time.process_time()
    for _ in range(times):
        action()
    return (time.process_time() - began) / times


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        f"{result['source']}, {result['date']}",
        "",
        "| tokenizer | bytes a record | ids of the text alone | rows of the stream | ratio (span) |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in result["stream"]:
        low, high = row["ratio_span"]
        lines.append(
            f"| {row['tokenizer']} | {row['record_bytes']:,.0f} | {row['encode_bytes_s'] / 1e6:,.1f} MB/s | "
            f"{row['stream_bytes_s'] / 1e6:,.1f} MB/s | {row['ratio']:.2f} ({low:.2f}-{high:.2f}) |"
        )
    lines += ["", "| building on | MB | seconds | MB/s | MB a processor second |", "| --- | --- | --- | --- | --- |"]
    for row in result["build"]:
        size = row["bytes"] / 1e6
        lines.append(
            f"| {row['processes']} process(es) | {size:,.0f} | {row['wall_s']:.1f} | {size / row['wall_s']:,.0f} | "
            f"{size / row['cpu_s']:,.0f} |"
        )
    return "\n".join(lines)
