#!/usr/bin/env bash
# A SLURM of this machine alone while a command runs: two nodes, each a slurmd of its own, and nothing left behind.
#
#   tests/slurm/cluster.sh sinfo
#   tests/slurm/cluster.sh bash
#
# As root: installs Debian's slurmctld, slurmd, slurm-client and munge where they are missing; starts its own munged
# beside one that may be there. Ends with the status of the command, or with 77 and the reason where there is none to
# be had.

set -euo pipefail

absent() { printf 'no SLURM: %s\n' "$*" >&2; exit 77; }

[ "$(id -u)" -eq 0 ] || absent 'needs root, to install and to start its daemons'
programs=(slurmctld slurmd srun munged)
if ! command -v "${programs[@]}" >/dev/null || [ "$(command -v "${programs[@]}" | wc -l)" -lt ${#programs[@]} ]; then
  command -v apt-get >/dev/null || absent 'no apt-get here'
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq >/dev/null 2>&1 || true
  apt-get install -qq -y --no-install-recommends slurmctld slurmd slurm-client munge >/dev/null 2>&1 ||
    absent 'apt-get cannot install slurmctld slurmd slurm-client munge'
fi
host=$(hostname -s)
getent hosts "$host" >/dev/null || absent "the name of this machine, $host, has no address"

folder=$(mktemp -d)
chmod 755 "$folder"
pids=()
finish() {
  local at
  if [ "${#pids[@]}" -gt 2 ]; then # jobs outlive the daemons, and get KillWait to end
    scancel --quiet --user="$(id -un)" || true
    for _ in $(seq 200); do
      [ "$(squeue --noheader 2>/dev/null)" ] || break
      sleep 0.2
    done
  fi
  for ((at = ${#pids[@]} - 1; at >= 0; at--)); do # the controller after the nodes, munge last
    kill "${pids[at]}" 2>/dev/null || true
    wait "${pids[at]}" 2>/dev/null || true
  done
  rm -rf "$folder"
}
trap finish EXIT
start() { # a daemon that stays in the foreground
  "$@" >"$folder/$(basename "$1").${#pids[@]}.log" 2>&1 &
  pids+=($!)
}
until_done() { # within 30 s
  for _ in $(seq 150); do
    if "$@" >/dev/null 2>&1; then return; fi
    sleep 0.2
  done
  tail -n 20 "$folder"/*.log >&2
  absent "$* does not come to be"
}

(umask 077 && head -c 128 /dev/urandom >"$folder/key")
start munged --foreground --force --key-file="$folder/key" --socket="$folder/munge" --pid-file="$folder/munged.pid" \
  --log-file="$folder/munged.log" --seed-file="$folder/seed"
until_done munge --socket="$folder/munge" --no-input

export SLURM_CONF=$folder/slurm.conf
cat >"$SLURM_CONF" <<CONF
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=16817
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=5
ReturnToService=2
KillWait=5
MpiDefault=none
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool.%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.%n.pid
NodeName=$host NodeHostname=$host NodeAddr=127.0.0.1 Port=17001 CPUs=2 State=UNKNOWN
NodeName=$host-second NodeHostname=$host NodeAddr=127.0.0.1 Port=17002 CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
mkdir "$folder/state"
start slurmctld -D
until_done scontrol ping
start slurmd -D -N "$host"
start slurmd -D -N "$host-second"
both_idle() { [ "$(sinfo --noheader --Node --states=idle | wc -l)" -eq 2 ]; }
until_done both_idle
"$@"
