"""What evaluations gave, kept: one JSON file for each model, in which a later evaluation puts its figures beside or in
the place of earlier ones."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from gptjax import bucket
from gptjax.api import Model, Translator
from gptjax.convert.huggingface import is_huggingface
from gptjax.errors import UserError
from gptjax.evaluate.figures import Figure, Measure
from gptjax.files import json_text, read_json, write_whole
from gptjax.stages.weights import run_and_step
from gptjax.train.checkpoint import chosen_step

FORMAT = 1
REMEDY = "remove it, or name another folder with --out"


@dataclass(frozen=True)
class Result:
    """One model, or one checkpoint of it."""

    name: str
    """As a column is called."""
    model: dict[str, Any]
    """Its path, size, context, tokenizer and where it was computed."""
    measures: dict[str, Measure]
    """By the name of the text or the task and the settings that make other figures of it."""


def about(model: Model | Translator) -> dict[str, Any]:
    """What is known of a model that is evaluated; of a run the step of its checkpoint."""
    train, config = model.stage.config.train, model.stage.config.model
    run, step = run_and_step(model.path)
    path = bucket.opened(run)
    return {
        "path": bucket.named(path.absolute()),
        "step": None if is_huggingface(path) else chosen_step(path, best=train.keep_best, step=step),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(model.params)),
        "context": config.seq_len,
        "vocab_size": config.vocab_size,
        "dtype": str(model.stage.network.plain_model.dtype),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }


def save(out: Path, model: dict[str, Any], measures: dict[str, Measure]) -> Path:
    """Put measures into the file of a model; returns it. Raises UserError where the file or the folder is broken."""
    path = Path(model["path"])
    name = path.name if model["step"] is None else f"{path.name} step {model['step']:,}"
    stem = path.name if model["step"] is None else f"{path.name}-{model['step']}"
    file = out / f"{stem}.json"
    if file.exists() and load(file).model["path"] != model["path"]:  # another model of the same name
        mark = hashlib.sha256(model["path"].encode()).hexdigest()[:6]
        file, name = out / f"{stem}-{mark}.json", f"{name} ({path.parent.name})"
    known = load(file).measures if file.exists() else {}
    values = {
        "format": FORMAT,
        "name": name,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {each: version(each) for each in ("gptjax", "jax")},
        "model": model,
        "measures": {key: asdict(measure) for key, measure in (known | measures).items()},
    }
    try:
        write_whole(file, json_text(values, indent=2).encode())
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); name another folder") from None
    return file


def earlier(out: Path) -> list[Path]:
    """The files that a folder holds, which is made where there is none. Raises UserError where it cannot be, or holds
    other JSON: now, not after hours of evaluation."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be made ({error.strerror}); name another folder") from None
    files = sorted(out.glob("*.json"))
    for file in files:
        load(file)
    return files


def load(file: Path) -> Result:
    """A file that `save` wrote. Raises UserError for any other."""
    values = read_json(file, REMEDY)
    try:
        if values["format"] != FORMAT:
            raise KeyError("format")
        measures = {key: _measure(each) for key, each in values["measures"].items()}
        return Result(values["name"], values["model"], measures)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: no result of an evaluation ({error}); {REMEDY}") from None


def _measure(values: dict[str, Any]) -> Measure:
    figures = {
        name: Figure(**{**each, "value": float("nan") if each["value"] is None else each["value"]})
        for name, each in values["figures"].items()
    }
    return Measure(values["about"], figures, values["classes"])


def folder_of(paths: Sequence[str], out: str) -> Path:
    """Where results go: the folder that is named, or `eval` beside the first model's. Raises UserError where that is in
    a bucket."""
    run = run_and_step(paths[0])[0]
    if not out and bucket.is_address(run):
        raise UserError(f"{run}: in a bucket, where results do not go; name a folder with --out")
    return Path(out) if out else Path(run).absolute().parent / "eval"
