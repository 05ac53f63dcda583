"""`gptjax bench corpus`: what it costs to clean a text, step by step, and how that and memory grow with the text.

Steps are measured in processor seconds of one process, which neighbours on the machine move little. The peer, a map of
datasets with a tokenizer of transformers, cleans nothing: it is what many do with a text at all.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.bench.measure import provenance, save
from gptjax.config.corpus import CorpusConfig, OriginConfig
from gptjax.corpus import clean, leaks, near, rules
from gptjax.corpus.block import Block
from gptjax.corpus.build import load_corpus, plan
from gptjax.corpus.language import foreign
from gptjax.corpus.repair import repaired
from gptjax.data.pool import cores

MB = 10**6
MOST = 20 * MB  # of text that steps are measured on
CHANGED = 0.3  # of the words of a copy: its sequences of five are a sixth of the text's, so that it is none
# A build in a process of its own, whose memory is then known: wall and processor seconds, and bytes at most.
BUILD = """
import json, re, resource, sys, time
from pathlib import Path
from gptjax.corpus.build import build
from gptjax.config.corpus import CorpusConfig
from pydantic import TypeAdapter
recipe = TypeAdapter(CorpusConfig).validate_json(Path(sys.argv[1]).read_text())
began = time.perf_counter()
spent = {}
def report(what, done, total):
    spent.setdefault(what, time.perf_counter() - began)
build(recipe, Path(sys.argv[2]), report, int(sys.argv[3]))
usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
cpu = sum(each.ru_utime + each.ru_stime for each in usage)
highest = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())  # ru_maxrss has that of who started it
print(json.dumps({
    "wall_s": time.perf_counter() - began, "cpu_s": cpu, "begins": spent,
    "memory": int(highest[1]) * 1024, "memory_worker": usage[1].ru_maxrss * 1024,
}))
"""


def run(recipe: str, sizes: Sequence[int], tokenizer: str, out: Path) -> str:
    """Measure, write OUT/corpus.json and OUT/corpus.png, return the tables as text. Raises what loading and building
    raise."""
    config = load_corpus(recipe)
    texts = _texts(config, max(sizes) * MB)
    builds: list[dict[str, Any]] = []
    result = {**provenance(), "recipe": recipe, "steps": _steps(config, texts), "peer": None, "builds": builds}
    if tokenizer:
        result["peer"] = _peer(texts, tokenizer)
    for size in sizes:
        for near_on in (False, True):
            builds.append(_build(config, texts, size, near_on))
            save(result, out / "corpus.json")  # at once: the next may take half an hour
    _draw(result, out / "corpus.png")
    return f"{table(result)}\n\n{out / 'corpus.json'}, {out / 'corpus.png'}"


def _texts(config: CorpusConfig, most: int) -> list[str]:
    """Documents of all origins, up to so many bytes."""
    texts, size = list[str](), 0
    for _, part in plan(config).parts:
        for blocks in part.documents(lambda size: None):
            texts.append("".join(blocks))
            size += len(texts[-1].encode())
            if size >= most:
                return texts
    return texts


def _steps(config: CorpusConfig, texts: Sequence[str]) -> dict[str, float]:
    """Bytes in a processor second of each step that the recipe has, and of those before near copies, and of all."""
    spent, size = dict[str, float](), 0

    def timed(name: str, step: Callable[[], Any]) -> Any:
        began = time.process_time()
        made = step()
        spent[name] = spent.get(name, 0.0) + time.process_time() - began
        return made

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if config.leaks.sources:
            leaks.write_index(folder, config.leaks)
        _through(
            ["What is read and compiled once, a cafÃ© or not, is no part of what a text costs."], config, folder, timed
        )
        spent.clear()
        for some in clean.blocks(_until(texts, MOST)):
            size += sum(len(text.encode()) for text in some)
            _through(some, config, folder, timed)
    found = {name: size / seconds for name, seconds in spent.items()}
    before = sum(seconds for name, seconds in spent.items() if name != "near copies")
    return found | {"all before near copies": size / before, "all": size / sum(spent.values())}


def _through(
    texts: Sequence[str], config: CorpusConfig, folder: Path, timed: Callable[[str, Callable[[], Any]], Any]
) -> None:
    """Every step that the recipe has, each on all of the texts."""
    block = Block(timed("repair", partial(_repaired, texts, config)))
    if config.language.keep:
        timed("language", partial(foreign, block.texts, config.language))
    timed("rules", partial(_ruled, block, config))
    if config.leaks.sources:
        timed("leaks", partial(leaks.leaks, block, folder, config.leaks))
    timed("exact copies", partial(clean.exact_keys, block))
    timed("near copies", partial(near.signatures, block, config.near))


def _repaired(texts: Sequence[str], config: CorpusConfig) -> list[str]:
    return [repaired(text, config.repair)[0] for text in texts]


def _ruled(block: Block, config: CorpusConfig) -> int:
    return sum(int(gone.sum()) for _, gone in rules.dropped(block, config.rules))


def _until(texts: Sequence[str], most: int) -> Iterator[str]:
    size = 0
    for text in texts:
        yield text
        size += len(text.encode())
        if size >= most:
            return


def _peer(texts: Sequence[str], folder: str) -> float:
    """Bytes in a processor second of datasets' map with a tokenizer of transformers."""
    from datasets import Dataset, disable_progress_bars  # type: ignore[import-not-found, import-untyped, unused-ignore]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    disable_progress_bars()  # type: ignore[no-untyped-call, unused-ignore]
    some = [*_until(texts, MOST)]
    rows = Dataset.from_dict({"text": some})
    began = time.process_time()
    rows.map(lambda batch: tokenizer(batch["text"]), batched=True, remove_columns=["text"], keep_in_memory=True)
    return sum(len(text.encode()) for text in some) / (time.process_time() - began)


def _build(config: CorpusConfig, texts: Sequence[str], megabytes: int, near_on: bool) -> dict[str, Any]:
    """A whole build of so much text, by all cores."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (folder / "text.jsonl").open("w") as file:
            for text in grown(texts, megabytes * MB):
                file.write(json.dumps({"text": text}) + "\n")
        origin = OriginConfig("text", str(folder / "text.jsonl"))
        made = replace(config, origins=(origin,), near=replace(config.near, on=near_on), quality=type(config.quality)())
        (folder / "recipe.json").write_text(_json(made))
        command = [sys.executable, "-c", BUILD, str(folder / "recipe.json"), str(folder / "out"), str(cores())]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    return {"bytes": megabytes * MB, "near": near_on, "processes": cores()} | json.loads(done.stdout)


def _json(config: CorpusConfig) -> str:
    from pydantic import TypeAdapter

    return TypeAdapter(CorpusConfig).dump_json(config).decode()


def grown(texts: Sequence[str], size: int) -> Iterator[str]:
    """Documents of so many bytes in all: the texts, then copies of them with other words, which are copies of none.
    Words of ASCII: one that is spelled in another encoding would be a reason to look closer at each copy."""
    drawn, made = random.Random(0), 0
    some = " ".join(texts[:: max(len(texts) // 2000, 1)]).split()
    words = np.array([word for word in some if word.isascii()], object)
    for again in range(1 << 30):
        for text in texts:
            if again:
                parts = np.array(text.split(" "), object)
                there = np.random.default_rng(drawn.getrandbits(32))
                other = there.random(len(parts)) < CHANGED
                parts[other] = words[there.integers(len(words), size=int(other.sum()))]
                text = " ".join(parts)
            yield text
            made += len(text.encode())
            if made >= size:
                return


def _draw(result: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for near_on, label in ((True, "all steps"), (False, "without near copies")):
        rows = [row for row in result["builds"] if row["near"] == near_on]
        size = [row["bytes"] / MB for row in rows]
        left.plot(size, [row["cpu_s"] for row in rows], "o-", label=label)
        right.plot(size, [row["memory"] / MB for row in rows], "o-", label=f"parent, {label}")
        right.plot(size, [row["memory_worker"] / MB for row in rows], "o--", label=f"a worker, {label}")
    left.set(xlabel="MB of text", ylabel="processor seconds", ylim=(0, None), title="Time of a build")
    right.set(xlabel="MB of text", ylabel="MB of memory at most", ylim=(0, None), title="Memory of a build")
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [f"{result['recipe']}, {result['date']}", "", "| step, on one core | MB/s |", "| --- | --- |"]
    lines += [f"| {name} | {rate / MB:,.1f} |" for name, rate in result["steps"].items()]
    if result["peer"]:
        lines.append(f"| datasets and transformers: ids alone | {result['peer'] / MB:,.1f} |")
    lines += ["", "| a build of | near copies | seconds | MB/s a core | parent, MB | a worker, MB |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for row in result["builds"]:
        lines.append(
            f"| {row['bytes'] / MB:,.0f} MB | {'yes' if row['near'] else 'no'} | {row['wall_s']:,.1f} | "
            f"{row['bytes'] / MB / row['cpu_s']:,.1f} | {row['memory'] / MB:,.0f} | {row['memory_worker'] / MB:,.0f} |"
        )
    return "\n".join(lines)
