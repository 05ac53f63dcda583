"""Tasks of lm-evaluation-harness in this process: its own, and those of `tasks/` for data that lies at hand."""

import difflib
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.api import Model
from gptjax.errors import UserError
from gptjax.evaluate.figures import Figure, Measure, classification, mean, ratio
from gptjax.evaluate.score import Scorer

TASKS = Path(__file__).parent / "tasks"
LOCAL = "local_"  # what the names of our own begin with
EXTRA = "--tasks: lm-evaluation-harness is not installed; pip install 'gptjax[eval]'"
INTERVAL = "95% over questions: Wilson's, or the ratio estimator with Student's t; of macro means bootstrap"
SEED = 1234  # of the examples that stand before a question, as the harness draws them


def own_tasks() -> list[str]:
    """The names of the tasks that need no network."""
    return sorted(file.stem for file in TASKS.glob(f"{LOCAL}*.yaml"))


def load_tasks(names: Sequence[str], data: str = "", fewshot: int | None = None) -> Any:
    """Tasks that are ready to run, as `run_tasks` takes them; `data` is the folder of those that begin with local_.

    Raises UserError without the extra, for a name that there is not, and where a task's data cannot be had.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise UserError(f"{EXTRA} (no module {error.name})") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    own = own_tasks()
    known_by_sight = all(name in own or name.startswith(LOCAL) for name in names)
    # The harness reads 14,000 files to know its own names, which takes 20 seconds.
    manager = TaskManager(include_path=str(TASKS), include_defaults=not known_by_sight, metadata={"data": data})
    for name in names:
        require_known(name, own if name.startswith(LOCAL) else manager.all_tasks)
    try:
        loaded = manager.load(list(names))
    except UserError:
        raise
    except Exception as error:  # data sets fail in as many ways as there are libraries for them
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"--tasks {','.join(names)}: cannot be loaded ({why}); its data must be there") from error
    for task in loaded["tasks"].values():
        if fewshot is not None or task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", fewshot or 0)
    return loaded


def require_known(name: str, known: Iterable[str]) -> None:
    """Raises UserError that names the nearest where there is no such task."""
    known = list(known)
    if name not in known:
        near = difflib.get_close_matches(name, known, 1, 0.0)
        raise UserError(f"--tasks {name}: no such task; nearest {near[0]}; at hand are {', '.join(own_tasks())}")


def run_tasks(model: Model, tasks: Any, limit: int = 0, scorer: Scorer | None = None) -> dict[str, Measure]:
    """Measure a model by tasks; `limit` questions of each, 0 for all."""
    from lm_eval.evaluator import evaluate

    from gptjax.evaluate.adapter import EngineLM

    for task in tasks["tasks"].values():
        task.set_fewshot_seed(SEED)  # each model meets the same examples
    model.engine.clear()
    found = evaluate(EngineLM(model, scorer), tasks, limit=limit or None, bootstrap_iters=0, log_samples=True)
    model.engine.clear()
    made = {name: _measure(name, task, found) for name, task in tasks["tasks"].items()}
    for name in tasks.get("groups", {}):
        if name in found["results"]:
            about = {"task": name, "interval": "none: a mean of tasks"}
            made[name] = Measure(about, figures_of(found["results"][name], [], found["higher_is_better"].get(name, {})))
    return made


def _measure(name: str, task: Any, found: Any) -> Measure:
    samples = found["samples"][name]
    about = {
        "task": name,
        "questions": len({sample["doc_id"] for sample in samples}),
        "shots": task.get_config("num_fewshot") or 0,
        "version": str(task.VERSION),
        "interval": INTERVAL,
    }
    figures = figures_of(found["results"][name], samples, found["higher_is_better"].get(name, {}))
    choice = _choice(task, [sample for sample in samples if sample["filter"] == samples[0]["filter"]])
    more = {key: figure for key, figure in choice.figures.items() if key != "accuracy" or "acc" not in figures}
    return Measure(about, figures | more, choice.classes)


def figures_of(results: dict[str, Any], samples: list[Any], higher: dict[str, bool]) -> dict[str, Figure]:
    """The harness's own values of a task, each with the interval that its samples give."""
    figures = {}
    for key, value in results.items():
        metric, _, name = key.partition(",")
        if not name or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        each = [sample[metric] for sample in samples if sample["filter"] == name and metric in sample]
        better: Any = {True: "higher", False: "lower"}.get(higher.get(metric, True), "")
        shown = metric if name == "none" else f"{metric} ({name})"
        figures[shown] = _with_interval(metric, float(value), each, better)
    return figures


RATIOS: dict[str, Callable[[float], float]] = {
    "word_perplexity": lambda nats: float(np.exp(nats)),
    "byte_perplexity": lambda nats: float(np.exp(nats)),
    "bits_per_byte": lambda nats: nats / float(np.log(2)),
}


def _with_interval(metric: str, value: float, each: list[Any], better: Any) -> Figure:
    """A value with the interval of the estimate that it is; with none where the samples do not say what it is."""
    figure = None
    if each and metric in RATIOS:
        above, below = np.array(each, float).T
        figure = ratio(-above, below, better).mapped(RATIOS[metric])
    elif each and all(isinstance(one, bool | int | float | np.number) for one in each):
        figure = mean(each, better)
    if figure is None or not np.isclose(figure.value, value, rtol=1e-6):
        return Figure(value, better=better)
    return Figure(value, figure.low, figure.high, better)


def _choice(task: Any, samples: list[Any]) -> Measure:
    """Of a multiple choice what `classification` says; nothing of any other task, or where not every question has one
    right answer among as many."""
    nothing = Measure({}, {})
    if task.OUTPUT_TYPE != "multiple_choice":
        return nothing
    choices = [task.doc_to_choice(sample["doc"]) for sample in samples]
    truth = [_index(task, sample, names) for sample, names in zip(samples, choices, strict=True)]
    count = len(choices[0])
    if any(len(names) != count for names in choices) or any(i is None or not 0 <= i < count for i in truth):
        return nothing
    chosen = [int(np.argmax([nats for nats, _ in sample["filtered_resps"][:count]])) for sample in samples]
    fixed = all(names == choices[0] for names in choices)
    names = [str(name) for name in choices[0]] if fixed else [f"candidate {i + 1}" for i in range(count)]
    made = classification([i for i in truth if i is not None], chosen, names)
    what = "a label" if fixed else "a place among the candidates, which differ from question to question"
    return Measure({}, made.figures, {"what": what, **made.classes})


def _index(task: Any, sample: Any, names: list[str]) -> int | None:
    """Which choice is right; None where that is not one."""
    target = task.doc_to_text(sample["doc"]) if task.multiple_input else sample["target"]
    if isinstance(target, str):
        return names.index(target) if target in names else None
    return int(target) if isinstance(target, int | np.integer) else None
