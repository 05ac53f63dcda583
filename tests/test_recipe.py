"""A chain of stages: which steps are done, which go on, which are made again; the town; who wins."""

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from devices import environment
from hypothesis import given, settings
from hypothesis import strategies as st
from shipped import RECIPES

from gptjax import cli
from gptjax.data.tokenizers import load_tokenizer
from gptjax.errors import UserError
from gptjax.recipe import load_recipe, town
from gptjax.recipe.compare import win_rate
from gptjax.recipe.steps import config_of, todo, words_for, writes_files
from gptjax.train.lock import RunLock
from gptjax.train.metrics import LOG, read_log
from gptjax.train.run import fill_run

ROOT = Path(__file__).parents[1]
TINY = ROOT / "configs" / "recipe_tiny.py"
places = st.sampled_from(town.PLACES)


def shortest() -> np.ndarray:
    """Steps between all places, by Floyd and Warshall on what a person sees on the map."""
    at = {place: (y, x) for y, row in enumerate(town.MAP) for x, place in enumerate(row)}
    steps = np.full((16, 16), np.inf)
    for i, a in enumerate(town.PLACES):
        for j, b in enumerate(town.PLACES):
            apart = abs(at[a][0] - at[b][0]) + abs(at[a][1] - at[b][1])
            if apart == 0 or (apart == 1 and not {(a, b), (b, a)} & set(town.CLOSED)):
                steps[i, j] = apart
    for k in range(16):
        steps = np.minimum(steps, steps[:, k, None] + steps[None, k])
    return steps


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), places, places, st.sampled_from(town.QUESTIONS))
def test_gold_is_the_share_of_steps_that_were_needed(seed: int, start: str, goal: str, form: str) -> None:
    if start == goal:
        return
    way, question = town.walk(np.random.default_rng(seed), start, goal), form.format(start, goal)
    assert town.steps_of(town.told(way)) == way
    needed = shortest()[town.PLACES.index(start), town.PLACES.index(goal)]
    assert town.gold(question, town.told(way)) == (needed / len(way) if way[-1][1] == goal else 0)


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "Go.",
        "Hello!",
        "Go east to the market.",  # the church lies there
        "Go east to the church, then south to the bakery.",  # no street
        "Go east to the church, then east to the market, then",
        "Go east to the church. Go east to the market.",
        "Go north to the mill.",
    ],
)
def test_a_way_that_is_none_is_worth_nothing(reply: str) -> None:
    assert town.gold("How do I get from the mill to the market?", reply) == 0
    assert town.gold("Hello!", "Go east to the church.") == 0


def test_what_lies_beside_a_place_is_right_or_wrong() -> None:
    assert town.gold("What is east of the mill?", "To the east of the mill lies the church.") == 1
    assert town.gold("What is east of the mill?", "To the east of the mill lies the market.") == 0
    assert town.gold("What is north of the mill?", "No street goes north from the mill.") == 1
    assert town.gold("What is south of the church?", "No street goes south from the church.") == 1  # it is closed
    assert town.gold("What is east of the mill?", "Go east to the church.") == 0


def test_no_talk_is_about_what_is_asked_in_the_end(tmp_path: Path) -> None:
    town.town(tmp_path)
    read = {path.name: [json.loads(line) for line in path.read_text().splitlines()] for path in tmp_path.iterdir()}
    held_out = {town.asked(row["prompt"]) for row in read["questions.jsonl"]}
    taught = {town.asked(turn["content"]) for row in read["talks.jsonl"] for turn in row["messages"][::2]}
    assert len(held_out) == 30 + 8 and not held_out & taught
    assert not held_out & {town.asked(row["prompt"]) for row in read["prompts.jsonl"]}


def test_win_rate() -> None:
    """Any reply against any to the same question; questions count alike."""
    assert win_rate([[1, 0], [5, 5]], [[0, 0], [5, 9]]).value == pytest.approx(((1 + 1 + 0.5 + 0.5) / 4 + 0.25) / 2)


def test_what_is_to_be_done() -> None:
    known = {"inputs": {"step sft": "a", "optimizer.learning_rate": "0.1", "its text": "x"}, "done": True}
    same = dict(known["inputs"])
    assert todo(None, same, there=False).what == "make"
    assert todo(known, same, there=True).what == "skip"
    assert todo(known, same, there=False).what == "make"
    assert todo(known | {"done": False}, same, there=True).what == "resume"
    assert todo(known | {"done": False}, same, there=False).what == "make"
    changed = todo(known | {"done": False}, {"step sft": "b", "optimizer.learning_rate": "0.2", "its text": "x"}, True)
    assert changed.what == "make"
    assert changed.why == "made again: sft has changed, optimizer.learning_rate was 0.1 and is 0.2"


HEAD = "from gptjax.recipe import Comparison, Recipe\ndef a(folder): pass\ndef b(a, folder): pass\n"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("x = 1", "must define recipe() that returns a gptjax.recipe.Recipe"),
        ("def recipe(): return 3", "must define recipe() that returns a gptjax.recipe.Recipe"),
        ("def recipe(): return Recipe('r', (b,), None)", "step b needs a, and no step before it has that name"),
        ("def recipe(): return Recipe('r', (a, a), None)", "two steps are called a"),
        ("def recipe(): return Recipe('r', (a,), Comparison(('c',), 'q'))", "no step is called c; choose from a"),
        ("def recipe(): return 1 / 0", "line 4: ZeroDivisionError: division by zero"),
    ],
)
def test_a_chain_that_does_not_hold_together(tmp_path: Path, body: str, said: str) -> None:
    (tmp_path / "r.py").write_text(HEAD + body)
    with pytest.raises(UserError, match=r".") as error:
        load_recipe(str(tmp_path / "r.py"))
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("flag", ["--sf.train.epochs", "--train.epochs", "--town.x", "--sft"])
def test_a_flag_for_no_training(flag: str) -> None:
    with pytest.raises(UserError, match=r"begin with the training that it is for: --pretrain"):
        words_for(load_recipe(str(TINY)), [flag, "3"])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_configs_of_a_shipped_recipe(path: Path, tmp_path: Path) -> None:
    """Each is made of the run folders of those before it, which lack nothing but their weights."""
    found = load_recipe(str(path))
    for step in (step for step in found.steps if not writes_files(step)):
        config = config_of(step, tmp_path, [])
        assert config.run == str(tmp_path / step.__name__)
        tokenizer = load_tokenizer("bytes")  # in the place of one that a step would make
        fill_run(tmp_path / step.__name__, replace(config, model=replace(config.model, vocab_size=50_304)), tokenizer)


# The chain itself, tiny

SIZES = {
    "pretrain": [
        "model.num_layers 1",
        "model.embed_dim 16",
        "optimizer.warmup_tokens 0",
        "train.total_steps 3",
        "train.batch_size 8",
    ],
    "sft": ["train.epochs 0", "train.total_steps 4", "train.eval_batches 1"],
    "reward": ["train.epochs 0", "train.total_steps 2", "train.eval_batches 1"],
    "ppo": ["train.total_steps 2", "rollout.episodes 8", "rollout.epochs 1", "rollout.slots 8"],
}
SIZES["ppo"] += ["train.batch_size 8", "train.micro_batch_size 8", "rollout.max_tokens 8"]
RECIPE = f"""
import sys
sys.path.insert(0, {str(TINY.parent)!r})
from dataclasses import replace
import recipe_tiny
from recipe_tiny import *
from gptjax.recipe import town as world

world.MOST_TOKENS, world.REPLIES, world.ROUNDS = 8, 2, 1
world.gold = lambda prompt, reply: len(reply) / 9  # of ways that a model of this size tells none arrives

def rankings(folder, town, sft):
    world.rankings(folder, town, sft)

def recipe():
    whole = recipe_tiny.recipe()
    steps = (town, tokenizer, pretrain, sft, rankings, reward, ppo)
    return replace(whole, steps=steps, comparison=replace(whole.comparison, most=3, replies=2, max_tokens=8))
"""


def words(**more: list[str]) -> list[str]:
    flat = [f"--{step}.{each}" for step, sizes in SIZES.items() for each in (*sizes, *more.get(step, []))]
    return [word for each in flat for word in each.split()]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """The recipe's file, its folder after a whole chain, and what that printed."""
    base = tmp_path_factory.mktemp("recipe")
    (base / "tiny.py").write_text(RECIPE)
    done = chain(base / "tiny.py", base / "all", words())
    assert done.returncode == 0, done.stderr
    return base / "tiny.py", base / "all", done.stdout


def chain(file: Path, folder: Path, given: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gptjax", "recipe", file, "--folder", folder, *given]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=ROOT, env=environment())


def said(text: str) -> dict[str, str]:
    """What was said of each step."""
    lines = [line for line in text.splitlines() if line.startswith("[")]
    return dict(line.split("] ", 1)[1].split(": ", 1) for line in lines)  # type: ignore[misc]


@pytest.mark.slow
def test_a_chain_and_its_page(made: tuple[Path, Path, str]) -> None:
    _, folder, text = made
    assert {*said(text).values()} == {"not there yet"}
    page = (folder / "report.html").read_text()
    found = json.loads((folder / "evaluation" / "replies.json").read_text())
    assert [*found["models"]] == ["pretrain", "sft", "ppo"] and len(found["questions"]) == 3
    assert all(len(texts) == 2 for model in found["models"].values() for texts in model["replies"])
    assert [(each["of"], each["over"], each["by"]) for each in found["wins"]] == [
        (later, former, by) for former, later in pairwise(found["models"]) for by in ("gold", "reward")
    ]
    assert page.count("data:image/png") == 3 and "How do I get from" in page and "http" not in page.replace("http-", "")
    assert any("gold" in record and record["kind"] == "train" for record in read_log(folder / "ppo" / LOG))


@pytest.mark.slow
def test_what_has_changed_is_made_again_and_nothing_else(made: tuple[Path, Path, str]) -> None:
    """Twice the same: nothing runs. Another learning rate of the reward model: that, and what is made of it."""
    file, folder, _ = made
    before = {path.name: (path / LOG).read_bytes() for path in folder.iterdir() if (path / LOG).is_file()}
    again = chain(file, folder, words(pretrain=["train.log_interval 3"]))
    assert again.returncode == 0 and {*said(again.stdout).values()} == {"done, and nothing it is made from has changed"}
    assert all((folder / name / LOG).read_bytes() == log for name, log in before.items())

    other = chain(file, folder, words(reward=["optimizer.learning_rate 0.002"]))
    assert other.returncode == 0, other.stderr
    lines = said(other.stdout)
    assert lines.pop("reward") == "made again: optimizer.learning_rate was 0.0005 and is 0.002"
    assert lines.pop("ppo") == "made again: reward has changed"
    assert lines.pop("evaluation") == "made again: ppo has changed, reward has changed"
    assert {*lines.values()} == {"done, and nothing it is made from has changed"}
    assert (folder / "sft" / LOG).read_bytes() == before["sft"]


@pytest.mark.slow
def test_a_chain_that_is_stopped_goes_on(made: tuple[Path, Path, str], tmp_path: Path) -> None:
    """In a training by a signal, and in a step that writes files by a kill: the same replies to rank as of one that was
    not."""
    file, whole, _ = made
    folder = tmp_path / "all"
    for name in ("town", "tokenizer", "pretrain"):
        shutil.copytree(whole / name, folder / name)
    notes = json.loads((whole / "steps.json").read_text())
    (folder / "steps.json").write_text(json.dumps({name: notes[name] for name in ("town", "tokenizer", "pretrain")}))

    def until(sign: str, *given: str) -> tuple[int, str]:
        """Its status and what it printed, of a chain that is stopped once it has printed that."""
        command = [sys.executable, "-m", "gptjax", "recipe", file, "--folder", folder, *words(), *given]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment())
        assert process.stdout
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith(sign):
                process.send_signal(signal.SIGTERM)
        return process.wait(timeout=300), "".join(lines)

    status, text = until("step 1 ", "--sft.train.log_interval", "1")
    assert status == 128 + signal.SIGTERM
    assert said(text)["pretrain"] == "done, and nothing it is made from has changed"
    (folder / "rankings.half").mkdir()  # what a kill leaves of a step that writes files
    (folder / "rankings.half" / "rankings.jsonl").write_text("half")
    _, text = until("[6/8] reward")
    assert said(text)["sft"] == "goes on"
    assert not (folder / "rankings.half").exists()
    assert (folder / "rankings" / "rankings.jsonl").read_bytes() == (whole / "rankings" / "rankings.jsonl").read_bytes()


def test_two_starts_at_once(tmp_path: Path) -> None:
    """The second is refused."""
    held = RunLock(tmp_path, print)
    with pytest.raises(UserError, match="is at work on it"):
        cli.run(["recipe", str(TINY), "--folder", str(tmp_path)])
    held.release()
    assert {path.name for path in tmp_path.iterdir()} <= {"lock"}
