"""The JobSet of a run against the published types of JobSet and Kubernetes, and against what JAX reads of it."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from jax._src.clusters.cloud_tpu_cluster import GkeTpuCluster
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet
from pydantic import ValidationError

from gptjax.errors import UserError
from gptjax.planner.chips import CHIPS, COMPILER_NAMES, topology
from gptjax.train.join import read

ROOT = Path(__file__).parents[1]
CONFIG = "configs/gpt3_125m.py"
FLAGS = ["--name", "gpt3", "--image", "registry/image:1", "--bucket", "gs://bucket"]


@pytest.fixture(scope="module")
def gke() -> ModuleType:
    spec = spec_from_file_location("gke", ROOT / "launch/gke.py")
    assert spec and spec.loader
    module = module_from_spec(spec)
    sys.modules["gke"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def made(gke: ModuleType, *words: str, train: tuple[str, ...] = ("--run", "runs/a")) -> dict[str, Any]:
    manifest: dict[str, Any] = yaml.safe_load(gke.main([*words, *FLAGS, "--", CONFIG, *train]))
    return manifest


def parts(manifest: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(replicated job, spec of its pods, their container)"""
    (job,) = manifest["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    return job, pod, container


def refused(manifest: dict[str, Any]) -> str:
    """What of a manifest the published types do not take; they drop fields that they do not know."""
    try:
        taken = JobsetV1alpha2JobSet.from_dict(json.loads(json.dumps(manifest))).to_dict()
    except ValidationError as error:
        return str(error)
    return next((f"unknown: {path}" for path in sorted(set(leaves(manifest)) - set(leaves(taken)))), "")


def leaves(node: Any, path: str = "") -> Iterator[str]:
    if isinstance(node, dict):
        for key, child in node.items():
            yield from leaves(child, f"{path}.{key}")
    elif isinstance(node, list):
        for index, child in enumerate(node):
            yield from leaves(child, f"{path}.{index}")
    else:
        yield f"{path} = {node!r}"


# By hand, of Google's documentation: chips of a host, hosts of a slice.
RENTED = {
    ("v4-16",): ("ct4p-hightpu-4t", "tpu-v4-podslice", "2x2x2", 4, 2),
    ("v5e-1",): ("ct5lp-hightpu-1t", "tpu-v5-lite-podslice", "1x1", 1, 1),
    ("v5e-4",): ("ct5lp-hightpu-4t", "tpu-v5-lite-podslice", "2x2", 4, 1),
    ("v5litepod-8",): ("ct5lp-hightpu-8t", "tpu-v5-lite-podslice", "2x4", 8, 1),
    ("v5e-256", "--slices=2"): ("ct5lp-hightpu-4t", "tpu-v5-lite-podslice", "16x16", 4, 64),
    ("v5p-128", "--slices", "4", "--spot"): ("ct5p-hightpu-4t", "tpu-v5p-slice", "4x4x4", 4, 16),
    ("v5p-8",): ("ct5p-hightpu-4t", "tpu-v5p-slice", "2x2x1", 4, 1),
    ("v6e-16", "--queue=night"): ("ct6e-standard-4t", "tpu-v6e-slice", "4x4", 4, 4),
    ("tpu7x-128",): ("tpu7x-standard-4t", "tpu7x", "4x4x4", 4, 16),
}


@pytest.mark.parametrize("words", RENTED, ids=" ".join)
def test_slices(gke: ModuleType, words: tuple[str, ...]) -> None:
    machine, label, shape, chips, hosts = RENTED[words]
    manifest = made(gke, *words)
    assert refused(manifest) == ""
    job, pod, container = parts(manifest)
    slices = next((int(word.split("=")[-1]) for word in words if word[-1].isdigit() and word != words[0]), 1)
    assert (job["replicas"], job["template"]["spec"]["parallelism"]) == (slices, hosts)
    assert job["template"]["spec"]["completions"] == hosts
    assert container["resources"]["limits"] == {"google.com/tpu": str(chips)}
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == label
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == shape
    assert re.search(f"--machine-type={machine} --num-nodes={hosts}[ ;]", gke.main([*words, *FLAGS, "--", CONFIG]))
    assert chips * hosts * slices == topology(words[0], slices).chips
    assert ("cloud.google.com/gke-spot" in pod["nodeSelector"]) == ("tolerations" in pod) == ("--spot" in words)
    assert manifest["metadata"].get("labels", {}).get("kueue.x-k8s.io/queue-name") == (
        "night" if "--queue=night" in words else None
    )
    assert ("--distributed" in container["command"]) == (hosts * slices > 1)
    assert container["command"][-3:] == [CONFIG, "--run", "runs/a"]


@pytest.mark.parametrize(
    "machine", ["a2-ultragpu-8g", "a3-highgpu-8g", "a3-megagpu-8g", "a3-ultragpu-8g", "A4-HIGHGPU-8G"]
)
def test_gpus(gke: ModuleType, machine: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every pod finds its place among the others, as gptjax reads it."""
    manifest = made(gke, machine, "--slices", "3")
    assert refused(manifest) == ""
    job, pod, container = parts(manifest)
    assert (job["replicas"], job["template"]["spec"]["parallelism"]) == (1, 3)
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "8"}
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": gke.GPUS[machine.lower()]}
    assert container["command"] == ["gptjax", "run", "--distributed", CONFIG, "--run", "runs/a"]
    assert "securityContext" not in container
    for index in range(3):
        found = read(environment(container, pod=index))
        assert found
        assert (found.host, found.port, found.count, found.index) == ("gpt3-node-0-0.gpt3", 8476, 3, index)
    assert environment(container)["JAX_LOCAL_DEVICE_IDS"] == "0,1,2,3,4,5,6,7"
    assert "no GPUDirect" in capsys.readouterr().err
    assert "env" in parts(made(gke, machine))[2] and parts(made(gke, machine))[2]["env"] == []


def environment(container: dict[str, Any], job: int = 0, pod: int = 0) -> dict[str, str]:
    """What a pod of a job gets: annotations as JobSet and Kubernetes write them."""
    own = {"jobset.sigs.k8s.io/job-index": str(job), "batch.kubernetes.io/job-completion-index": str(pod)}
    known = {f"metadata.annotations['{name}']": value for name, value in own.items()}
    return {
        each["name"]: each["value"] if "value" in each else known[each["valueFrom"]["fieldRef"]["fieldPath"]]
        for each in container["env"]
    }


def test_jax_finds_the_processes_of_several_slices(gke: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what GKE says in each pod of a slice: its hosts, and which of them."""
    manifest = made(gke, "v6e-16", "--slices", "3")
    _, _, container = parts(manifest)
    monkeypatch.setattr("socket.gethostbyname", lambda name: "10.0.0.1")
    seen = []
    for job in range(3):
        for pod in range(4):
            workers = ",".join(f"gpt3-slice-{job}-{i}.gpt3" for i in range(4))
            given = {"TPU_WORKER_HOSTNAMES": workers, "TPU_WORKER_ID": str(pod)} | environment(container, job, pod)
            for name, value in given.items():
                monkeypatch.setenv(name, value)
            assert GkeTpuCluster.get_process_count() == 12
            assert GkeTpuCluster.get_coordinator_address(1, None).split(":")[0] == "gpt3-slice-0-0.gpt3"
            seen.append(GkeTpuCluster.get_process_id())
    assert seen == [*range(12)]
    assert parts(made(gke, "v6e-16"))[2]["env"] == []


def test_a_host_of_jobset_has_the_name_that_is_told(gke: ModuleType) -> None:
    """JobSet: NAME-JOB-INDEX-POD.SUBDOMAIN, the subdomain being the set's name unless it says another."""
    manifest = made(gke, "v5p-128", "--slices=2")
    job, _, container = parts(manifest)
    assert "subdomain" not in manifest["spec"]["network"] and manifest["spec"]["network"]["enableDNSHostnames"]
    name = manifest["metadata"]["name"]
    assert environment(container)["MEGASCALE_COORDINATOR_ADDRESS"] == f"{name}-{job['name']}-0-0.{name}"


def test_what_ends_a_set_and_what_starts_it_again(gke: ModuleType) -> None:
    manifest = made(gke, "v5p-128", "--max-restarts=7")
    policy, job = manifest["spec"]["failurePolicy"], parts(manifest)[0]["template"]["spec"]
    assert policy["maxRestarts"] == 7 and job["backoffLimit"] == 0
    (rule,) = policy["rules"]
    assert rule["action"] == "FailJobSet" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    (own,) = job["podFailurePolicy"]["rules"]
    assert (own["action"], own["onExitCodes"]["values"], own["onExitCodes"]["operator"]) == ("FailJob", [1], "In")
    assert own["onExitCodes"]["containerName"] == parts(manifest)[2]["name"]


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (("spec", "failurePolicies"), {}, ""),  # empty, and so without a leaf
        (("spec", "failurePolicies"), {"maxRestarts": 1}, "unknown: .spec.failurePolicies.maxRestarts"),
        (("spec", "failurePolicy", "maxRestarts"), "7", "valid integer"),
        (("spec", "replicatedJobs", 0, "replicas"), 1.5, "valid integer"),
        (("spec", "replicatedJobs", 0, "template", "spec", "paralellism"), 2, "unknown: "),
        (
            ("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "nodeSelector"),
            "x",
            "valid dictionary",
        ),
        (
            ("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "containers", 0, "comand"),
            "x",
            "unknown",
        ),
    ],
)
def test_the_types_refuse_what_is_wrong(gke: ModuleType, path: tuple[Any, ...], value: object, told: str) -> None:
    manifest = made(gke, "v5p-128", "--slices=2", "--spot", "--queue=q")
    assert refused(manifest) == ""
    node: Any = manifest
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    found = refused(manifest)
    assert told in found and bool(found) == bool(told)


def test_every_chip_of_the_planner_has_machines_or_is_refused(gke: ModuleType) -> None:
    assert set(gke.TPUS) == set(COMPILER_NAMES)
    for machine in gke.GPUS:
        found = topology(machine)
        assert found.chip.platform == "gpu" and found.slice_devices == 8
    for family, chip in CHIPS.items():
        if chip.platform == "gpu":
            with pytest.raises(UserError, match="GKE wants a machine of GPUs; choose from a2-ultragpu-8g"):
                gke.hosts(f"{family}-8x2", 1)


def test_the_header_has_the_commands(gke: ModuleType) -> None:
    text = gke.main(["v5e-16", "--slices=2", "--spot", *FLAGS, "--", CONFIG])
    lines = [line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#")]
    assert lines == [
        "2 x 4 hosts, each 4 google.com/tpu. Node pools, once:",
        "for i in $(seq 2); do gcloud container node-pools create gpt3-$i --cluster=CLUSTER "
        "--machine-type=ct5lp-hightpu-4t --num-nodes=4 --tpu-topology=4x4 --spot; done",
        "start:",
        "kubectl apply -f FILE",
        "look:",
        "kubectl get jobset gpt3; kubectl logs -f job/gpt3-slice-0",
        "stop, saving:",
        """kubectl patch jobset gpt3 --type=merge -p '{"spec":{"suspend":true}}'""",
        "go on:",
        """kubectl patch jobset gpt3 --type=merge -p '{"spec":{"suspend":false}}'""",
        "end:",
        "kubectl delete jobset gpt3",
        "and stop paying:",
        "for i in $(seq 2); do gcloud container node-pools delete gpt3-$i --cluster=CLUSTER; done",
    ]


def test_xpk(gke: ModuleType) -> None:
    words = ["--xpk=pods", "--max-restarts=9", *FLAGS, "--", CONFIG, "--train.sample_prompt", "it's"]
    attach, create = map(shlex.split, gke.main(["v5e-256", "--slices=2", *words]).splitlines())
    assert attach[:4] == ["xpk", "storage", "attach", "gpt3-runs"] and "--bucket=bucket" in attach
    assert create == [
        *("xpk", "workload", "create", "--cluster=pods", "--workload=gpt3", "--tpu-type=v5litepod-256"),
        *("--num-slices=2", "--docker-image=registry/image:1", "--max-restarts=9"),
        f"--command=gptjax run --distributed {CONFIG} --train.sample_prompt " + shlex.quote("it's"),
    ]
    assert "--tpu-type=v5p-128" in gke.main(["v5p-4x4x4", *words])
    with pytest.raises(UserError, match="v5p-512 is no 4x4x16"):
        gke.main(["v5p-4x4x16", *words])
    with pytest.raises(UserError, match="--xpk: for TPUs"):
        gke.main(["a3-megagpu-8g", *words])


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["v5p-128", *FLAGS], "no config; name one after --, such as -- configs/gpt3_13b.py"),
        (["v5p-130", *FLAGS, "--", CONFIG], "--topology v5p-130: no slice of v5p has that size; nearest v5p-128"),
        (["v5p-128", *FLAGS, CONFIG], f"unrecognized arguments: {CONFIG}; see launch/gke.py --help"),
        (
            ["v5p-128", *FLAGS[2:], "--", CONFIG],
            "the following arguments are required: --name; see launch/gke.py --help",
        ),
        (
            ["v5p-128", *FLAGS, "--slices=x", "--", CONFIG],
            "argument --slices: invalid int value: 'x'; see launch/gke.py",
        ),
        (
            ["v5e-8", *FLAGS, "--slices=2", "--", CONFIG],
            "--slices 2: GKE joins slices of several hosts; v5e-8 is a host alone",
        ),
        (
            ["v5p-128", *FLAGS, "--", CONFIG, "--resume", "auto"],
            "--resume: leave it out; the same words start a run and",
        ),
        (
            ["v5p-128", *FLAGS, "--", CONFIG, "--run", "mine"],
            "--run mine: only runs/ lies in the bucket; name one such as",
        ),
        (
            ["v5p-128", *FLAGS, "--", CONFIG, "--run", "runs"],
            "--run runs: only runs/ lies in the bucket; name one such as",
        ),
        (["v5p-128", *FLAGS, "--", CONFIG, "--model.num_layer", "3"], "--model.num_layer: "),
        (["v5p-128", *FLAGS, "--name=Big_one", "--", CONFIG], "--name Big_one: lower-case letters, digits and hyphens"),
        (
            ["v5p-128", *FLAGS, "--name", "a" * 49, "--", CONFIG],
            f"--name {'a' * 49}: lower-case letters, digits and hy",
        ),
        (["v5p-128", *FLAGS, "--max-restarts=-1", "--", CONFIG], "--max-restarts -1: must be 0 or more; nearest 0"),
    ],
)
def test_errors_say_what_to_mend(gke: ModuleType, words: list[str], error: str) -> None:
    with pytest.raises(UserError) as caught:
        gke.main(words)
    assert str(caught.value).startswith(error)
    assert "\n" not in str(caught.value)


def test_the_longest_name_fits(gke: ModuleType) -> None:
    hosts = gke.hosts("v5p-128", 11)
    longest = "a" * (gke.LONGEST - len("-slice-10-15-12345"))
    words = ["v5p-128", "--slices=11", *FLAGS[2:], "--", CONFIG]
    assert yaml.safe_load(gke.main(["--name", longest, *words]))["metadata"]["name"] == longest
    assert len(hosts.pod(longest, 10, 15) + "-12345") == 63
    with pytest.raises(UserError, match=f"{len(longest)} at most"):
        gke.main(["--name", longest + "a", *words])
    assert replace(hosts, each=1, jobs=1).several is False


def test_as_a_command() -> None:
    command = [sys.executable, "launch/gke.py", "v5e-16", *FLAGS]
    done = subprocess.run([*command, "--", CONFIG], capture_output=True, text=True, cwd=ROOT, env=_plain())
    assert done.returncode == 0 and yaml.safe_load(done.stdout)["kind"] == "JobSet"
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=_plain())
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: no config; name one after --, such as -- configs/gpt3_13b.py\n"


def _plain() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}
