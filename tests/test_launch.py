"""The launch scripts against fake gcloud, sbatch and srun: a dry run prints exactly what a real run executes."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TPU, SLURM = ROOT / "launch/tpu_pod.sh", ROOT / "launch/slurm.sh"
BASH = shutil.which("bash") or "bash"
WHERE = ["--name", "gpt3", "--zone", "us-east5-a"]
JOB = ["--nodes", "2", "--gpus-per-node", "4", "--time", "24:00:00", "--run", "runs/a"]
AFTER = " (what gptjax train is to get goes after --)"
CONFIG = str(ROOT / "configs/quickstart.py")
AWKWARD = ["--train.sample_prompt", """it's "x" $HOME `id` & \\ * ;""", "--data.source", "", "--name", "~/a b"]
RECORD = r"""#!/usr/bin/env bash
{ printf '%s\0' "${0##*/}" "$@"; printf '\n'; } >>"$FAKE/calls"
"""
TPU_COMMANDS = {
    "create": ["create", "--type", "v5p-1024", "--spot", "--project", "my project"],
    "install": ["install", "--repo", "https://example.org/it's.git", "--ref", "main", "--bucket", "gs://bucket"],
    "run": ["run", "--", "configs/x.py", *AWKWARD],
    "logs": ["logs", "--worker=3"],
    "stop": ["stop"],
    "status": ["status"],
    "delete": ["delete"],
}


class Fakes:
    """A folder of commands that only write down how they were called, first in PATH; and the scripts run there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.bin = folder / "bin"
        self.home.mkdir()
        self.bin.mkdir()
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("TPU_", "SLURM_", "SBATCH_"))}
        self.environment |= {"FAKE": str(folder), "HOME": str(self.home), "PATH": f"{self.bin}:{os.environ['PATH']}"}

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
        return [call.split("\0")[:-1] for call in file.read_text().split("\n")[:-1]] if file.exists() else []


@pytest.fixture
def fakes(tmp_path: Path) -> Fakes:
    fakes = Fakes(tmp_path)
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
    (call,) = (shlex.split(line) for line in dry(fakes, TPU, *WHERE, *arguments).splitlines())
    assert call[-1].startswith("--command=")
    return call[-1].removeprefix("--command=")


def test_create_asks_for_the_slice_then_for_its_state(fakes: Fakes) -> None:
    assert dry(fakes, TPU, *WHERE, *TPU_COMMANDS["create"]).splitlines() == [
        "gcloud compute tpus queued-resources create gpt3 --zone=us-east5-a '--project=my project' --node-id=gpt3 "
        "--accelerator-type=v5p-1024 --runtime-version=v2-alpha-tpuv5 --spot",
        "gcloud compute tpus queued-resources describe gpt3 --zone=us-east5-a '--project=my project' "
        "'--format=value(state.state)'",
    ]


def test_the_other_tpu_commands(fakes: Fakes) -> None:
    ssh = "gcloud compute tpus tpu-vm ssh gpt3 --zone=us-east5-a"
    assert dry(fakes, TPU, *WHERE, "logs") == f"{ssh} --worker=0 '--command=tail -n 100 -F ~/gptjax.log'\n"
    assert dry(fakes, TPU, *WHERE, "stop").startswith(f"{ssh} --worker=all '--command=")
    assert dry(fakes, TPU, *WHERE, "delete").split()[3:] == [
        "queued-resources", "delete", "gpt3", "--zone=us-east5-a", "--force",
    ]  # fmt: skip
    command = remote(fakes, "run", "--", "--resume", "runs/a")
    assert "nohup .venv/bin/gptjax train --distributed --resume runs/a >>~/gptjax.log 2>&1 </dev/null &" in command


@pytest.mark.parametrize("verb", TPU_COMMANDS)
def test_tpu_executes_what_the_dry_run_prints(fakes: Fakes, verb: str) -> None:
    printed = dry(fakes, TPU, *WHERE, *TPU_COMMANDS[verb])
    made = fakes.bash(TPU, *WHERE, *TPU_COMMANDS[verb])
    assert made.returncode == 0, made.stderr
    assert fakes.calls() == [shlex.split(line) for line in printed.splitlines()]
    (fakes.folder / "calls").unlink()
    assert fakes.bash("-c", printed).returncode == 0  # pasted
    assert fakes.calls() == [shlex.split(line) for line in printed.splitlines()]


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


def test_install_brings_the_commit_and_the_bucket_to_a_host(fakes: Fakes) -> None:
    repo = fakes.folder / "it's a repo"
    git = f"git -C {shlex.quote(str(repo))} -c user.name=a -c user.email=a@b"
    assert fakes.bash("-c", f"git init -q {shlex.quote(str(repo))}; {git} commit -q --allow-empty -m x").returncode == 0
    fakes.write(fakes.home / "gptjax/.venv/bin/pip", RECORD)
    fakes.add("gcsfuse")
    fakes.add("mountpoint", "exit 1")
    command = remote(fakes, "install", "--repo", str(repo), "--ref", "HEAD", "--bucket", "gs://bucket")
    for _ in range(2):  # a second install does no harm
        made = fakes.bash("-c", command)
        assert (made.returncode, made.stderr) == (0, "")
    bucket = fakes.home / "gptjax-bucket"
    pip, _, mount = fakes.calls()[:3]
    assert pip == ["pip", "install", "-q", "-c", "constraints.txt", "-e", ".[tpu]"]
    assert (mount[0], mount[-2:]) == ("gcsfuse", ["bucket", str(bucket)])
    assert (fakes.home / "gptjax/runs").readlink() == bucket / "runs"
    commits = fakes.bash("-c", f"{git} rev-parse HEAD; git -C ~/gptjax rev-parse HEAD").stdout.split()
    assert commits[0] == commits[1]


def test_install_defaults_to_this_clone(fakes: Fakes) -> None:
    clone = fakes.folder / "clone"
    script = clone / "launch/tpu_pod.sh"
    fakes.write(script, TPU.read_text())
    line = ["install", *WHERE, "--dry-run"]
    outside = {"GIT_CEILING_DIRECTORIES": str(fakes.folder)}
    assert fakes.bash(script, *line, **outside).stderr == "error: --repo: no origin here; name a git URL\n"
    git = f"cd {clone}; git -c user.name=a -c user.email=a@b"
    fakes.bash(
        "-c", f"{git} init -q; {git} commit -q --allow-empty -m x; git remote add origin https://example.org/r.git"
    )
    commit = fakes.bash("-c", f"{git} rev-parse HEAD").stdout.strip()
    made = fakes.bash(script, *line)
    assert f"git fetch -q --depth 1 https://example.org/r.git {commit};" in made.stdout
    assert made.stderr.startswith("no --bucket: ")


def test_run_and_stop_on_a_host(fakes: Fakes) -> None:
    trainer = fakes.home / "gptjax/.venv/bin/gptjax"
    fakes.write(
        trainer,
        "#!/usr/bin/env bash\ntrap 'touch ~/saved; exit 143' TERM\n"
        + RECORD
        + "for i in {1..900}; do /bin/sleep 0.02; done\n",
    )
    run, stop = remote(fakes, *TPU_COMMANDS["run"]), remote(fakes, "stop")
    story = f"{run}\nuntil [ -s $FAKE/calls ]; do :; done\n({run}) && exit 9\n{stop}"
    made = fakes.bash("-c", story)
    assert made.returncode == 0
    assert re.fullmatch(r"error: already training, process \d+; stop it first\n", made.stderr)
    assert fakes.calls()[0] == ["gptjax", "train", "--distributed", "configs/x.py", *AWKWARD]
    assert (fakes.home / "saved").exists() and (fakes.home / "gptjax.log").exists()
    assert fakes.bash("-c", stop).stdout == "not training\n"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "subcommand missing: choose from create install run logs stop status delete"),
        (["start"], "start: choose from create install run logs stop status delete"),
        (["status", "--zone=z"], "--name: missing; name the queued resource, such as --name gpt3, or set TPU_NAME"),
        (["status", "--name=n"], "--zone: missing; name the zone, such as --zone us-east5-a, or set TPU_ZONE"),
        (["status", "--name"], f"--name: a value is missing; see {TPU} --help"),
        (["run", "--name", "--", "x"], f"--name: a value is missing; see {TPU} --help"),
        (["run", *WHERE], "run: nothing to train; add -- configs/NAME.py, or -- --resume runs/NAME"),
        (["run", *WHERE, "x.py"], "x.py: unexpected after run; what gptjax train is to get goes after --"),
        (["stop", *WHERE, "--", "x"], "x: only run takes arguments after --"),
        (["status", "--nam=x"], f"--nam: no such flag; see {TPU} --help{AFTER}"),
        (["create", *WHERE], "--type: missing; name the slice, such as --type v5p-1024, or set TPU_TYPE"),
        (
            ["create", *WHERE, "--type=h100-8"],
            "--type h100-8: unknown; use v2- v3- v4- v5litepod- v5p- v6e-N, or give --runtime-version too",
        ),
        (
            ["create", *WHERE, "--type=v5p-8", "--wait=soon"],
            "--wait soon: must be a whole number of minutes, such as 120",
        ),
        (
            ["install", *WHERE, "--repo=https://me:secret@example.org/r", "--ref=main"],
            "--repo: the URL holds a password or token, which every host would keep",
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


@pytest.mark.parametrize("script", [TPU, SLURM])
def test_help(fakes: Fakes, script: Path) -> None:
    made = fakes.bash(script, "--help")
    assert made.returncode == 0
    flags = set(re.findall(r"(--[a-z-]+)\) ", script.read_text())) - {"--help"} | {"--dry-run"}
    assert len(flags) > 6
    assert {flag for flag in flags if flag not in made.stdout} == set()
    assert made.stdout.startswith("Train on ") and "set -euo" not in made.stdout


def test_slurm_prints_the_command_and_the_batch_script(fakes: Fakes) -> None:
    assert dry(fakes, SLURM, *JOB, "--partition=gpu", "--sbatch=--mem=0", "--", CONFIG, "--train.seed", "1") == (
        "sbatch --job-name=a --nodes=2 --ntasks-per-node=1 --gpus-per-node=4 --time=24:00:00 --partition=gpu "
        "--signal=TERM@120 --requeue --open-mode=append --mem=0 <<'GPTJAX'\n"
        "#!/usr/bin/env bash\n"
        "set -euo pipefail\n"
        "export JAX_LOCAL_DEVICE_IDS=0,1,2,3 # left to itself, JAX takes one GPU a process here\n"
        "status=0\n"
        f"srun --cpu-bind=none --wait=120 gptjax train --distributed {CONFIG} --run runs/a --resume auto "
        "--train.seed 1 || status=$?\n"
        'if [ "$status" -eq 143 ]; then scontrol requeue "$SLURM_JOB_ID"; fi # SIGTERM, and saved\n'
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


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (1, False), (143, True)])
def test_slurm_job_starts_or_goes_on_and_requeues_when_stopped(fakes: Fakes, status: int, requeued: bool) -> None:
    run = fakes.folder / "runs/it's a"
    fakes.bash(SLURM, *JOB[:-1], str(run), "--", CONFIG, *AWKWARD)
    fakes.add("srun", f"exit {status}")
    fakes.add("scontrol")
    common = ["srun", "--cpu-bind=none", "--wait=120", "gptjax", "train", "--distributed"]
    what = [CONFIG, "--run", str(run), "--resume", "auto"]
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
        ([*JOB, "--gpus-per-node=x"], "--gpus-per-node x: give a whole number from 1, such as --gpus-per-node 8"),
        ([*JOB, "--time=soon"], "--time soon: give one such as 24:00:00"),
        (
            without("--run"),
            "--run: missing; name the run folder, such as --run runs/a, which a requeued job resumes",
        ),
        (JOB, "no config; name one after --, such as -- configs/gpt3_13b.py"),
        ([*JOB, "x.py"], "x.py: unexpected; what gptjax train is to get goes after --"),
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
