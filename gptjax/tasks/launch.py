"""From a config or a run folder to a running stage: devices, mesh, tokenizer and task put together."""

import logging
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import jax

from gptjax.config import Config
from gptjax.data.sources import open_source
from gptjax.data.stream import require_one_row
from gptjax.data.tokenizers import Tokenizer, load_tokenizer
from gptjax.hardware import compiler_options, require_float8
from gptjax.infer.sampling import Sampling, generate
from gptjax.model.gpt import compute_dtype
from gptjax.sharding import pipeline
from gptjax.sharding.mesh import make_mesh
from gptjax.sharding.rules import Layout, rule_table
from gptjax.tasks.join import join
from gptjax.tasks.pretrain import Pretrain, check_vocabulary
from gptjax.tasks.weights import Weights, on_device, open_weights
from gptjax.train.loop import fit
from gptjax.train.run import new_run, saved_tokenizer


def train(config: Config, resume: Path | None, *, distributed: bool = False) -> int:
    """Run pretraining, from random weights or those of `init_from`, to its end; returns the exit status (128 + the
    signal that stopped it, or 0).

    `distributed` joins the other processes first; see `join`.
    """
    prepare(config)
    if distributed:
        join(os.environ)
    layout = Layout(make_mesh(config), rule_table(config.layout))
    if config.model.fp8:
        require_float8(jax.devices()[0])
    tokenizer = saved_tokenizer(resume) if resume else load_tokenizer(config.data.tokenizer)
    check_vocabulary(config, tokenizer)
    for split in (config.data.train_split, config.data.eval_split):
        # Whatever is wrong with the text shows here, before there is a run folder.
        require_one_row(open_source(config.data, split), tokenizer, config.model.seq_len)
    task = Pretrain(config, jax.default_backend(), layout, tokenizer)
    facts = _facts(task, tokenizer, layout)
    weights = _first_weights(config) if config.init_from and not resume else None  # refused before a folder, too
    run = resume or new_run(config, tokenizer)
    facts |= {"run": str(run)} | ({"weights": config.init_from} if weights else {})

    def load(places: Any) -> Any:
        """Also for a run that was stopped before its first checkpoint."""
        return (weights or _first_weights(config)).load(config.model, places)

    number = fit(config, task, layout, run, resume is not None, facts, load if config.init_from else None)
    if jax.process_index() == 0:
        print(f"\n{'stopped' if number else 'done'}: run folder {run}\n{next_commands(run, number != 0)}", flush=True)
    return 128 + number if number else 0


def next_commands(run: Path, stopped: bool) -> str:
    """What a user would type next, ready to paste."""
    folder = shlex.quote(str(run))
    more = "" if stopped else " --train.total_tokens N"
    return (
        f"  resume  gptjax train --resume {folder}{more}\n"
        f"  sample  gptjax sample {folder} --prompt 'def '\n"
        f"  plot    gptjax report {folder}"
    )


def prepare(config: Config) -> None:
    """Process-wide settings of JAX, before the first computation."""
    for name in ("absl", "asyncio"):  # Orbax logs every save, and failures that it also raises
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _without_late_writes
    if config.train.compile_cache:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(config.train.compile_cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _without_late_writes(unraisable: Any) -> None:
    """After a failed save TensorStore's other writes still report to Orbax's closed event loop: the one line that
    names the failure is enough. Everything else is shown as ever."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _first_weights(config: Config) -> Weights:
    weights = open_weights(config.init_from)
    weights.require(config.model)
    return weights


def sample(folder: str, prompt: str, how: Sampling, *, num_samples: int, num_tokens: int, seed: int) -> list[str]:
    """Continuations of a prompt by the newest checkpoint of a run, or by a Hugging Face directory."""
    weights = open_weights(folder)
    prepare(weights.config)
    tokenizer = weights.tokenizer()
    task = Pretrain(weights.config, jax.default_backend(), tokenizer=tokenizer)
    params = weights.load(weights.config.model, on_device(weights.config, jax.local_devices()[0]))
    ids = tokenizer.encode(prompt)
    made = generate(task.plain_model, params, ids, num_samples=num_samples, num_tokens=num_tokens, how=how, seed=seed)
    return [tokenizer.decode(row.tolist()) for row in made]


def describe_data(config: Config) -> str:
    """Records and the first text of each split, after building what is not built yet."""
    lines = []
    for split in (config.data.train_split, config.data.eval_split):
        source = open_source(config.data, split)
        lines.append(f"{source.name} {split}: {len(source):,} records; the first begins {source[0].text[:60]!r}")
    return "\n".join(lines)


def _facts(task: Pretrain, tokenizer: Tokenizer, layout: Layout) -> dict[str, Any]:
    config, platform = task.config, task.platform
    source = open_source(config.data, config.data.train_split)
    options = compiler_options(platform, config.train.deterministic)
    return _stages(config, layout) | {
        "attention": ": ".join(task.attention),
        "compiler": " ".join(f"{k}={v}" for k, v in options.items()) or "default options",
        "layers": ("scanned" if config.model.scan_layers else "unrolled") + f", remat {config.model.remat}",
        "compute": f"{compute_dtype(config.model, platform)} with float32 weights ({config.model.dtype} on {platform})"
        + ("; the layers' products in float8" if config.model.fp8 else ""),
        "data": f"{source.name}, {len(source):,} training records, {config.data.tokenizer} tokenizer of "
        f"{tokenizer.vocab_size:,} in a vocabulary of {config.model.vocab_size:,} "
        f"(padded to {config.model.padded_vocab_size:,})",
    }


def _stages(config: Config, layout: Layout) -> dict[str, Any]:
    """The pipeline, if there is one, and the share of its time in which a stage waits."""
    stages, rounds = layout.mesh.shape[pipeline.AXIS], config.layout.pipeline_rounds
    if stages == 1:
        return {}
    chunks = pipeline.num_chunks(config, layout.ways(layout.rules["batch"]))
    idle = pipeline.bubble(stages, rounds, chunks)
    return {"pipeline": f"{stages} stages, {rounds} round(s) of {chunks} chunks, bubble {idle:.0%}"}
