"""`gptjax convert`: a run folder to a Hugging Face directory, or a directory to a run folder."""

import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax

from gptjax.config import ClassifyConfig, Config, EncoderDecoderConfig, LayoutConfig
from gptjax.convert.architecture import Architecture
from gptjax.convert.gpt_neo import GPT_NEO
from gptjax.convert.huggingface import (
    class_of,
    counterpart,
    finetune_config,
    is_huggingface,
    open_directory,
    write_directory,
)
from gptjax.convert.tokenizer import write_tokenizer
from gptjax.data.tokenizers import load_tokenizer
from gptjax.errors import UserError
from gptjax.sharding.mesh import make_mesh
from gptjax.sharding.rules import Layout, rule_table
from gptjax.stages import stage_class
from gptjax.stages.launch import first_params, prepare
from gptjax.stages.weights import on_device, open_weights
from gptjax.train.checkpoint import Checkpoints, Position
from gptjax.train.run import fill_run
from gptjax.train.step import abstract_state, placed, start_state


def convert(source: str, target: str, dtype: str) -> str:
    """Write `target`, whole or not at all; returns what a user wants to know of it.

    Raises UserError where either path or the model cannot be converted.
    """
    make = _to_run if is_huggingface(Path(source)) else _to_huggingface
    return make(source, Path(target), dtype)


def _to_huggingface(source: str, target: Path, dtype: str) -> str:
    weights = open_weights(source)
    config = weights.config
    prepare(config)
    architecture = counterpart(**config.models)
    tokenizer = stage_class(config).fit_tokenizer(config, weights.tokenizer())
    with appearing(target) as folder:
        params = weights.load(config.model, on_device(config, _cpu(), weights.heads))
        start = _start(config, tokenizer.eot)
        labels = config.labels.names if isinstance(config, ClassifyConfig) else None
        size = write_directory(folder, config.models, params, tokenizer.eot, dtype, start=start, labels=labels)
        note = write_tokenizer(tokenizer, folder, config.model.vocab_size, config.model.seq_len)
    where, name = shlex.quote(str(target)), class_of(architecture, weights.heads)
    lines = [
        f"{target}: {name}, {size / 1e6:,.1f} MB of {dtype}",
        *([f"note: {note}"] if note else []),
        *(
            ["the division of scores by sqrt(head_dim) is folded into q, for GPT-Neo has none"]
            * _folds(config, architecture)
        ),
        *([] if architecture.encoder or architecture.heads else [f"  sample  gptjax sample {where} --prompt 'def '"]),
        f"  python  transformers.{name}.from_pretrained({str(target)!r})",
    ]
    return "\n".join(lines)


def _start(config: Config, eot: int) -> int | None:
    """The id that the decoder of an encoder-decoder starts with."""
    if not isinstance(config, EncoderDecoderConfig):
        return None
    return eot if config.start_id < 0 else config.start_id


def _folds(config: Config, architecture: Architecture) -> bool:
    return config.model.scale_scores and architecture is GPT_NEO


def _to_run(source: str, target: Path, dtype: str) -> str:
    if dtype != "float32":
        raise UserError(f"--dtype {dtype}: a run folder holds float32 weights; leave it out")
    directory = open_directory(Path(source))
    config = replace(finetune_config(Path(source)), run=str(target))
    prepare(config)
    kind = stage_class(config)
    tokenizer = kind.fit_tokenizer(config, load_tokenizer(config.data.tokenizer))
    stage = kind(config, "cpu", tokenizer=tokenizer)  # type: ignore[arg-type]
    one = LayoutConfig(fsdp=1)
    abstract = abstract_state(config, stage)
    shardings = Layout(make_mesh(replace(config, layout=one), [_cpu()]), rule_table(one)).shardings(abstract)
    with appearing(target) as folder:
        load = partial(directory.load, config.model)
        params = first_params(stage, load, placed(abstract, shardings).params, directory.heads)
        fill_run(folder, config, tokenizer)
        checkpoints = Checkpoints(folder, config)
        checkpoints.save(start_state(config, stage, params, shardings).kept, Position())
        checkpoints.close()
    where = shlex.quote(str(target))
    writes = not (directory.architecture.encoder or directory.architecture.heads)
    sample = [f"  sample  gptjax sample {where} --prompt 'def '"] if writes else []
    train = f"  train   gptjax train --resume {where}"
    return "\n".join([f"{target}: a run at step 0 with these weights", *sample, train])


def _cpu() -> jax.Device:
    """Converting computes nothing, and a host has more memory than an accelerator."""
    return jax.local_devices(backend="cpu")[0]


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A folder to fill, which takes its name only when it is whole; after any failure there is none.

    Raises UserError where the target is taken or cannot be written.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target}: exists and is not an empty folder; name another")
    part = target.absolute().with_name(f".{target.absolute().name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        part.rename(target)
    except OSError as error:
        raise UserError(f"{target}: cannot write ({error.strerror or error})") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
