"""`gptjax VERB ...`: one verb per user goal. Errors of the user's making are one line and exit status 1."""

import argparse
import dataclasses
import os
import signal
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gptjax.config import Config, validate
from gptjax.errors import UserError
from gptjax.loading import differences, load_config, override, type_name, walk

# XLA's CPU backend takes its scratch memory from malloc and gives it back at every step: without these glibc
# faults it in page by page each time, a third of a step of width 128. Huge pages, and freed memory is kept.
MALLOC = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1073741824"


def main() -> None:
    """The console script."""
    # Nothing else runs on a GPU that trains: JAX's own 75% would leave a quarter of its memory to nobody.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    if malloc_matters(os.environ):
        os.environ["GLIBC_TUNABLES"] = MALLOC  # read when a process starts, so start once more
        os.execv(sys.executable, sys.orig_argv)
    try:
        sys.exit(run(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def malloc_matters(environment: Mapping[str, str]) -> bool:
    """Whether the computation will run on a Linux CPU with glibc's defaults."""
    accelerated = any(find_spec(name) for name in ("jax_cuda13_plugin", "jax_cuda12_plugin", "libtpu"))
    on_cpu = environment.get("JAX_PLATFORMS") == "cpu" or not accelerated
    return sys.platform == "linux" and on_cpu and "GLIBC_TUNABLES" not in environment


def run(arguments: list[str]) -> int:
    """Parse, dispatch, return the exit status."""
    parser = argparse.ArgumentParser(prog="gptjax", description="Train GPT models from a laptop to a TPU pod.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _train_parser(verbs)
    _sample_parser(verbs)
    _convert_parser(verbs)
    _report_parser(verbs)
    _data_parser(verbs)
    _tokenizer_parser(verbs)
    _plan_parser(verbs)
    _bench_parser(verbs)
    fields, arguments = split_overrides(arguments)
    known, rest = parser.parse_known_args(arguments)
    if (rest or fields) and not known.overrides:
        raise UserError(f"{(rest or fields)[0]}: gptjax {known.verb} has no such argument; see its --help")
    return int(known.run(known, rest + fields) or 0)


def split_overrides(arguments: list[str]) -> tuple[list[str], list[str]]:
    """(config fields with their values, the rest): argparse would take a field's value for a positional."""
    sections = {f.name for f in dataclasses.fields(Config)}
    fields, rest, left = [], [], list(arguments)
    while left:
        flag = left.pop(0)
        name, equals, _ = flag.removeprefix("--").partition("=")
        if flag.startswith("--") and (name in sections or "." in name):
            fields += [flag] if equals or not left else [flag, left.pop(0)]
        else:
            rest.append(flag)
    return fields, rest


def _add(verbs: Any, name: str, run: Any, text: str, overrides: bool = False, epilog: str = "") -> Any:
    parser = verbs.add_parser(
        name,
        help=text,
        description=text,
        epilog=epilog,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, overrides=overrides)
    return parser


def _train_parser(verbs: Any) -> None:
    text = "Train the model of a config, or go on with a run. Any field is set by its dotted name."
    parser = _add(verbs, "train", _train, text, overrides=True, epilog=field_help() if "--help" in sys.argv else "")
    text = "a file of configs/, or a Hugging Face directory (GPT-2, GPT-Neo) to fine-tune"
    parser.add_argument("config", nargs="?", metavar="CONFIG", help=text)
    parser.add_argument("--resume", metavar="RUN", help="a run folder to go on with, exactly where it stopped")
    parser.add_argument("--distributed", action="store_true", help="one of several processes: join the others first")


def field_help() -> str:
    """Every field: dotted name, type, default, docstring."""
    lines = ["fields:"]
    for name, hint, default, text in walk(Config):
        shown = "required" if default is dataclasses.MISSING else f"default {_shown(default)}"
        lines.append(f"  --{name} {type_name(hint)}  ({shown})\n      {text}")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return (
        ",".join(map(str, value)) or "empty" if isinstance(value, tuple) else repr(value) if value == "" else f"{value}"
    )


def _train(known: argparse.Namespace, overrides: list[str]) -> int:
    from gptjax.tasks.launch import train

    if known.resume is None and known.config is None:
        raise UserError("gptjax train: name a config, such as configs/quickstart.py, or --resume RUN")
    config = _resolve(known, overrides)
    return train(config, Path(known.resume) if known.resume else None, distributed=known.distributed)


def _resolve(known: argparse.Namespace, overrides: list[str]) -> Config:
    """The config to train: from a file, or of a run with what may change of it."""
    if known.resume is None:
        return _config(known.config, overrides)
    from gptjax.train.run import open_run

    _, saved = open_run(known.resume)
    given = _config(known.config, overrides) if known.config else validate(override(saved, overrides))
    if lines := differences(saved, given):
        raise UserError(f"--resume {known.resume}: this config contradicts the run: " + "; ".join(lines))
    return given


def _config(path: str, overrides: list[str]) -> Config:
    """The config of a file, or one that fine-tunes a Hugging Face directory."""
    if not Path(path).is_dir():
        return load_config(path, overrides)
    from gptjax.convert.huggingface import finetune_config, is_huggingface

    if not is_huggingface(Path(path)):
        raise UserError(
            f"train {path}: a folder, but without the config.json of a Hugging Face model; to go on with a run: "
            f"gptjax train --resume {path}"
        )
    return validate(override(finetune_config(Path(path)), overrides))


def _sample_parser(verbs: Any) -> None:
    parser = _add(verbs, "sample", _sample, "Continue a prompt with a trained model.")
    parser.add_argument("folder", metavar="PATH", help="a run folder or a Hugging Face directory")
    parser.add_argument("--prompt", default="\n", help="text to continue")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default 0.8)")
    parser.add_argument("--top-k", type=int, default=0, help="keep the k likeliest tokens; 0 keeps all")
    parser.add_argument("--top-p", type=float, default=1.0, help="keep the likeliest tokens up to this probability")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=1, help="how many")
    parser.add_argument("--tokens", type=int, default=200, help="length of each")


def _sample(known: argparse.Namespace, _: list[str]) -> None:
    from gptjax.infer.sampling import Sampling
    from gptjax.tasks.launch import sample

    for name in ("samples", "tokens"):
        if getattr(known, name) < 1:
            raise UserError(f"--{name} {getattr(known, name)}: must be positive; nearest 1")
    how = Sampling(known.temperature, known.top_k, known.top_p)
    texts = sample(known.folder, known.prompt, how, num_samples=known.samples, num_tokens=known.tokens, seed=known.seed)
    print("\n---\n".join(known.prompt + text for text in texts))


def _convert_parser(verbs: Any) -> None:
    text = (
        "Turn a run folder into a directory that transformers loads (GPT-2, GPT-Neo), or such a directory into a run."
    )
    parser = _add(verbs, "convert", _convert, text)
    parser.add_argument("source", metavar="SRC", help="a run folder, or a directory with config.json and safetensors")
    parser.add_argument("target", metavar="DST", help="the folder to write; new or empty")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the weights")


def _convert(known: argparse.Namespace, _: list[str]) -> None:
    from gptjax.tasks.convert import convert

    print(convert(known.source, known.target, known.dtype))


def _report_parser(verbs: Any) -> None:
    parser = _add(verbs, "report", _report, "Draw a run's loss and throughput from its log: PNG and one HTML page.")
    parser.add_argument("folder", metavar="RUN", help="a run folder")


def _report(known: argparse.Namespace, _: list[str]) -> None:
    from gptjax.train.report import report

    print(report(known.folder))


def _data_parser(verbs: Any) -> None:
    text = "Build the dataset of a config, and show what it holds."
    parser = _add(verbs, "data", _data, text, overrides=True)
    parser.add_argument("config", help="a file of configs/")


def _data(known: argparse.Namespace, overrides: list[str]) -> None:
    from gptjax.tasks.launch import describe_data

    print(describe_data(load_config(known.config, overrides)))


def _tokenizer_parser(verbs: Any) -> None:
    text = "Train a SentencePiece tokenizer on the training split of a config."
    parser = _add(verbs, "tokenizer", _tokenizer, text, overrides=True)
    parser.add_argument("action", choices=["train"])
    parser.add_argument("config", help="a file of configs/; its data section names the text")
    parser.add_argument("--vocab-size", type=int, default=50257, help="pieces, bytes and reserved tokens together")
    parser.add_argument("--out", type=Path, required=True, help="the .model file to write")


def _tokenizer(known: argparse.Namespace, overrides: list[str]) -> None:
    from gptjax.data.sources import open_source
    from gptjax.data.tokenizers import train_sentencepiece

    data = load_config(known.config, overrides).data
    source = open_source(data, data.train_split)
    train_sentencepiece((source[i].text for i in range(len(source))), known.vocab_size, known.out)
    print(f"{known.out}: use it with --data.tokenizer {known.out} --model.vocab_size {known.vocab_size}")


def _plan_parser(verbs: Any) -> None:
    text = "Which layout for a pod or cluster that is not here: memory, traffic, step time and days, ranked."
    parser = _add(verbs, "plan", _plan, text, overrides=True)
    parser.add_argument("config", help="a file of configs/")
    parser.add_argument("--topology", required=True, metavar="NAME", help="v5p-1024, v5e-256, v6e-256, h100-8x64, ...")
    parser.add_argument("--slices", type=int, default=1, metavar="N", help="so many of them (TPU; default 1)")
    parser.add_argument("--compile", type=int, default=6, metavar="N", help="layouts to compile (default 6)")
    parser.add_argument("--analytic", action="store_true", help="formulas alone, no compiler")
    parser.add_argument("--timeout", type=float, default=600, metavar="S", help="seconds for one compile (default 600)")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="compiles at once (default 2)")
    parser.add_argument("--out", type=Path, default=Path("plan"), help="folder for JSON and the page (default plan)")
    parser.add_argument("--explain", metavar="NAME", help="where a parameter or activation lies in the config's layout")
    parser.add_argument("--diff", nargs=2, metavar=("A", "B"), help="two layouts, such as fsdp64_tp8_seq/full/256")


def _plan(known: argparse.Namespace, overrides: list[str]) -> int:
    from gptjax.planner.command import command
    from gptjax.planner.plan import Settings

    config = load_config(known.config, overrides)
    if known.compile < 1 or known.processes < 1 or known.timeout <= 0:
        raise UserError("gptjax plan: --compile, --processes and --timeout must be positive; nearest 1")
    settings = Settings(known.compile, known.timeout, known.processes, known.analytic, known.out)
    return command(config, known.topology, known.slices, settings, known.explain, known.diff)


def _bench_parser(verbs: Any) -> None:
    text = "Measure a part of gptjax on this machine: a table, a plot, a JSON file."
    kinds = verbs.add_parser("bench", help=text, description=text).add_subparsers(
        dest="what", required=True, metavar="WHAT"
    )
    _bench_attention_parser(kinds)
    _bench_layouts_parser(kinds)
    _bench_single_parser(kinds)


def _bench_attention_parser(kinds: Any) -> None:
    parser = _add(kinds, "attention", _bench_attention, "Dense against banded attention over the sequence length.")
    _add_out(parser)
    parser.add_argument("--lengths", default="512,1024,2048,4096,8192,16384,32768", help="sequence lengths T")
    parser.add_argument("--window", type=int, default=256, help="keys that a banded query sees (default 256)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default float32 on CPU, else bfloat16")
    parser.add_argument("--attention", default="auto", help="a backend (default auto, by device)")


def _add_out(parser: Any) -> None:
    parser.add_argument("--out", type=Path, default=Path("bench"), help="folder for the results (default bench)")


def _bench_attention(known: argparse.Namespace, _: list[str]) -> None:
    import jax

    from gptjax.bench.attention import Settings, run

    try:
        lengths = tuple(int(part) for part in known.lengths.split(","))
    except ValueError:
        raise UserError(f"--lengths {known.lengths}: expected whole numbers with commas, such as 512,1024") from None
    dtype = known.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    shape = known.window, known.batch, known.heads, known.head_dim
    print(run(Settings(lengths, *shape, dtype, known.attention), known.out))


def _bench_layouts_parser(kinds: Any) -> None:
    text = (
        "Time a config's train step on every layout of the attached devices, or on one device over batch, remat, scan "
        "and attention, beside the prediction. Any field is set by its dotted name. Exit status 1: slower than before."
    )
    parser = _add(kinds, "layouts", _bench_layouts, text, overrides=True)
    parser.add_argument("config", metavar="CONFIG", help="a file of configs/")
    _add_out(parser)
    text = "settings with commas, such as fsdp8,tp (a name without numbers means all of that kind), or all"
    parser.add_argument("--layouts", default="all", metavar="NAMES", help=text)
    parser.add_argument("--steps", type=int, default=10, help="measured steps of each setting (default 10)")
    parser.add_argument("--timeout", type=float, default=600, help="seconds that a setting may take (default 600)")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="a layouts.json of an earlier run")
    parser.add_argument("--distributed", action="store_true", help="one of several hosts: join the others first")


def _bench_layouts(known: argparse.Namespace, overrides: list[str]) -> int:
    from gptjax.bench.layouts import Options, run

    options = Options(known.layouts, known.steps, known.timeout, known.distributed)
    text, worse = run(load_config(known.config, overrides), options, known.out, known.compare)
    if text:
        print(text)
    return int(worse)


def _bench_single_parser(kinds: Any) -> None:
    text = (
        "Time the train step of configs on one device: tokens per second, MFU, memory, and the parts of a step beside "
        "their floors. Any field is set by its dotted name, for all of the configs."
    )
    parser = _add(kinds, "single", _bench_single, text, overrides=True)
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="files of configs/")
    _add_out(parser)
    parser.add_argument("--steps", type=int, default=10, help="measured steps of each setting (default 10)")
    parser.add_argument("--timeout", type=float, default=900, help="seconds that one process may take (default 900)")
    parser.add_argument("--search", action="store_true", help="find the best micro-batch and remat first")
    parser.add_argument("--options", action="store_true", help="also try compiler options, each by itself")
    parser.add_argument("--stream", action="store_true", help="also feed the config's own text")
    parser.add_argument(
        "--peer", default="", metavar="SCRIPT", help="also time this, such as tests/peers/gpt2_torch.py"
    )
    parser.add_argument("--rounds", type=int, default=1, help="times that we and the peer take turns (default 1)")


def _bench_single(known: argparse.Namespace, overrides: list[str]) -> None:
    from gptjax.bench.single import Options, run

    flags = known.search, known.options, known.stream, known.peer, known.rounds
    options = Options(known.steps, known.timeout, *flags)
    print(run([load_config(path, overrides) for path in known.configs], options, known.out))
