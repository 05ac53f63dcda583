"""`gptjax bench layouts CONFIG`: the train step of a config on every layout of the attached devices, or on a single
device over batch, remat, scan and attention; measured beside what the planner predicts.

Every setting runs in a process of its own (see trial), one after another. This process leaves the devices to them.
"""

import difflib
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax

from gptjax.bench import trial
from gptjax.bench.compare import changes, open_result, require_same
from gptjax.bench.constants import constants
from gptjax.bench.layouts_report import change_lines, plot, progress, summary, table
from gptjax.bench.measure import figures, save
from gptjax.config import Config, LayoutConfig, validate
from gptjax.errors import UserError
from gptjax.hardware import peak_flops
from gptjax.planner.chips import Chip, Topology
from gptjax.planner.cost import estimate
from gptjax.planner.place import place
from gptjax.planner.search import layout_name, named, with_lanes
from gptjax.sharding.mesh import check, degrees


class Setting(NamedTuple):
    """One row: a config under a short name, or why it cannot run."""

    name: str
    config: Config
    refused: str = ""


@dataclass(frozen=True)
class Options:
    """How to measure."""

    layouts: str = "all"
    """Names with commas, as the table shows them, with or without their numbers; or all."""
    steps: int = 10
    """Measured steps of each setting."""
    timeout: float = 600.0
    """Seconds that a setting may take in all."""
    distributed: bool = False
    """One of several hosts that each run this command: their children join each other, and the first reports."""


def run(config: Config, options: Options, out: Path, compare: Path | None) -> tuple[str, bool]:
    """Measure, write OUT/layouts.json and OUT/layouts.png, and OUT/chip.json where plans know the chip; (the table as
    text, whether any setting is worse than in an earlier result to `compare` with).

    Raises UserError for names that there are not, and for an earlier result of something else.
    """
    jax.config.update("jax_platforms", "cpu")  # the planner asks for shapes; the children keep the devices
    earlier = None if compare is None else open_result(compare)
    facts = trial.facts_of_devices(config, options.timeout, options.distributed)
    if earlier is not None:
        require_same(earlier, facts, asdict(config))
    chosen = select(list(settings(config, facts)), options.layouts, lambda name: planned(config, facts, name))
    topology = attached(facts)
    rows = [{"name": setting.name} | _predict(setting, topology) for setting in chosen]
    result: dict[str, Any] = {}
    for i, (row, setting) in enumerate(zip(rows, chosen, strict=True), 1):
        row |= _measure(setting, options, facts)
        if facts["first"]:
            print(progress(row), flush=True)
            result = _result(config, options, facts, topology, rows[:i])
            save(result | {"settings_left": len(rows) - i}, out / "layouts.json")
    if not facts["first"]:
        return "", False
    found = [] if earlier is None else changes(earlier.result, result)
    plot(result, out / "layouts.png")
    written = [out / "layouts.json", out / "layouts.png"]
    if known := _constants(result, chosen, facts):
        save(known, out / "chip.json")
        written.append(out / "chip.json")
    parts = [table(result), *([change_lines(earlier, result, found)] if earlier else [])]
    text = "\n\n".join([*parts, f"{', '.join(map(str, written))}; {summary(result)}"])
    return text, any(change.worse for change in found)


def _result(
    config: Config, options: Options, facts: dict[str, Any], topology: Topology, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """What is known after so many rows, the fastest first."""
    about = {name: facts[name] for name in ("device", "platform", "count", "versions", "date", "dtype")}
    result = {"benchmark": "layouts", **about, "settings": asdict(options), "config": asdict(config)}
    result["calibration"] = calibrate(rows, facts, topology)
    result["rows"] = sorted(rows, key=lambda row: (-row.get("tokens_per_s", 0), row["status"], row["name"]))
    return result


def _constants(result: dict[str, Any], chosen: list[Setting], facts: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Of the devices, by the setting that fixes the predictions; none where no setting ran."""
    name = result["calibration"]["reference"]
    if name is None:
        return {}
    (config,) = (setting.config for setting in chosen if setting.name == name)
    (seconds,) = (row["median_s"] for row in result["rows"] if row["name"] == name)
    return constants(config, seconds, facts)


def settings(config: Config, facts: dict[str, Any]) -> Iterator[Setting]:
    """Every setting for the attached devices, the config's own first; each checked without compiling."""
    config = _steps_alone(config)
    made = layouts(config, facts["count"]) if facts["count"] > 1 else sweep(config, facts)
    seen = set()
    for setting in made:
        if setting.name in seen:
            continue
        seen.add(setting.name)
        yield _checked(setting, facts["count"])


def _steps_alone(config: Config) -> Config:
    """Without what only data and the length of a run need: it would refuse batches for no reason."""
    train = replace(config.train, ramp_start=0, ramp_tokens=0)
    return with_lanes(replace(config, train=train), 1)


def _checked(setting: Setting, count: int) -> Setting:
    """With the reason, where it does not fit so many devices."""
    try:
        check(validate(setting.config), degrees(setting.config.layout, count))
    except UserError as error:
        return setting._replace(refused=setting.refused or str(error))
    return setting


def layouts(config: Config, count: int) -> Iterator[Setting]:
    """The config's own layout, every axis alone, and every pair of fsdp with another axis."""
    yield _layout(config, config.layout, count, "own")
    ways = [d for d in range(2, count + 1) if count % d == 0]
    made = [LayoutConfig(data=count, fsdp=1), LayoutConfig(fsdp=count)]
    made += [LayoutConfig(fsdp=count // n, tensor=n, sequence_sharding=cut) for n in ways for cut in (False, True)]
    made += [LayoutConfig(fsdp=count // n, pipeline=n) for n in ways]
    made += [LayoutConfig(fsdp=count // n, context=n) for n in ways]
    made += [LayoutConfig(fsdp=count // 2, replica=2)] if count % 2 == 0 else []
    for layout in made:
        yield _layout(config, layout, count)


def _layout(config: Config, layout: LayoutConfig, count: int, otherwise: str = "") -> Setting:
    """A setting named by its degrees, such as fsdp4_tp2."""
    try:
        name = layout_name(layout, count)
    except UserError as error:
        return Setting(otherwise, replace(config, layout=layout), str(error))
    return Setting(name, replace(config, layout=layout))


def sweep(config: Config, facts: dict[str, Any]) -> Iterator[Setting]:
    """On one device: remat with scan or unroll, remat with half and twice the micro-batch, and attention."""
    remats = ("none", "dots", "full")
    yield _variant(config, config)
    for remat in remats:
        for scan in (True, False):
            yield _variant(config, _with_model(config, remat=remat, scan_layers=scan))
    micro = config.micro_batch_size
    for size in ([micro // 2] if micro % 2 == 0 else []) + [2 * micro]:
        for remat in remats:
            yield _variant(config, _with_micro(_with_model(config, remat=remat), size))
    for name in facts["attention"][1:]:
        yield _variant(config, _with_model(config, attention=name))
    for name, reason in facts["attention_refused"].items():
        yield Setting(f"attention={name}", _with_model(config, attention=name), reason)


def _with_model(config: Config, **fields: Any) -> Config:
    return replace(config, model=replace(config.model, **fields))


def _with_micro(config: Config, size: int) -> Config:
    """Another micro-batch: of the same batch where that divides, else of as many micro-batches."""
    whole = config.train.batch_size
    batch = whole if whole % size == 0 else size * config.max_accumulation
    return replace(config, train=replace(config.train, micro_batch_size=size, batch_size=batch))


def _variant(base: Config, config: Config) -> Setting:
    """A setting named by what differs from the config, such as remat=dots+unroll."""
    old, new, words = base.model, config.model, []
    if config.train.batch_size != base.train.batch_size:
        words.append(f"batch={config.train.batch_size}")
    elif config.micro_batch_size != base.micro_batch_size:
        words.append(f"micro={config.micro_batch_size}")
    words += [f"remat={new.remat}"] if new.remat != old.remat else []
    words += ["scan" if new.scan_layers else "unroll"] if new.scan_layers != old.scan_layers else []
    words += [f"attention={new.attention}"] if new.attention != old.attention else []
    return Setting("+".join(words) or "own", config)


def planned(config: Config, facts: dict[str, Any], name: str) -> Setting:
    """The setting of a name that `gptjax plan` prints, such as fsdp4_tp2_seq/full/16. Raises UserError for another."""
    return _checked(Setting(name, named(_steps_alone(config), name)), facts["count"])


def select(every: list[Setting], names: str, planned: Callable[[str], Setting]) -> list[Setting]:
    """The settings that are named, as they are named; a name without numbers stands for all that have any there, and
    one of a plan for what that means.

    Raises UserError for a name that there is not.
    """
    if names == "all":
        return every
    chosen: list[Setting] = []
    for name in names.split(","):
        found = [s for s in every if name in (s.name, re.sub(r"\d+", "", s.name))]
        if not found and re.search(r"\d", name):
            with suppress(UserError):
                found = [planned(name)]
        if not found:
            known = [s.name for s in every]
            near = difflib.get_close_matches(name, known, 1, 0.0)[0]
            raise UserError(
                f"--layouts {name}: no such setting here; choose from all, {', '.join(known)}, or a name of gptjax "
                f"plan; nearest {near}"
            )
        chosen += [s for s in found if s not in chosen]
    return chosen


def attached(facts: dict[str, Any]) -> Topology:
    """The attached devices as the planner sees them, with their measured limits for rates.

    Virtual devices share one machine, whose limits were measured whole: each gets its part. The network between the
    devices is what gathering over all of them reaches; there is none behind it, so it stands for the slow one, too.
    """
    count, limits = facts["count"], facts["limits"]
    parts = _sharing(facts)
    rate, link = limits["flops"] / parts, limits.get("gather", limits["bytes"] / parts)
    peak = peak_flops(facts["device"]) or rate
    hbm, copy = facts["memory_bytes"] / parts, limits["bytes"] / parts
    chip = Chip(facts["device"], peak, hbm, copy, link, link, rate / peak, facts["platform"])
    return Topology("attached", "attached", chip, (count,))


def _sharing(facts: dict[str, Any]) -> int:
    """Devices among which the measured limits are divided: the virtual ones of a CPU."""
    return facts["local_count"] if facts["platform"] == "cpu" else 1


def _predict(setting: Setting, topology: Topology) -> dict[str, Any]:
    """The planner's word on a setting by the measured limits alone; nothing for one that does not fit."""
    if setting.refused:
        return {}
    try:
        guess = estimate(place(setting.config, topology))
    except UserError as error:
        return {"not_predicted": str(error)}
    return {"uncalibrated_s": guess.update_seconds, "predicted_bytes": guess.peak}


def _measure(setting: Setting, options: Options, facts: dict[str, Any]) -> dict[str, Any]:
    """Status, and the figures of a setting that ran."""
    if setting.refused:
        return {"status": "skipped", "reason": setting.refused}
    answer = trial.measure(setting.config, options.steps, options.timeout, options.distributed)
    return answer | figures(setting.config, answer["times_s"], facts) if answer["status"] == "ok" else answer


def calibrate(rows: list[dict[str, Any]], facts: dict[str, Any], topology: Topology) -> dict[str, Any]:
    """One factor for the run, that of the first setting that ran, on every prediction; what it rests on.

    Large products and copies reach what no step does. The factor is the same for all settings, so their order is the
    planner's own, and the setting that fixes it is no test of the prediction.
    """
    first = next((row for row in rows if row["status"] == "ok" and "uncalibrated_s" in row), None)
    factor = first["median_s"] / first["uncalibrated_s"] if first else 1.0
    for row in rows:
        if "uncalibrated_s" not in row:
            continue
        row["predicted_s"] = factor * row["uncalibrated_s"]
        if row["status"] == "ok":
            row["error"] = row["predicted_s"] / row["median_s"] - 1
    return {
        "reference": first["name"] if first else None,
        "factor": factor,
        "measured_limits": facts["limits"],
        "chip": asdict(topology.chip),
        "devices_sharing_the_limits": _sharing(facts),
        "slow_network": "none: taken to be as fast as the one between the devices",
    }
