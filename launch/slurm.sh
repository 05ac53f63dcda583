#!/usr/bin/env bash
# Train on N nodes of a SLURM cluster: one process a node, with all the GPUs asked for there, each under gptjax run.
#
#   launch/slurm.sh --nodes 4 --gpus-per-node 8 --time 24:00:00 --run runs/a -- configs/gpt3_6_7b.py --layout.data 2
#
# Submits from the current folder with the current environment, so activate gptjax's first. Whenever the job
# starts, it resumes the run folder if there is a run in it. Before the time limit SLURM sends SIGTERM, gptjax
# saves a checkpoint, and the job goes back into the queue, until training is done or a stay brought no checkpoint.
# A process that falls is started again in its place. scancel ends the job for good.
#
#   --nodes N             nodes, and JAX processes
#   --gpus-per-node N     GPUs of each; 0 to train on CPUs
#   --time LIMIT          of one stay on the nodes, such as 24:00:00
#   --run DIR             run folder, on storage that all nodes see
#   --partition P         default: the cluster's
#   --account A           default: yours
#   --sbatch OPTION       one more sbatch option, such as --sbatch=--cpus-per-task=64; may be repeated
#   --dry-run             print the sbatch command with its batch script, and run nothing
#
# After -- comes what gptjax run is to get: CONFIG [--field value ...].

set -euo pipefail

fail() { printf 'error: %s\n' "$*" >&2; exit 1; }
quoted() { printf ' %q' "$@"; } # for bash to read back
count() {
  [[ $2 =~ ^(0|[1-9][0-9]*)$ && ($2 != 0 || $3 = 0) ]] ||
    fail "$1 ${2:-is missing}: give a whole number from $3, such as $1 $4"
}

nodes='' gpus='' limit='' run='' partition='' account='' more=() dry_run=''

for arg; do # --dry-run counts wherever it stands, also after --
  shift
  if [ "$arg" = --dry-run ]; then dry_run=1; else set -- "$@" "$arg"; fi
done
while [ "${1---}" != -- ]; do
  case $1 in
    -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; exit ;;
    --*=*) arg=$1; shift; set -- "${arg%%=*}" "${arg#*=}" "$@" ;;
    --*) [ "${2---}" != -- ] || fail "$1: a value is missing; see $0 --help" ;;
    *) fail "$1: unexpected; what gptjax run is to get goes after --" ;;
  esac
  case $1 in
    --nodes) nodes=$2 ;; --gpus-per-node) gpus=$2 ;; --time) limit=$2 ;; --run) run=$2 ;;
    --partition) partition=$2 ;; --account) account=$2 ;; --sbatch) more+=("$2") ;;
    *) fail "$1: no such flag; see $0 --help (what gptjax run is to get goes after --)" ;;
  esac
  shift 2
done
[ $# -eq 0 ] || shift # the --
count --nodes "$nodes" 1 4
count --gpus-per-node "$gpus" 0 8
[[ $limit =~ ^([0-9]+-)?[0-9]+(:[0-9]+){0,2}$ ]] || fail "--time ${limit:-is missing}: give one such as 24:00:00"
[ "$run" ] || fail "--run: missing; name the run folder, such as --run runs/a, which a requeued job resumes"
[ $# -gt 0 ] || fail "no config; name one after --, such as -- configs/gpt3_13b.py"
[ -f "$1" ] || fail "config $1: no such file; name one after --, such as -- configs/gpt3_13b.py"
config=$1
shift
for arg; do
  case $arg in --run | --run=* | --resume | --resume=*) fail "$arg: give --run DIR before --, which resumes too" ;; esac
done

submit=(sbatch "--job-name=${run##*/}" "--nodes=$nodes" --ntasks-per-node=1 "--time=$limit")
[ "$gpus" -eq 0 ] || submit+=("--gpus-per-node=$gpus")
[ -z "$partition" ] || submit+=("--partition=$partition")
[ -z "$account" ] || submit+=("--account=$account")
submit+=(--signal=TERM@120 --requeue --open-mode=append ${more[@]+"${more[@]}"})

devices="export JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((gpus - 1))) # left to itself, JAX takes one GPU a process here
"
[ "$gpus" -gt 0 ] || devices=''
script="#!/usr/bin/env bash
set -euo pipefail
newest() { ls$(quoted "$run/checkpoints") 2>/dev/null | grep -x '[0-9]*' | sort -n | tail -n 1 || true; }
before=\$(newest)
${devices}status=0
srun --cpu-bind=none --wait=120 gptjax run --distributed$(quoted "$config" --run "$run" "$@") || status=\$?
if [ \"\$status\" -eq 143 ] && [ \"\$(newest)\" != \"\$before\" ]; then # SIGTERM, and it got on
  scontrol requeue \"\$SLURM_JOB_ID\"
fi
exit \"\$status\""

if [ "$dry_run" ]; then
  command=$(quoted "${submit[@]}")
  printf "%s <<'GPTJAX'\n%s\nGPTJAX\n" "${command# }" "$script"
  exit
fi
command -v sbatch >/dev/null || fail "sbatch: not found; run this on a login node of the cluster, or --dry-run"
command -v gptjax >/dev/null || fail "gptjax: not found; activate the environment it is installed in"
"${submit[@]}" <<<"$script"
