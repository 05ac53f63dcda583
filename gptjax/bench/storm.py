"""A server under load: what it answers wrongly, what it does not give back, and how its memory goes.

Each stream asks one thing after another, drawn by chance: most want a reply and read it whole, some break off in the
middle, some read slowly, some ask what cannot be answered. Probes are seeded requests whose answers the idle server
gave before; theirs must be the same.
"""

import asyncio
import math
import os
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.bench.client import Answer, Server
from gptjax.bench.measure import percentiles
from gptjax.errors import UserError

Row = dict[str, Any]
SHARES = {"whole": 50, "left": 20, "slow": 10, "probe": 10, "malformed": 5, "large": 5}
"""Of a hundred requests."""
PROBES = 8
SETTLING = 100
"""Tenths of a second in which everything must have ended."""
LARGE = 4_000_000
"""Bytes of a body that no server takes."""
TIMES = ("first_s_p50", "first_s_p99", "each_s_p50", "each_s_p99")
SHOWN = 20
"""Wrong answers that are kept word for word."""
MALFORMED: tuple[tuple[str, bytes, int], ...] = (
    ("/v1/completions", b'{"prompt": "a", ', 400),
    ("/v1/completions", b"\xff\xfe", 400),
    ("/v1/completions", b"[" * 5000, 400),
    ("/v1/completions", b'{"prompt": "a", "temperature": NaN}', 400),
    ("/v1/completions", b'{"prompt": "a", "max_tokens": -1}', 400),
    ("/v1/completions", b'{"prompt": "a", "no_such_field": 1}', 400),
    ("/v1/completions", b'{"prompt": "a", "model": "no such model"}', 404),
    ("/v1/nowhere", b"{}", 404),
)
"""(path, body, the status that it must have)"""


@dataclass
class Storm:
    """So many streams at a server, whose process is `pid`. Prompts are of these `ids`, and of `prompt` tokens; replies
    have at most `tokens`."""

    server: Server
    pid: int
    ids: Sequence[int]
    streams: int
    prompt: int
    tokens: int
    counts: Counter[str] = field(default_factory=Counter)
    """What was asked and how it went."""
    wrong: list[str] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    each_s: list[float] = field(default_factory=list)
    known: list[str] = field(default_factory=list)

    async def run(self, seconds: float, seed: int) -> Row:
        """Answers, times and memory of so many seconds. Raises UserError where memory cannot be read."""
        resident(self.pid)
        self.known = [await self._answer(number) for number in range(PROBES)]
        end = time.monotonic() + seconds
        samples: list[tuple[float, int]] = []
        sampler = asyncio.create_task(self._sample(samples))
        await asyncio.gather(*(self._stream(random.Random(f"{seed} {i}"), end) for i in range(self.streams)))
        sampler.cancel()
        left = await self._settled()
        for number in range(PROBES):
            self._judge("probe afterwards", await self._answer(number) == self.known[number], str(number))
        return {
            "seconds": seconds,
            "counts": dict(sorted(self.counts.items())),
            "wrong": self.wrong,
            "left_behind": left,
            "memory": memory(samples),
            **percentiles(first_s=self.first_s, each_s=self.each_s),
        }

    # One stream

    async def _stream(self, rng: random.Random, end: float) -> None:
        await asyncio.sleep(rng.random())
        while time.monotonic() < end:
            (kind,) = rng.choices(list(SHARES), [*SHARES.values()])
            try:
                await getattr(self, f"_{kind}")(rng)
            except (OSError, ValueError, LookupError) as error:  # TimeoutError is an OSError
                self._judge(kind, False, f"{type(error).__name__}: {error}")

    def _judge(self, kind: str, right: bool, what: str) -> None:
        self.counts[f"{kind}: {'right' if right else 'wrong'}"] += 1
        if not right and len(self.wrong) < SHOWN:
            self.wrong.append(f"{kind}: {what}"[:300])

    def _body(self, rng: random.Random) -> Row:
        return {
            "prompt": rng.choices(self.ids, k=self.prompt),
            "max_tokens": self.tokens,
            "seed": rng.randrange(2**31),
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    async def _whole(self, rng: random.Random) -> None:
        answer = await self.server.post("/v1/completions", self._body(rng))
        if self._is_stream("whole", answer):
            first, last = answer.arrivals[0][0], answer.arrivals[-1][0]
            self.first_s.append(first)
            self.each_s += [(last - first) / (answer.tokens - 1)] if answer.tokens > 1 else []

    async def _slow(self, rng: random.Random) -> None:
        answer = await self.server.post("/v1/completions", self._body(rng), pause=lambda: rng.random() / 3)
        self._is_stream("slow", answer)

    async def _left(self, rng: random.Random) -> None:
        """Breaks off after some bytes of the answer, after some time, or in the middle of what it asks."""
        request = self.server.posted("/v1/completions", self._body(rng) | {"n": rng.choice((1, 2))})
        sent = rng.choice((len(request), len(request), rng.randrange(len(request))))
        after = rng.randrange(1, 4000) if sent == len(request) and rng.random() < 0.5 else math.inf
        await self.server.ask(request[:sent], after, within=rng.random())
        self.counts["left"] += 1

    async def _malformed(self, rng: random.Random) -> None:
        path, body, status = rng.choice(MALFORMED)
        answer = await self.server.post(path, body)
        self._judge("malformed", answer.status == status, f"{body[:60]!r}: status {answer.status} for {status}")

    async def _large(self, rng: random.Random) -> None:
        if rng.random() < 0.5:
            answer = await self.server.post("/v1/completions", {"prompt": [self.ids[0]] * 20_000})
            self._judge("large", answer.status == 400, f"20,000 tokens: status {answer.status}")
        else:  # a server that has said no may have hung up before all was sent
            answer = await self.server.post("/v1/completions", b'{"prompt": "' + b"a" * LARGE + b'"}')
            self._judge("large", answer.status in (413, 0), f"{LARGE:,} bytes: status {answer.status}")

    async def _probe(self, rng: random.Random) -> None:
        number = rng.randrange(PROBES)
        text = await self._answer(number)
        self._judge("probe", text == self.known[number], f"{number}: {text!r} for {self.known[number]!r}")

    async def _answer(self, number: int) -> str:
        """To a seeded request, the same each time."""
        ids = random.Random(f"probe {number}").choices(self.ids, k=max(1, self.prompt // (1 + number % 3)))
        fixed = {"max_tokens": self.tokens, "temperature": 0.8, "seed": number}
        answer = await self.server.post("/v1/completions", fixed | {"prompt": ids, "stream": number % 2 == 0})
        return answer.text if answer.status == 200 else f"status {answer.status}: {answer.body[:200]!r}"

    def _is_stream(self, kind: str, answer: Answer) -> bool:
        if answer.status != 200:
            self._judge(kind, False, f"status {answer.status}: {answer.body[:200]!r}")
            return False
        finished = [event["choices"][0]["finish_reason"] for event in answer.events if event["choices"]][-1:]
        self._judge(kind, finished in (["stop"], ["length"]) and answer.tokens > 0, f"finish_reason {finished}")
        return True

    # What is left

    async def _sample(self, samples: list[tuple[float, int]]) -> None:
        """The server's memory once a second."""
        started = time.monotonic()
        while True:
            samples.append((time.monotonic() - started, resident(self.pid)))
            await asyncio.sleep(1)

    async def _settled(self) -> dict[str, float]:
        """What is still in progress once a while has passed in which nobody asked."""
        for _ in range(SETTLING):
            if not any((left := await self.server.in_progress()).values()):
                break
            await asyncio.sleep(0.1)
        return left


def resident(pid: int) -> int:
    """Bytes of memory that a process has. Raises UserError where nothing tells."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        raise UserError("--load: the memory of a process is read from /proc, which only Linux has") from None
    return pages * os.sysconf("SC_PAGE_SIZE")


def memory(samples: Sequence[tuple[float, int]]) -> Row:
    """Bytes at the beginning, in the middle and at the end, and by how many they grow a minute in either half: what
    gets warm grows in the first alone, what leaks in both."""
    half, table = len(samples) // 2, np.array(samples, float)
    slopes = [60 * float(np.polyfit(part[:, 0], part[:, 1], 1)[0]) for part in (table[:half], table[half:])]
    first, middle, last = (samples[i][1] for i in (0, half, -1))
    names = ("first_bytes", "middle_bytes", "last_bytes", "first_half_bytes_per_min", "second_half_bytes_per_min")
    return dict(zip(names, (first, middle, last, *slopes), strict=True)) | {"samples": [*samples]}


def told(result: Row) -> str:
    """What a storm found, in lines."""
    counts, room = result["counts"], result["memory"]
    mega = {name: value / 1e6 for name, value in room.items() if name != "samples"}
    times = {name: f"{1e3 * result[name]:,.1f} ms" if result[name] else "none" for name in TIMES}
    return "\n".join(
        [
            f"{result['seconds']} s: " + ", ".join(f"{what} {count:,}" for what, count in counts.items()),
            f"first token p50 {times['first_s_p50']}, p99 {times['first_s_p99']}; each token p50 "
            f"{times['each_s_p50']}, p99 {times['each_s_p99']}",
            "left behind: " + ", ".join(f"{name} {value:g}" for name, value in result["left_behind"].items()),
            f"memory: {mega['first_bytes']:.1f} MB, {mega['middle_bytes']:.1f} in the middle, {mega['last_bytes']:.1f} "
            f"at the end; {mega['first_half_bytes_per_min']:+.2f} MB a minute in the first half, "
            f"{mega['second_half_bytes_per_min']:+.2f} in the second",
            *(f"wrong: {line}" for line in result["wrong"]),
        ]
    )
