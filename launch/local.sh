#!/usr/bin/env bash
# Train by N processes of this machine: what several hosts would do, tried before they cost anything.
#
#   launch/local.sh --processes 4 -- configs/quickstart.py --run runs/trial --layout.data 4
#
# Each is gptjax train --distributed with its own number, by which its lines begin. They end together: SIGTERM and
# Ctrl-C go to all of them, which save first; where one falls, the others are ended too. Ends with the status of the
# first that fell.
#
#   --processes N   how many
#   --devices N     of each process on a CPU (default 1): virtual ones, which share its cores
#   --gpus N        of each process; the first N are process 0's. Without it all train on the CPU
#   --port P        where process 0 listens (default: one by chance)
#   --dry-run       print the commands, and run nothing
#
# After -- comes what gptjax train is to get: CONFIG [--field value ...], or --resume RUN.

set -euo pipefail

fail() { printf 'error: %s\n' "$*" >&2; exit 1; }
count() { [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "$1 ${2:-is missing}: give a whole number from 1, such as $1 $3"; }

processes='' devices=1 gpus='' port=$((20000 + RANDOM % 20000)) dry_run=''

for arg; do # --dry-run counts wherever it stands, also after --
  shift
  if [ "$arg" = --dry-run ]; then dry_run=1; else set -- "$@" "$arg"; fi
done
while [ "${1---}" != -- ]; do
  case $1 in
    -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; exit ;;
    --*=*) arg=$1; shift; set -- "${arg%%=*}" "${arg#*=}" "$@" ;;
    --*) [ "${2---}" != -- ] || fail "$1: a value is missing; see $0 --help" ;;
    *) fail "$1: unexpected; what gptjax train is to get goes after --" ;;
  esac
  case $1 in
    --processes) processes=$2 ;; --devices) devices=$2 ;; --gpus) gpus=$2; count --gpus "$2" 1 ;; --port) port=$2 ;;
    *) fail "$1: no such flag; see $0 --help (what gptjax train is to get goes after --)" ;;
  esac
  shift 2
done
[ $# -eq 0 ] || shift # the --
count --processes "$processes" 4
count --devices "$devices" 1
count --port "$port" 8476
[ $# -gt 0 ] || fail "nothing to train; add -- configs/NAME.py, or -- --resume runs/NAME"

environment() { # of process $1, in `settings`
  settings=("JAX_COORDINATOR_ADDRESS=localhost:$port" "JAX_NUM_PROCESSES=$processes" "JAX_PROCESS_ID=$1")
  if [ "$gpus" ]; then
    settings+=("CUDA_VISIBLE_DEVICES=$(seq -s, $(($1 * gpus)) $((($1 + 1) * gpus - 1)))")
  else
    settings+=(JAX_PLATFORMS=cpu "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices")
  fi
}

if [ "$dry_run" ]; then
  for ((i = 0; i < processes; i++)); do
    environment "$i"
    printf 'env'
    printf ' %q' "${settings[@]}" gptjax train --distributed "$@"
    printf ' &\n'
  done
  exit
fi
command -v gptjax >/dev/null || fail "gptjax: not found; activate the environment it is installed in"

pipes=$(mktemp -d) pids=() readers=() status=0 stopping=''
trap 'rm -rf "$pipes"' EXIT
tell() { kill "$1" ${pids[@]+"${pids[@]}"} 2>/dev/null || true; }
trap 'stopping=1; tell -TERM' INT TERM HUP # a second SIGINT would end gptjax without a save
for ((i = 0; i < processes; i++)); do
  [ -z "$stopping" ] || break
  mkfifo "$pipes/$i"
  while IFS= read -r line; do printf '[%s] %s\n' "$i" "$line"; done <"$pipes/$i" &
  readers+=($!)
  environment "$i"
  env "${settings[@]}" gptjax train --distributed "$@" >"$pipes/$i" 2>&1 &
  pids+=($!)
done
[ -z "$stopping" ] || tell -TERM # it came when the last of them ran and was not in the list yet

patience=40 # half seconds that the others have still to live once one has fallen
while [ ${#pids[@]} -gt 0 ]; do
  sleep 0.5 || true
  going=()
  for pid in "${pids[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then going+=("$pid"); continue; fi
    code=0
    wait "$pid" || code=$?
    [ "$status" -ne 0 ] || status=$code
  done
  pids=(${going[@]+"${going[@]}"})
  if [ "$status" -ne 0 ]; then
    [ "$patience" -ne 40 ] || tell -TERM
    [ "$patience" -gt 0 ] || tell -KILL # it waits for one that is gone
    patience=$((patience - 1))
  fi
done
wait "${readers[@]}" || true
exit "$status"
