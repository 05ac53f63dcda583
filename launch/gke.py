"""Train on GKE: the JobSet of a run, made of the table of chips that the planner uses.

python launch/gke.py v5p-256 --name gpt3 --image IMAGE --bucket my-bucket -- configs/gpt3_13b.py >gpt3.yaml
kubectl apply -f gpt3.yaml

The manifest begins with the commands for its node pools, and to look, stop, go on and delete. IMAGE is made by
launch/Dockerfile. The words after -- start a run and go on with it alike: `gptjax run CONFIG [--field value ...]`,
whose folder lies in runs/ of the bucket. launch/README.md says more.
"""

import argparse
import math
import re
import shlex
import sys
from dataclasses import dataclass
from typing import Any, NoReturn

import yaml

from gptjax.commands.train import Command as Train
from gptjax.errors import UserError
from gptjax.planner.chips import CORES_COUNTED, Topology, topology
from gptjax.train.join import ADDRESS, COUNT, INDEX
from gptjax.train.run import base_folder

TPUS = {
    "v4": ("tpu-v4-podslice", "ct4p-hightpu"),
    "v5e": ("tpu-v5-lite-podslice", "ct5lp-hightpu"),
    "v5p": ("tpu-v5p-slice", "ct5p-hightpu"),
    "v6e": ("tpu-v6e-slice", "ct6e-standard"),
    "tpu7x": ("tpu7x", "tpu7x-standard"),
}
"""Family -> GKE's label of the chip, and its machines without the number of chips, as in ct5p-hightpu-4t."""
GPUS = {
    "a2-ultragpu-8g": "nvidia-a100-80gb",
    "a3-highgpu-8g": "nvidia-h100-80gb",
    "a3-megagpu-8g": "nvidia-h100-mega-80gb",
    "a3-ultragpu-8g": "nvidia-h200-141gb",
    "a4-highgpu-8g": "nvidia-b200",
}
"""Machine -> GKE's label of its GPU."""
JOB, POD = "jobset.sigs.k8s.io/job-index", "batch.kubernetes.io/job-completion-index"
"""Annotations that say which job of the set, and which pod of the job, this one is."""
HOME = "/home/gptjax"  # of the image
USER = 1000
GRACE = 600  # seconds between SIGTERM and SIGKILL: a step and a save
PORT = 8476
LONGEST = 63  # characters of a name in Kubernetes
RANDOM = "-12345"  # what a pod's name ends with
LOCKED = 64 << 30  # bytes that a TPU's driver locks in memory


@dataclass(frozen=True)
class Hosts:
    """What is rented: `jobs` slices of `each` hosts, or one set of GPU machines."""

    kind: str
    """Of a job: the middle of a pod's name."""
    machine: str
    selector: dict[str, str]
    resource: str
    devices: int
    """Of one host."""
    each: int
    jobs: int

    @property
    def several(self) -> bool:
        return self.each * self.jobs > 1

    def pod(self, name: str, job: int, index: int) -> str:
        return f"{name}-{self.kind}-{job}-{index}"


@dataclass(frozen=True)
class Run:
    """What is to be trained, and how it is known."""

    name: str
    image: str
    bucket: str
    words: tuple[str, ...]
    """For `gptjax run`."""
    spot: bool = False
    queue: str = ""
    account: str = "default"
    restarts: int = 50


def hosts(name: str, slices: int) -> Hosts:
    """Of a name as the planner takes it. Raises UserError where GKE has no such machines."""
    where = topology(name, slices)
    return _machines(name, where) if where.chip.platform == "gpu" else _slices(where)


def _machines(name: str, where: Topology) -> Hosts:
    if name.lower() not in GPUS:
        raise UserError(f"{name}: GKE wants a machine of GPUs; choose from {', '.join(GPUS)}, and --slices N of them")
    selector = {"cloud.google.com/gke-accelerator": GPUS[name.lower()]}
    return Hosts("node", name.lower(), selector, "nvidia.com/gpu", where.slice_devices, where.num_slices, 1)


def _slices(where: Topology) -> Hosts:
    chips = math.prod(where.shape)
    own = chips if len(where.shape) == 2 and chips in (1, 8) else 4  # small planes are one host's
    if chips == own and where.num_slices > 1:
        raise UserError(f"--slices {where.num_slices}: GKE joins slices of several hosts; {where.name} is a host alone")
    label, machine = TPUS[where.family]
    shape = "x".join(map(str, where.shape))
    selector = {"cloud.google.com/gke-tpu-accelerator": label, "cloud.google.com/gke-tpu-topology": shape}
    return Hosts("slice", f"{machine}-{own}t", selector, "google.com/tpu", own, chips // own, where.num_slices)


def jobset(run: Run, hosts: Hosts) -> dict[str, Any]:
    """The manifest: a job for each slice, a pod for each host.

    A trainer that falls is started again in its pod. A pod that is lost takes its job, and a job the whole set, which
    is made again: JAX has no way to take one host back in. Status 1 is an error of the config or the code, which no
    restart mends."""
    metadata: dict[str, Any] = {"name": run.name}
    if hosts.kind == "slice":  # a slice is a node pool
        metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    if run.queue:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": run.queue}
    given_up = {"action": "FailJob", "onExitCodes": {"containerName": "gptjax", "operator": "In", "values": [1]}}
    job = {
        "parallelism": hosts.each,
        "completions": hosts.each,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [given_up]},
        "template": {"metadata": {"annotations": {"gke-gcsfuse/volumes": "true"}}, "spec": _pod(run, hosts)},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {
                "maxRestarts": run.restarts,
                "rules": [
                    {"name": "givenUp", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]},
                ],
            },
            "replicatedJobs": [{"name": hosts.kind, "replicas": hosts.jobs, "template": {"spec": job}}],
        },
    }


def _pod(run: Run, hosts: Hosts) -> dict[str, Any]:
    mounts = [{"name": "runs", "mountPath": f"{HOME}/runs"}, {"name": "shm", "mountPath": "/dev/shm"}]
    options = f"implicit-dirs,only-dir=runs,uid={USER},gid={USER},rename-dir-limit=1000000,metadata-cache:ttl-secs:0"
    container = {
        "name": "gptjax",
        "image": run.image,
        **_command(run, hosts),
        "env": _environment(run, hosts),
        "resources": {"limits": {hosts.resource: str(hosts.devices)}},
        "volumeMounts": mounts,
    }
    spot = {"cloud.google.com/gke-spot": "true"} if run.spot else {}
    tolerated = [{"key": key, "operator": "Equal", "value": on, "effect": "NoSchedule"} for key, on in spot.items()]
    bucket = {"bucketName": run.bucket.removeprefix("gs://"), "mountOptions": options}
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE,
        "serviceAccountName": run.account,
        "nodeSelector": hosts.selector | spot,
        **({"tolerations": tolerated} if tolerated else {}),
        "containers": [container],
        "volumes": [
            {"name": "runs", "csi": {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": bucket}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ],
    }


def _command(run: Run, hosts: Hosts) -> dict[str, Any]:
    words = _words(run, hosts)
    if hosts.kind == "node":
        return {"command": words}
    # A TPU's driver locks host memory, more than a container is granted; to raise that takes root and this capability.
    return {
        "command": ["bash", "-c", f'ulimit -l {LOCKED >> 10}; exec "$@"', "bash", *words],
        "securityContext": {"runAsUser": 0, "capabilities": {"add": ["SYS_RESOURCE"]}},
    }


def _words(run: Run, hosts: Hosts) -> list[str]:
    return ["gptjax", "run", *(["--distributed"] if hosts.several else []), *run.words]


def _environment(run: Run, hosts: Hosts) -> list[dict[str, Any]]:
    """Where the others are. Of one slice GKE says it, and JAX and the TPU read that; several, and GPUs, are told."""
    first = f"{hosts.pod(run.name, 0, 0)}.{run.name}"
    several = {
        "MEGASCALE_COORDINATOR_ADDRESS": first,
        "MEGASCALE_NUM_SLICES": str(hosts.jobs),
        "MEGASCALE_SLICE_ID": JOB,
    }
    machines = {
        ADDRESS: f"{first}:{PORT}",
        COUNT: str(hosts.each),
        INDEX: POD,
        "JAX_LOCAL_DEVICE_IDS": ",".join(map(str, range(hosts.devices))),  # all, whatever JAX finds around it
    }
    told = machines if hosts.kind == "node" and hosts.several else several if hosts.jobs > 1 else {}
    return [{"name": name, **_value(value)} for name, value in told.items()]


def _value(text: str) -> dict[str, Any]:
    if text in (JOB, POD):
        return {"valueFrom": {"fieldRef": {"fieldPath": f"metadata.annotations['{text}']"}}}
    return {"value": text}


def header(run: Run, hosts: Hosts, manifest: str = "FILE") -> str:
    """Commands for what is around the manifest, as its comments."""
    pool = ["gcloud", "container", "node-pools", "create", f"{run.name}-$i", "--cluster=CLUSTER"]
    pool += [f"--machine-type={hosts.machine}", f"--num-nodes={hosts.each}"]
    if (shape := hosts.selector.get("cloud.google.com/gke-tpu-topology")) and hosts.each > 1:
        pool.append(f"--tpu-topology={shape}")
    pool += ["--spot"] if run.spot else []
    first = f"job/{run.name}-{hosts.kind}-0"
    patch = 'kubectl patch jobset {} --type=merge -p \'{{"spec":{{"suspend":{}}}}}\''
    rows = {
        f"{hosts.jobs} x {hosts.each} hosts, each {hosts.devices} {hosts.resource}. Node pools, once": (
            f"for i in $(seq {hosts.jobs}); do {' '.join(pool)}; done"
        ),
        "start": f"kubectl apply -f {manifest}",
        "look": f"kubectl get jobset {run.name}; kubectl logs -f {first}",
        "stop, saving": patch.format(run.name, "true"),
        "go on": patch.format(run.name, "false"),
        "end": f"kubectl delete jobset {run.name}",
        "and stop paying": (
            f"for i in $(seq {hosts.jobs}); do gcloud container node-pools delete {run.name}-$i --cluster=CLUSTER; done"
        ),
    }
    return "".join(f"# {what}:\n#   {command}\n" for what, command in rows.items())


def xpk(run: Run, where: Topology, hosts: Hosts, cluster: str) -> str:
    """For people who have xpk, which makes the JobSet by itself. Raises UserError for what it cannot be asked for."""
    if hosts.kind == "node":
        raise UserError("--xpk: for TPUs; on GPUs gptjax has to be told where the others are, as the manifest does")
    size = f"{where.family}-{math.prod(where.shape) * (2 if where.family in CORES_COUNTED else 1)}"
    if topology(size).shape != where.shape:
        raise UserError(f"--xpk: knows slices by their size, and {size} is no {'x'.join(map(str, where.shape))}")
    words = [
        *("xpk", "workload", "create", f"--cluster={cluster}", f"--workload={run.name}"),
        *(f"--tpu-type={size.replace('v5e', 'v5litepod')}", f"--num-slices={where.num_slices}"),
        *(f"--docker-image={run.image}", f"--max-restarts={run.restarts}"),
        f"--command={shlex.join(_words(run, hosts))}",
    ]
    bucket = run.bucket.removeprefix("gs://")
    attach = ["xpk", "storage", "attach", f"{run.name}-runs", f"--cluster={cluster}", "--type=gcsfuse"]
    attach += [f"--bucket={bucket}", f"--mount-point={HOME}/runs", "--readonly=false", "--auto-mount=true"]
    return f"{shlex.join(attach)}\n{shlex.join(words)}\n"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def arguments(words: list[str]) -> argparse.Namespace:
    parser = Parser("launch/gke.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("topology", help="of a slice, such as v5p-128 or v6e-256, or a machine, such as a3-megagpu-8g")
    parser.add_argument("--slices", type=int, default=1, help="so many of them")
    parser.add_argument("--name", required=True, help="of the JobSet")
    parser.add_argument("--image", required=True, help="of launch/Dockerfile, in a registry that the cluster reads")
    parser.add_argument("--bucket", required=True, help="runs/ lies in it, by the cluster's Cloud Storage FUSE driver")
    parser.add_argument("--spot", action="store_true", help="machines that may be taken away")
    parser.add_argument("--queue", default="", help="of Kueue, where the cluster has one")
    parser.add_argument("--service-account", default="default", help="of Kubernetes, that may write the bucket")
    parser.add_argument("--max-restarts", type=int, default=50, help="of the whole set, after the loss of a host")
    parser.add_argument("--xpk", metavar="CLUSTER", help="print the commands for xpk in place of the manifest")
    split = words.index("--") if "--" in words else len(words)
    given = parser.parse_args(words[:split])
    given.words = words[split + 1 :]
    return given


def checked(given: argparse.Namespace, hosts: Hosts) -> Run:
    """What was asked for. Raises UserError for words that gptjax, Kubernetes or the bucket would not take."""
    if not given.words:
        raise UserError("no config; name one after --, such as -- configs/gpt3_13b.py")
    if wrong := next((word for word in given.words if word.split("=")[0] in ("--resume", "--distributed")), ""):
        raise UserError(f"{wrong}: leave it out; the same words start a run and go on with it, on all hosts")
    config, *overrides = given.words
    folder = base_folder(Train(config, overrides=tuple(overrides)).given())
    if folder.is_absolute() or folder.parts[0] != "runs" or len(folder.parts) < 2:
        raise UserError(f"--run {folder}: only runs/ lies in the bucket; name one such as runs/a")
    longest = hosts.pod(given.name, hosts.jobs - 1, hosts.each - 1) + RANDOM
    if not re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", given.name) or len(longest) > LONGEST:
        most = LONGEST - len(longest) + len(given.name)
        raise UserError(f"--name {given.name}: lower-case letters, digits and hyphens, {most} at most, such as gpt3")
    if given.max_restarts < 0:
        raise UserError(f"--max-restarts {given.max_restarts}: must be 0 or more; nearest 0")
    chosen = given.name, given.image, given.bucket, tuple(given.words)
    return Run(*chosen, given.spot, given.queue, given.service_account, given.max_restarts)


def main(words: list[str]) -> str:
    given = arguments(words)
    rented = hosts(given.topology, given.slices)
    run = checked(given, rented)
    if given.xpk:
        return xpk(run, topology(given.topology, given.slices), rented, given.xpk)
    if rented.kind == "node" and rented.several:
        note = "note: no GPUDirect in this manifest: without what your cluster adds, machines talk TCP over one card"
        print(note, file=sys.stderr)
    return header(run, rented) + str(yaml.safe_dump(jobset(run, rented), sort_keys=False))


if __name__ == "__main__":
    try:
        print(main(sys.argv[1:]), end="")
    except UserError as error:
        sys.exit(f"error: {error}")
