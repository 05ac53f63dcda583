"""The launch scripts against fake gcloud, sbatch and srun: a dry run prints exactly what a real run executes."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
TPU, SLURM, LOCAL = (ROOT / "launch" / name for name in ("tpu_pod.sh", "slurm.sh", "local.sh"))
BASH = shutil.which("bash") or "bash"
WHERE = ["--name", "gpt3", "--zone", "us-east5-a"]
JOB = ["--nodes", "2", "--gpus-per-node", "4", "--time", "24:00:00", "--run", "runs/a"]
AFTER = " (what gptjax run is to get goes after --)"
CONFIG = str(ROOT / "configs/quickstart.py")
AWKWARD = ["--train.sample_prompt", """it's "x" $HOME `id` & \\ * ;""", "--data.source", "", "--name", "~/a b"]
RECORD = r"""#!/usr/bin/env bash
printf '%s\0' "${0##*/}" "$@" $'\n' >>"$FAKE/calls" # in one write: several may be at it
"""
TPU_COMMANDS = {
    "create": ["create", "--type", "v5p-1024", "--slices=2", "--project", "my project", "--gcloud=--network=my net"],
    "install": ["install", "--bucket", "gs://bucket"],
    "run": ["run", "--", "configs/x.py", *AWKWARD],
    "logs": ["logs", "--worker=3", "--node=1"],
    "stop": ["stop"],
    "status": ["status"],
    "delete": ["delete"],
}


class Fakes:
    """A folder of commands that only write down how they were called, first in PATH; and the scripts run there, the
    TPU's from a clone without local edits."""

    def __init__(self, folder: Path, clone: Path) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.bin = folder / "bin"
        self.tpu = clone / "launch/tpu_pod.sh"
        self.home.mkdir()
        self.bin.mkdir()
        drop = ("TPU_", "SLURM_", "SBATCH_", "TMPDIR")
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(drop)}
        self.environment |= {"FAKE": str(folder), "HOME": str(self.home), "PATH": f"{self.bin}:{os.environ['PATH']}"}
        self.environment |= {"TMPDIR": str(folder)}

    def add(self, name: str, then: str = "") -> None:
        self.write(self.bin / name, RECORD + then)

    def write(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def bash(self, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [BASH, *arguments],
            env=self.environment | environment,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self) -> list[list[str]]:
        file = self.folder / "calls"
        return [call.split("\0") for call in file.read_text().split("\0\n\0")[:-1]] if file.exists() else []


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A git clone with a launch folder, of two commits, in a folder whose name wants quoting."""
    folder = tmp_path_factory.mktemp("it's a") / "clone"
    (folder / "launch").mkdir(parents=True)
    shutil.copy(TPU, folder / "launch")
    commit(folder, "first")
    (folder / "configs").mkdir()
    (folder / "configs/x.py").write_text("# a config\n")
    commit(folder, "second")
    return folder


def commit(folder: Path, message: str) -> None:
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", message]):
        subprocess.run([*git, *words], check=True)


def head(folder: Path) -> str:
    done = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def fakes(tmp_path: Path, clone: Path) -> Fakes:
    fakes = Fakes(tmp_path, clone)
    state = 'case $* in *describe*) read -r s <"$FAKE/states"; echo "$s"; sed 1d "$FAKE/states" >"$FAKE/left"'
    state += '; mv "$FAKE/left" "$FAKE/states" ;; esac'
    fakes.add("gcloud", state)
    fakes.add("sbatch", 'cat >"$FAKE/script"')
    fakes.add("gptjax")
    fakes.add("sleep")
    (tmp_path / "states").write_text("ACTIVE\n")
    return fakes


def dry(fakes: Fakes, script: Path, *arguments: str) -> str:
    made = fakes.bash(script, *arguments, "--dry-run")
    assert made.returncode == 0, made.stderr
    assert fakes.calls() == []
    return made.stdout


def remote(fakes: Fakes, *arguments: str) -> str:
    """The command that ssh would hand to each host's shell."""
    calls = [shlex.split(line) for line in dry(fakes, fakes.tpu, *WHERE, *arguments).splitlines()]
    (command,) = (word for call in calls for word in call if word.startswith("--command="))
    return command.removeprefix("--command=")


QUEUED = "gcloud compute tpus queued-resources"


@pytest.mark.parametrize(
    ("more", "asked"),
    [
        (["--spot"], "--node-id=gpt3 --accelerator-type=v5p-1024 --runtime-version=v2-alpha-tpuv5 --spot"),
        (
            ["--slices", "4", "--gcloud=--reserved", "--gcloud", "--valid-until-duration=6h"],
            "--node-count=4 --node-prefix=gpt3 --accelerator-type=v5p-1024 --runtime-version=v2-alpha-tpuv5 --reserved "
            "--valid-until-duration=6h",
        ),
    ],
)
def test_create_asks_for_the_slices_then_for_their_state(fakes: Fakes, more: list[str], asked: str) -> None:
    assert dry(fakes, TPU, *WHERE, "create", "--type=v5p-1024", "--project", "my project", *more).splitlines() == [
        f"{QUEUED} create gpt3 --zone=us-east5-a '--project=my project' {asked}",
        f"{QUEUED} describe gpt3 --zone=us-east5-a '--project=my project' '--format=value(state.state)'",
    ]


GOING = 'pid=$(cat ~/gptjax.pid 2>/dev/null) && grep -qas gptjax "/proc/$pid/cmdline"'


def test_the_other_tpu_commands(fakes: Fakes) -> None:
    ssh = f"{QUEUED} ssh gpt3 --zone=us-east5-a"
    assert dry(fakes, TPU, *WHERE, "logs") == f"{ssh} --node=0 --worker=0 '--command=tail -n 100 -F ~/gptjax.log'\n"
    assert dry(fakes, TPU, *WHERE, "stop").startswith(f"{ssh} --node=all --worker=all '--command=")
    assert remote(fakes, "stop") == (
        f'{{ {GOING} && touch ~/gptjax.stopped && kill -TERM "$pid"; }} 2>/dev/null '
        '|| { echo "not training"; exit 0; }; for _ in $(seq 600); do kill -0 "$pid" 2>/dev/null || exit 0; sleep 1; '
        "done; echo 'error: still saving after 600 s; see logs' >&2; exit 1"
    )
    assert (
        dry(fakes, TPU, *WHERE, "status") == f"{QUEUED} describe gpt3 --zone=us-east5-a '--format=value(state.state)'\n"
    )
    assert dry(fakes, TPU, *WHERE, "delete") == f"{QUEUED} delete gpt3 --zone=us-east5-a --force\n"
    assert remote(fakes, "run", "--", "configs/x.py", "--run", "runs/a") == (
        f"set -e; cd ~/gptjax; if {GOING}; then "
        'echo "error: already training, process $pid; stop it first" >&2; exit 1; fi; '
        "rm -f ~/gptjax.pid ~/gptjax.status ~/gptjax.stopped; "
        "nohup sh -c '.venv/bin/gptjax run --distributed configs/x.py --run runs/a & echo $! >~/gptjax.pid; wait $!; "
        "case $? in 0) echo done ;; 130 | 143) ;; *) echo failed ;; esac >~/gptjax.status' "
        ">>~/gptjax.log 2>&1 </dev/null & until [ -s ~/gptjax.pid ]; do sleep 0.1; done"
    )


def test_install_packs_the_commit_and_sends_it(fakes: Fakes) -> None:
    packed, root = fakes.folder / f"gptjax-{head(fakes.tpu.parent)}", fakes.tpu.parents[1]
    made = [shlex.split(line) for line in dry(fakes, fakes.tpu, *WHERE, "install").splitlines()]
    assert made[:3] == [
        ["rm", "-rf", str(packed)],
        ["git", "clone", "-q", "--bare", "--depth", "1", f"file://{root}", str(packed)],
        ["tar", "-C", str(packed), "-czf", f"{packed}.tgz", "."],
    ]
    every = ["--zone=us-east5-a", "--node=all", "--worker=all"]
    assert made[3] == [*QUEUED.split(), "scp", f"{packed}.tgz", "gpt3:gptjax.tgz", *every]
    assert made[4][:-1] == [*QUEUED.split(), "ssh", "gpt3", *every]
    assert made[5:] == [["rm", "-rf", str(packed), f"{packed}.tgz"]]


@pytest.mark.parametrize("verb", ["resume", "watch"])
def test_what_a_watch_would_do_is_rehearsed(fakes: Fakes, verb: str) -> None:
    words = [*WHERE, "--type=v5e-8", "--runtime-version=x", "--spot", "--delete-when-done"]
    what = ["--", "configs/x.py", "--run", "runs/it's a"]
    made = fakes.bash(fakes.tpu, *words, verb, *what, "--dry-run")
    parts = {word: dry(fakes, fakes.tpu, *words, word).splitlines() for word in ("status", "create", "install")}
    start = remote(fakes, "run", *what).replace(
        'echo "error: already training, process $pid; stop it first" >&2; exit 1', "exit 0"
    )
    ssh, end = [*QUEUED.split(), "ssh", "gpt3"], f"{QUEUED} delete gpt3 --zone=us-east5-a --force --quiet"
    lines = made.stdout.splitlines()
    packs = parts["install"][:3]
    assert lines[:3] == packs and lines.pop() == parts["install"].pop()  # and removed at the end
    lines = lines[3:]
    assert lines[:3] == [parts["status"][0], end, parts["create"][0]]
    look = shlex.split(lines[3])
    assert look[: len(ssh)] == ssh and r"ls 'runs/it'\''s a/checkpoints' 2>/dev/null" in look[-1]
    assert lines[4:-2] == parts["install"][3:]
    assert shlex.split(lines[-2])[-1] == f"--command={start}"
    assert lines[-1] == end
    assert [line for line in made.stderr.splitlines() if line.startswith("#")] == [
        "# every minute, by the state of the request:",
        "# FAILED or SUSPENDED:",
        "# none:",
        "# ACTIVE: what do the hosts do?",
        "# one of them does not train:",
        "# training is done:",
    ]


@pytest.mark.parametrize("verb", TPU_COMMANDS)
def test_tpu_executes_what_the_dry_run_prints(fakes: Fakes, verb: str) -> None:
    printed = dry(fakes, fakes.tpu, *WHERE, *TPU_COMMANDS[verb])
    expected = [words for line in printed.splitlines() if (words := shlex.split(line))[0] == "gcloud"]
    assert expected
    made = fakes.bash(fakes.tpu, *WHERE, *TPU_COMMANDS[verb])
    assert made.returncode == 0, made.stderr
    assert fakes.calls() == expected
    (fakes.folder / "calls").unlink()
    assert fakes.bash("-c", printed).returncode == 0  # pasted
    assert fakes.calls() == expected


@pytest.mark.parametrize("verb", ["install", "run", "logs", "stop"])
def test_hosts_can_parse_their_command(fakes: Fakes, verb: str) -> None:
    for shell in filter(None, (BASH, shutil.which("dash"))):
        command = remote(fakes, *TPU_COMMANDS[verb])
        assert subprocess.run([shell, "-n", "-c", command], capture_output=True, text=True).stderr == ""


def test_flags_come_from_the_environment_and_in_any_order(fakes: Fakes) -> None:
    expected = dry(fakes, TPU, *WHERE, "create", "--type", "v6e-8")
    environment = {"TPU_NAME": "gpt3", "TPU_ZONE": "us-east5-a", "TPU_TYPE": "v6e-8"}
    assert fakes.bash(TPU, "--dry-run", "create", **environment).stdout == expected
    assert fakes.bash(TPU, "--type=v6e-8", "create", "--dry-run", "--name=gpt3", "--zone=us-east5-a").stdout == expected
    assert "v2-alpha-tpuv6e" in expected


@pytest.mark.parametrize(
    ("states", "status", "last"),
    [
        ("WAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE\n", 0, "gpt3: ACTIVE"),
        ("PROVISIONING\nFAILED\n", 1, "error: --name gpt3: FAILED; delete it, then create it again"),
        (
            "WAITING\n" * 9,
            1,
            "error: --name gpt3: still WAITING after 1 minutes, and in the queue; "
            "status looks again, delete gives it up",
        ),
    ],
)
def test_create_waits_but_not_for_ever(fakes: Fakes, states: str, status: int, last: str) -> None:
    (fakes.folder / "states").write_text(states)
    made = fakes.bash(TPU, *WHERE, "create", "--type=v5p-8", "--wait=1")
    assert (made.returncode, made.stderr.splitlines()[-1]) == (status, last)
    assert fakes.calls().count(["sleep", "30"]) == min(states.count("\n") - 1, 2)


HOSTS = r"""
case $* in
  *' create '*) echo ACTIVE >"$FAKE/state" ;;
  *' delete '*) rm -rf "$FAKE/state" "$HOME"; mkdir "$HOME" ;; # the disk goes, too
  *' describe '*)
    if [ ! -e "$FAKE/state" ]; then echo 'ERROR: NOT_FOUND: no such resource' >&2; exit 1; fi
    case $* in *state.state*) cat "$FAKE/state" ;; *) echo SERVICE ;; esac ;;
  *' scp '*) cp "$5" "$HOME/${6#*:}" ;;
  *' ssh '*) bash -c "${!#:10}" ;;
esac
"""
"""A cloud of one host, whose home is $HOME: what ssh is to run there is run."""
PYTHON = r"""
if [ "$2" = venv ]; then
  mkdir -p .venv/bin
  cp "$FAKE/pip" .venv/bin/pip
  cp "$FAKE/trainer" .venv/bin/gptjax
fi
"""


@pytest.fixture
def cloud(fakes: Fakes) -> Fakes:
    """With hosts that live: Python, the bucket and a trainer, all of them scripts."""
    fakes.add("gcloud", HOSTS)
    fakes.add("python3", PYTHON)
    fakes.add("gcsfuse", 'rmdir "$HOME/gptjax-bucket"; ln -s "$FAKE/bucket" "$HOME/gptjax-bucket"')
    fakes.add("mountpoint", '[ -L "$HOME/gptjax-bucket" ]')
    fakes.write(fakes.folder / "pip", RECORD)
    (fakes.folder / "bucket").mkdir()
    return fakes


def called(fakes: Fakes, name: str) -> list[list[str]]:
    return [call[1:] for call in fakes.calls() if call[0] == name]


ON_HOSTS = {"tar -xzf": "install", "nohup": "start", "kill -TERM": "stop"}


def done(fakes: Fakes) -> list[str]:
    """What the cloud was told to do, without what only looks."""
    told = []
    for call in called(fakes, "gcloud"):
        what = [word for mark, word in ON_HOSTS.items() if mark in call[-1]] if call[3] == "ssh" else [call[3]]
        told += [word for word in what if word != "describe"]
    return told


def test_install_brings_the_commit_and_the_bucket_to_a_host(cloud: Fakes, tmp_path: Path) -> None:
    cloud.write(cloud.folder / "trainer", "")
    copy = tmp_path / "copy"
    shutil.copytree(cloud.tpu.parents[1], copy)
    install = [copy / "launch/tpu_pod.sh", *WHERE, "install", "--bucket", "gs://bucket"]
    for _ in range(2):  # a second install does no harm
        made = cloud.bash(*install)
        assert (made.returncode, made.stderr) == (0, f"installs commit {head(copy)}\n")
    host = cloud.home / "gptjax"
    assert head(host) == head(copy)
    assert (host / "configs/x.py").is_file()
    (host / "runs").resolve().samefile(cloud.folder / "bucket/runs")
    assert called(cloud, "pip") == [["install", "-q", "-c", "constraints.txt", "-e", ".[tpu]"]] * 2
    (mount,) = called(cloud, "gcsfuse")
    assert mount[-2:] == ["bucket", str(cloud.home / "gptjax-bucket")]
    assert not [*cloud.folder.glob("gptjax-*")]

    (copy / "configs/x.py").unlink()  # what a commit takes away goes on the hosts, too
    made = cloud.bash(*install)
    error = f"error: install: ships a commit, and configs/x.py in {copy} is not as committed; commit it, or undo\n"
    assert (made.returncode, made.stderr) == (1, error)
    commit(copy, "third")
    assert cloud.bash(*install).returncode == 0
    assert head(host) == head(copy) and not (host / "configs/x.py").exists()
    (copy / "mine.py").write_text("# not committed\n")
    assert "ships a commit, and mine.py in" in cloud.bash(*install).stderr


def test_install_wants_a_clone(fakes: Fakes) -> None:
    script = fakes.folder / "bare/launch/tpu_pod.sh"
    fakes.write(script, TPU.read_text())
    made = fakes.bash(script, "install", *WHERE, "--dry-run", GIT_CEILING_DIRECTORIES=str(fakes.folder))
    assert made.stderr == f"error: install: {script.parent}/.. is no git clone with a commit to install\n"


def test_run_and_stop_on_a_host(cloud: Fakes) -> None:
    cloud.write(
        cloud.folder / "trainer",
        "#!/usr/bin/env bash\ntrap 'touch ~/saved; exit 143' TERM\n"
        + RECORD
        + "for i in {1..900}; do /bin/sleep 0.02; done\n",
    )
    assert cloud.bash(cloud.tpu, *WHERE, "install").returncode == 0
    run, stop = remote_of(cloud, *TPU_COMMANDS["run"]), remote_of(cloud, "stop")
    (cloud.folder / "calls").unlink()
    story = f"{run}\nuntil grep -qas gptjax $FAKE/calls; do :; done\n({run}) && exit 9\n{stop}"
    made = cloud.bash("-c", story)
    assert made.returncode == 0
    assert re.fullmatch(r"error: already training, process \d+; stop it first\n", made.stderr)
    assert called(cloud, "gptjax")[0] == ["run", "--distributed", "configs/x.py", *AWKWARD]
    assert (cloud.home / "saved").exists() and (cloud.home / "gptjax.log").exists()
    assert cloud.bash("-c", stop).stdout == "not training\n"


def remote_of(fakes: Fakes, *arguments: str) -> str:
    made = fakes.bash(fakes.tpu, *WHERE, *arguments, "--dry-run")
    return shlex.split(made.stdout)[-1].removeprefix("--command=")


# What the n-th start of the trainer does; it leaves checkpoint n of the run in the bucket, where it gets that far.
LIFE = r"""#!/usr/bin/env bash
echo x >>"$FAKE/starts"
n=$(grep -c x "$FAKE/starts")
save() { mkdir -p "runs/a/checkpoints/$1"; }
"""
MINUTE = '[ "$1" != 60 ] || /bin/sleep 0.3'
WATCH = ["watch", *WHERE, "--type=v5p-8", "--spot", "--bucket=b"]
WHAT = ["--", "configs/x.py", "--run", "runs/a"]


BEGIN = ["scp", "install", "start"]
NEW = ["create", *BEGIN]


@pytest.mark.parametrize(
    ("life", "more", "status", "last", "told"),
    [
        ("save 5", ["--delete-when-done"], 0, "gpt3: done ", [*NEW, "delete"]),
        # taken away twice, and the disk with it
        (
            'save $n; if [ $n -lt 3 ]; then echo SUSPENDED >"$FAKE/state"; exit 143; fi',
            [],
            0,
            "gpt3: done ",
            [*NEW, "delete", *NEW, "delete", *NEW],
        ),
        # told to end by a host that started again: not the user's stop
        ("save $n; if [ $n -lt 3 ]; then exit 143; fi", [], 0, "gpt3: done ", ["create", *BEGIN * 3]),
        ("save $n; touch ~/gptjax.stopped; exit 143", [], 0, "gpt3: was stopped", NEW),
        (
            "save 5; exit 1",
            [],
            1,
            "error: --name gpt3: a host gave up; see logs, and mend it. The chips cost until delete",
            NEW,
        ),
        (
            "save 1; exit 143",
            ["--tries=2"],
            1,
            "error: --name gpt3: is no further: no new checkpoint in 2 tries; see logs. The chips cost until delete",
            ["create", *BEGIN * 3, "scp", "install"],
        ),
    ],
)
def test_watch_brings_a_run_to_its_end(
    cloud: Fakes, life: str, more: list[str], status: int, last: str, told: list[str]
) -> None:
    cloud.write(cloud.folder / "trainer", LIFE + life + "\n")
    cloud.add("sleep", MINUTE)
    made = cloud.bash(cloud.tpu, *WATCH, *more, *WHAT)
    assert (made.returncode, made.stderr.splitlines()[-1]) == (status, last), made.stderr
    assert done(cloud) == told


def test_watch_stays_with_its_commit(cloud: Fakes, tmp_path: Path) -> None:
    """Although the clone goes on while it watches: its edits would end an install, a new commit change the run."""
    copy = tmp_path / "copy"
    shutil.copytree(cloud.tpu.parents[1], copy)
    first = head(copy)
    life = (
        f'save $n; [ $n = 1 ] || exit 0; echo "# more" >>"{copy}/configs/x.py"; echo SUSPENDED >"$FAKE/state"; exit 143'
    )
    cloud.write(cloud.folder / "trainer", LIFE + life + "\n")
    cloud.add("sleep", MINUTE)
    made = cloud.bash(copy / "launch/tpu_pod.sh", *WATCH, *WHAT)
    assert (made.returncode, done(cloud)) == (0, [*NEW, "delete", *NEW]), made.stderr
    assert head(cloud.home / "gptjax") == first
    assert not [*cloud.folder.glob("gptjax-*")]


def test_resume_brings_back_what_is_gone_and_ends_when_it_trains(cloud: Fakes) -> None:
    cloud.write(cloud.folder / "trainer", LIFE + "for i in {1..300}; do /bin/sleep 0.1; done\n")
    (cloud.folder / "state").write_text("SUSPENDED\n")
    cloud.add("sleep", MINUTE)
    resume = [cloud.tpu, "resume", *WATCH[1:], *WHAT]
    for _ in range(2):  # it trains the second time: nothing to do
        made = cloud.bash(*resume)
        assert (made.returncode, made.stderr.splitlines()[-1]) == (0, "gpt3: training "), made.stderr
        assert done(cloud) == ["delete", *NEW]
    assert cloud.bash(cloud.tpu, "stop", *WHERE).returncode == 0
    assert cloud.bash(*resume).stderr.splitlines()[-1] == "gpt3: training "
    assert cloud.bash(cloud.tpu, "stop", *WHERE).returncode == 0
    assert done(cloud) == ["delete", *NEW, "stop", *BEGIN, "stop"]


@pytest.mark.parametrize("status", [0, 1])
def test_how_an_earlier_start_ended_is_no_news(cloud: Fakes, status: int) -> None:
    """The same slice trains on with other words, or after what was wrong is mended."""
    cloud.write(cloud.folder / "trainer", LIFE + f"[ $n != 1 ] || exit {status}\n")
    cloud.add("sleep", MINUTE)
    assert cloud.bash(cloud.tpu, *WATCH, *WHAT).returncode == status
    again = cloud.bash(cloud.tpu, *WATCH, *WHAT, "--train.total_tokens", "2e9")
    assert again.returncode == 0, again.stderr
    assert done(cloud) == [*NEW, *BEGIN]


@pytest.mark.parametrize(
    ("state", "told", "seconds"),
    [
        ("WAITING_FOR_RESOURCES", [], ["60", "60", "60"]),
        ("A_WORD_OF_TOMORROW", [], ["60", "60", "60"]),
        ("FAILED", [*["delete", "create"] * 3], ["120", "240", "480"]),
    ],
)
def test_watch_waits_for_room(cloud: Fakes, state: str, told: list[str], seconds: list[str]) -> None:
    """The third pause ends the test: a watch has no end of its own while slices are scarce."""
    cloud.write(cloud.folder / "trainer", "")
    (cloud.folder / "state").write_text(state + "\n")
    cloud.add("sleep", '[ "$(grep -c ^sleep "$FAKE/calls")" -lt 3 ] || kill $PPID')
    cloud.add("gcloud", HOSTS.replace("echo ACTIVE", f"echo {state}"))
    made = cloud.bash(cloud.tpu, *WATCH, *WHAT)
    assert made.returncode == -15
    pauses = [words[0] for words in called(cloud, "sleep")]
    assert (done(cloud), pauses) == (told, seconds)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "subcommand missing: choose from create install run logs status stop resume watch delete"),
        (["start"], "start: choose from create install run logs status stop resume watch delete"),
        (["status", "--zone=z"], "--name: missing; name the queued resource, such as --name gpt3, or set TPU_NAME"),
        (["status", "--name=n"], "--zone: missing; name the zone, such as --zone us-east5-a, or set TPU_ZONE"),
        (["status", "--name"], f"--name: a value is missing; see {TPU} --help"),
        (["run", "--name", "--", "x"], f"--name: a value is missing; see {TPU} --help"),
        (["run", *WHERE], "run: nothing to train; add -- configs/NAME.py --run runs/NAME"),
        (
            ["run", *WHERE, "--", "--resume", "runs/a"],
            "--resume: the words that started a run go on with it, too: CONFIG --run runs/NAME",
        ),
        (
            ["watch", *WHERE, "--", "x.py"],
            "watch: after -- give --run, such as --run runs/a: its checkpoints show whether the run gets on",
        ),
        (["create", *WHERE, "--type=v5p-8", "--slices=0"], "--slices 0: must be a whole number from 1, such as 2"),
        (["watch", *WHERE, "--tries=0", "--", "x", "--run=a"], "--tries 0: must be a whole number from 1, such as 5"),
        (["run", *WHERE, "x.py"], "x.py: unexpected after run; what gptjax run is to get goes after --"),
        (["stop", *WHERE, "--", "x"], "x: only run, resume and watch take arguments after --"),
        (["status", "--nam=x"], f"--nam: no such flag; see {TPU} --help{AFTER}"),
        (["create", *WHERE], "--type: missing; name the slice, such as --type v5p-1024, or set TPU_TYPE"),
        (
            ["create", *WHERE, "--type=h100-8"],
            "--type h100-8: unknown; use v2- v3- v4- v5litepod- v5p- v6e-N, or give --runtime-version too",
        ),
        (
            ["create", *WHERE, "--type=v5p-8", "--wait=soon"],
            "--wait soon: must be a whole number from 0, such as 120 (minutes)",
        ),
    ],
)
def test_tpu_errors_are_one_line(fakes: Fakes, arguments: list[str], error: str) -> None:
    for more in ([], ["--dry-run"]):
        made = fakes.bash(TPU, *more, *arguments)
        assert (made.returncode, made.stdout, made.stderr) == (1, "", f"error: {error}\n")
    assert fakes.calls() == []


def test_missing_tools_are_named(fakes: Fakes) -> None:
    empty = {"PATH": str(fakes.home)}
    made = fakes.bash(TPU, *WHERE, "status", **empty)
    assert made.stderr == "error: gcloud: not found; install the Google Cloud CLI, or --dry-run\n"
    (fakes.home / "seq").symlink_to(shutil.which("seq") or "")
    made = fakes.bash(SLURM, *JOB, "--", CONFIG, **empty)
    assert made.stderr == "error: sbatch: not found; run this on a login node of the cluster, or --dry-run\n"
    (fakes.home / "sbatch").symlink_to(fakes.bin / "sbatch")
    made = fakes.bash(SLURM, *JOB, "--", CONFIG, **empty)
    assert made.stderr == "error: gptjax: not found; activate the environment it is installed in\n"
    assert fakes.bash(TPU, *WHERE, "status", "--dry-run", **empty).returncode == 0


def test_shellcheck(fakes: Fakes) -> None:
    """The scripts, what hosts are to run, and a batch script."""
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck, "of the extra test"
    script = dry(fakes, SLURM, *JOB, "--", CONFIG).split("<<'GPTJAX'\n")[1].removesuffix("GPTJAX\n")
    commands = [remote(fakes, *TPU_COMMANDS[verb]) for verb in ("install", "run", "stop")]
    for text in (script, *commands):
        words = [shellcheck, "--shell=bash", "--severity=warning", "--exclude=SC2010", "-"]  # names are numbers
        checked = subprocess.run(words, input=text, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout
    scripts = sorted((ROOT / "launch").glob("*.sh"))
    assert {*scripts} == {TPU, SLURM, LOCAL}
    scripts += (ROOT / "tests/slurm").glob("*.sh")
    checked = subprocess.run([shellcheck, *scripts], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("script", [TPU, SLURM, LOCAL])
def test_help(fakes: Fakes, script: Path) -> None:
    made = fakes.bash(script, "--help")
    assert made.returncode == 0
    flags = set(re.findall(r"(--[a-z-]+)\) ", script.read_text())) - {"--help"} | {"--dry-run"}
    assert len(flags) > 4
    assert {flag for flag in flags if flag not in made.stdout} == set()
    assert made.stdout.startswith("Train ") and "set -euo" not in made.stdout


@pytest.mark.parametrize("gpus", [4, 0])
def test_slurm_prints_the_command_and_the_batch_script(fakes: Fakes, gpus: int) -> None:
    flags = [*JOB, f"--gpus-per-node={gpus}", "--partition=gpu", "--sbatch=--mem=0"]
    devices = "export JAX_LOCAL_DEVICE_IDS=0,1,2,3 # left to itself, JAX takes one GPU a process here\n" if gpus else ""
    assert dry(fakes, SLURM, *flags, "--", CONFIG, "--train.seed", "1") == (
        f"sbatch --job-name=a --nodes=2 --ntasks-per-node=1 --time=24:00:00 {'--gpus-per-node=4 ' if gpus else ''}"
        "--partition=gpu --signal=TERM@120 --requeue --open-mode=append --mem=0 <<'GPTJAX'\n"
        "#!/usr/bin/env bash\n"
        "set -euo pipefail\n"
        "newest() { ls runs/a/checkpoints 2>/dev/null | grep -x '[0-9]*' | sort -n | tail -n 1 || true; }\n"
        "before=$(newest)\n"
        f"{devices}status=0\n"
        f"srun --cpu-bind=none --wait=120 gptjax run --distributed {CONFIG} --run runs/a "
        "--train.seed 1 || status=$?\n"
        'if [ "$status" -eq 143 ] && [ "$(newest)" != "$before" ]; then # SIGTERM, and it got on\n'
        '  scontrol requeue "$SLURM_JOB_ID"\n'
        "fi\n"
        'exit "$status"\n'
        "GPTJAX\n"
    )


def test_slurm_submits_what_the_dry_run_prints(fakes: Fakes) -> None:
    line = [*JOB[:-1], "runs/it's a", "--account", "a b", "--", CONFIG, *AWKWARD]
    command, _, script = dry(fakes, SLURM, *line).removesuffix("GPTJAX\n").partition(" <<'GPTJAX'\n")
    assert fakes.bash("-n", "-c", script).stderr == ""
    made = fakes.bash(SLURM, *line)
    assert made.returncode == 0, made.stderr
    assert fakes.calls() == [shlex.split(command)]
    assert (fakes.folder / "script").read_text() == script


@pytest.mark.parametrize(
    ("status", "saves", "requeued"), [(0, True, False), (1, True, False), (143, True, True), (143, False, False)]
)
def test_slurm_job_goes_on_and_requeues_where_it_got_on(fakes: Fakes, status: int, saves: bool, requeued: bool) -> None:
    run = fakes.folder / "runs/it's a"
    fakes.bash(SLURM, *JOB[:-1], str(run), "--", CONFIG, *AWKWARD)
    steps = fakes.folder / "steps"
    fakes.add("srun", f'echo >>"{steps}"; mkdir -p "{run}/checkpoints/$(wc -l <"{steps}")"; exit {status}')
    if not saves:
        fakes.add("srun", f'mkdir -p "{run}/checkpoints/9.damaged"; exit {status}')
    fakes.add("scontrol")
    common = ["srun", "--cpu-bind=none", "--wait=120", "gptjax", "run", "--distributed"]
    what = [CONFIG, "--run", str(run)]
    for _ in range(2):  # a requeued job types the same
        (fakes.folder / "calls").unlink()
        made = fakes.bash(fakes.folder / "script", SLURM_JOB_ID="7")
        assert (made.returncode, made.stderr) == (status, "")
        assert fakes.calls() == [[*common, *what, *AWKWARD], *[["scontrol", "requeue", "7"]] * requeued]


def without(flag: str) -> list[str]:
    at = JOB.index(flag)
    return JOB[:at] + JOB[at + 2 :]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (without("--nodes"), "--nodes is missing: give a whole number from 1, such as --nodes 4"),
        ([*JOB, "--nodes=0"], "--nodes 0: give a whole number from 1, such as --nodes 4"),
        ([*JOB, "--gpus-per-node=x"], "--gpus-per-node x: give a whole number from 0, such as --gpus-per-node 8"),
        ([*JOB, "--time=soon"], "--time soon: give one such as 24:00:00"),
        (
            without("--run"),
            "--run: missing; name the run folder, such as --run runs/a, which a requeued job resumes",
        ),
        (JOB, "no config; name one after --, such as -- configs/gpt3_13b.py"),
        ([*JOB, "x.py"], "x.py: unexpected; what gptjax run is to get goes after --"),
        ([*JOB, "--", "x.py"], "config x.py: no such file; name one after --, such as -- configs/gpt3_13b.py"),
        ([*JOB, "--", CONFIG, "--run", "b"], "--run: give --run DIR before --, which resumes too"),
        (
            [*JOB, "--gpus", "4"],
            f"--gpus: no such flag; see {SLURM} --help{AFTER}",
        ),
        ([*JOB, "--account"], f"--account: a value is missing; see {SLURM} --help"),
    ],
)
def test_slurm_errors_are_one_line(fakes: Fakes, arguments: list[str], error: str) -> None:
    made = fakes.bash(SLURM, *arguments)
    assert (made.returncode, made.stdout, made.stderr) == (1, "", f"error: {error}\n")
    assert fakes.calls() == []


# Processes of one machine


def test_local_prints_the_commands(fakes: Fakes) -> None:
    where = "env JAX_COORDINATOR_ADDRESS=localhost:9000 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID="
    train = "gptjax train --distributed x.py --run 'runs/it'\\''s' &"
    flags = ["--processes", "2", "--port=9000"]
    cpu = "JAX_PLATFORMS=cpu 'XLA_FLAGS=--xla_a=1 --xla_force_host_platform_device_count=4'"
    fakes.environment["XLA_FLAGS"] = "--xla_a=1"
    made = dry(fakes, LOCAL, *flags, "--devices=4", "--", "x.py", "--run", "runs/it's")
    assert [shlex.split(line) for line in made.splitlines()] == [
        shlex.split(f"{where}{i} {cpu} {train}") for i in range(2)
    ]
    made = dry(fakes, LOCAL, *flags, "--gpus", "2", "--", "x.py", "--run", "runs/it's")
    assert [shlex.split(line) for line in made.splitlines()] == [
        shlex.split(f"{where}{i} CUDA_VISIBLE_DEVICES={2 * i},{2 * i + 1} {train}") for i in range(2)
    ]


def local(fakes: Fakes, life: str) -> subprocess.Popen[str]:
    """Three processes that live so, with their number in $JAX_PROCESS_ID."""
    fakes.write(fakes.bin / "gptjax", "#!/usr/bin/env bash\necho up\n" + life + "\n")
    (fakes.bin / "sleep").unlink(missing_ok=True)
    words = [BASH, str(LOCAL), "--processes", "3", "--", "x.py"]
    pipe = subprocess.PIPE
    heard = ["/usr/bin/env", "--default-signal=INT"]  # by what a shell starts in the background, too
    where: dict[str, Any] = {"env": fakes.environment, "cwd": fakes.folder}
    return subprocess.Popen([*heard, *words], stdout=pipe, stderr=pipe, text=True, **where)


WAIT = "for i in {1..600}; do sleep 0.1; done"


@pytest.mark.parametrize(
    ("life", "status", "said"),
    [
        ("exit 0", 0, []),
        ("sleep 0.$JAX_PROCESS_ID", 0, []),
        (
            f"trap 'echo saved; exit 143' TERM; [ $JAX_PROCESS_ID != 1 ] || exit 3; {WAIT}",
            3,
            ["[0] saved", "[2] saved"],
        ),
        (f"[ $JAX_PROCESS_ID != 2 ] || kill -9 $$; {WAIT}", 137, []),
    ],
)
def test_local_processes_end_together(fakes: Fakes, life: str, status: int, said: list[str]) -> None:
    with local(fakes, life) as processes:
        out, errors = processes.communicate(timeout=60)
    assert processes.returncode == status, errors
    assert sorted(out.splitlines()) == sorted(["[0] up", "[1] up", "[2] up", *said])


def test_local_passes_a_signal_on(fakes: Fakes) -> None:
    with local(fakes, f"trap 'echo saved; exit 143' TERM; {WAIT}") as processes:
        assert processes.stdout
        up = [processes.stdout.readline() for _ in range(3)]
        processes.send_signal(signal.SIGINT)
        out, _ = processes.communicate(timeout=30)
    assert sorted(up) == ["[0] up\n", "[1] up\n", "[2] up\n"]
    assert (processes.returncode, sorted(out.splitlines())) == (143, ["[0] saved", "[1] saved", "[2] saved"])


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--", "x.py"], "--processes is missing: give a whole number from 1, such as --processes 4"),
        (["--processes=2", "--gpus=0", "--", "x.py"], "--gpus 0: give a whole number from 1, such as --gpus 1"),
        (["--processes=2"], "nothing to train; add -- configs/NAME.py, or -- --resume runs/NAME"),
        (["x.py"], "x.py: unexpected; what gptjax train is to get goes after --"),
        (["--slices=2"], f"--slices: no such flag; see {LOCAL} --help (what gptjax train is to get goes after --)"),
    ],
)
def test_local_errors_are_one_line(fakes: Fakes, arguments: list[str], error: str) -> None:
    made = fakes.bash(LOCAL, *arguments)
    assert (made.returncode, made.stdout, made.stderr) == (1, "", f"error: {error}\n")


# The container


def test_the_container_installs_what_its_device_needs(fakes: Fakes) -> None:
    """What it copies is there; its one step that can go wrong is run, with a pip that writes down what it is told."""
    text = (ROOT / "launch/Dockerfile").read_text()
    copied = [line.split()[1:-1] for line in text.splitlines() if line.startswith("COPY ")]
    assert len(copied) == 3
    assert all((ROOT / name).exists() for names in copied for name in names)
    assert re.findall(r"^USER (\S+)", text, re.M) == ["1000"]
    (step,) = re.findall(r"^RUN (case .*?)\nCOPY", text, re.M | re.S)
    fakes.add("pip")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for device, wanted in {"cpu": ".", "cuda": ".[cuda]", "tpu": ".[tpu]"}.items():
        shutil.rmtree(fakes.folder / "gptjax", ignore_errors=True)
        assert fakes.bash("-c", step, DEVICE=device).returncode == 0
        assert called(fakes, "pip")[-1][-4:] == ["-c", "constraints.txt", "-e", wanted]
        assert device == "cpu" or device in extras
    made = fakes.bash("-c", step, DEVICE="gpu")
    assert (made.returncode, made.stderr) == (1, "DEVICE=gpu: must be cpu, cuda or tpu\n")
    assert len(called(fakes, "pip")) == 3
