#!/usr/bin/env bash
# Train on a TPU slice: one Cloud TPU queued resource, the same command on every host of it.
#
#   export TPU_NAME=gpt3 TPU_ZONE=us-east5-a TPU_TYPE=v5p-1024 TPU_BUCKET=my-bucket
#   launch/tpu_pod.sh create      # ask for the slice and wait until it is there
#   launch/tpu_pod.sh install     # this clone's commit, Python and the bucket, on every host
#   launch/tpu_pod.sh run -- configs/gpt3_13b.py --run runs/a     # gptjax train --distributed ...
#   launch/tpu_pod.sh logs        # follow worker 0
#   launch/tpu_pod.sh stop        # SIGTERM: gptjax saves a checkpoint and ends
#   launch/tpu_pod.sh run -- --resume runs/a
#   launch/tpu_pod.sh delete
#
# Also: status (state of the request), and --dry-run anywhere, which prints the commands and runs none.
#
#   --name NAME            the queued resource and its node               or TPU_NAME
#   --zone ZONE            such as us-east5-a                             or TPU_ZONE
#   --project PROJECT      default: gcloud's own                          or TPU_PROJECT
#   --type TYPE            create: such as v5p-1024 or v6e-256            or TPU_TYPE
#   --runtime-version V    create: default by type                        or TPU_RUNTIME_VERSION
#   --spot                 create: cheaper, may be taken away
#   --wait MINUTES         create: look for so long (default 120)         or TPU_WAIT
#   --repo URL, --ref REF  install: default this clone's origin and commit (push it first)
#   --bucket BUCKET        install: mounted at ~/gptjax-bucket of every host, and runs/ lies in it. or TPU_BUCKET
#                          Several hosts need one to checkpoint; after a reboot, install again.
#   --worker N             logs: which worker (default 0)
#
# run works in ~/gptjax of every host: name paths relative to it, as ~ expands on this machine. Before a
# command goes to several hosts, gcloud wants its key loaded: ssh-add ~/.ssh/google_compute_engine

# shellcheck disable=SC2016 # what stands in single quotes is for the hosts to expand
set -euo pipefail

note() { printf '%s\n' "$*" >&2; }
fail() { note "error: $*"; exit 1; }
quote() { # one argument, for any POSIX shell
  local rest=$1 out='' q="'"
  case $1 in '' | *[!A-Za-z0-9_./:=@%+,-]*) ;; *) printf %s "$1"; return ;; esac
  while [ "${rest#*"$q"}" != "$rest" ]; do out+="${rest%%"$q"*}'\\''"; rest=${rest#*"$q"}; done
  printf "'%s'" "$out$rest"
}
line() { # all arguments, as one line to paste
  local arg space=''
  for arg; do printf %s "$space"; quote "$arg"; space=' '; done
}
go() { if [ "$dry_run" ]; then line "$@"; echo; else "$@"; fi; }
resource() { go gcloud compute tpus queued-resources "$1" "$name" "${where[@]}" "${@:2}"; }
on() { go gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" "--worker=$1" "--command=$2"; }

create() {
  [ "$type" ] || fail "--type: missing; name the slice, such as --type v5p-1024, or set TPU_TYPE"
  [[ $wait =~ ^(0|[1-9][0-9]*)$ ]] || fail "--wait $wait: must be a whole number of minutes, such as 120"
  [ "$version" ] || case $type in
    v[234]-[0-9]*) version=tpu-ubuntu2204-base ;;
    v5litepod-[0-9]*) version=v2-alpha-tpuv5-lite ;;
    v5p-[0-9]*) version=v2-alpha-tpuv5 ;;
    v6e-[0-9]*) version=v2-alpha-tpuv6e ;;
    *) fail "--type $type: unknown; use v2- v3- v4- v5litepod- v5p- v6e-N, or give --runtime-version too" ;;
  esac
  resource create "--node-id=$name" "--accelerator-type=$type" "--runtime-version=$version" ${spot:+--spot}
  [ -z "$dry_run" ] || { note "# then, every 30 s for at most $wait minutes, until it prints ACTIVE:"; status; return; }
  local state looks=0
  while true; do
    state=$(status) || state=UNREACHABLE
    note "$name: $state"
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPEND* | DELETING) fail "--name $name: $state; delete it, then create it again" ;;
    esac
    [ $((looks += 1)) -le $((wait * 2)) ] || break
    sleep 30
  done
  fail "--name $name: still $state after $wait minutes, and in the queue; status looks again, delete gives it up"
}

status() { resource describe '--format=value(state.state)'; }
logs() { on "$worker" 'tail -n 100 -F ~/gptjax.log'; }
delete() { resource delete --force; }

install() {
  local here command
  here=$(dirname "${BASH_SOURCE[0]}")
  repo=${repo:-$(git -C "$here" remote get-url origin 2>/dev/null)} || fail "--repo: no origin here; name a git URL"
  ref=${ref:-$(git -C "$here" rev-parse HEAD 2>/dev/null)} || fail "--ref: no commit here; name a branch, tag or commit"
  case $repo in http*://*@*) fail "--repo: the URL holds a password or token, which every host would keep" ;; esac
  command="set -e; git init -q ~/gptjax; cd ~/gptjax"
  command+="; git fetch -q --depth 1 $(quote "$repo") $(quote "$ref"); git checkout -q --detach FETCH_HEAD"
  command+="; test -x .venv/bin/pip || if python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'"
  command+="; then python3 -m venv .venv; else python3 -m pip install -q --user uv" # Ubuntu 22.04 has Python 3.10
  command+="; python3 -m uv venv -q --seed --python 3.11 .venv; fi"
  command+="; .venv/bin/pip install -q -c constraints.txt -e '.[tpu]'"
  if [ "$bucket" ]; then # Orbax commits by renaming folders; each host must see at once what another wrote
    command+="; command -v gcsfuse >/dev/null || sudo apt-get install -qy gcsfuse; mkdir -p ~/gptjax-bucket"
    command+="; mountpoint -q ~/gptjax-bucket || gcsfuse --implicit-dirs --rename-dir-limit=1000000"
    command+=" --metadata-cache-ttl-secs=0 $(quote "${bucket#gs://}") ~/gptjax-bucket"
    command+="; mkdir -p ~/gptjax-bucket/runs; ln -sfnT ~/gptjax-bucket/runs runs"
  else
    note "no --bucket: each host keeps runs/ on its own disk, so only a slice of one host can checkpoint"
  fi
  on all "$command"
}

run() {
  [ $# -gt 0 ] || fail "run: nothing to train; add -- configs/NAME.py, or -- --resume runs/NAME"
  local command='set -e; cd ~/gptjax; if pid=$(cat ~/gptjax.pid 2>/dev/null) && kill -0 "$pid" 2>/dev/null'
  command+='; then echo "error: already training, process $pid; stop it first" >&2; exit 1; fi'
  command+="; nohup .venv/bin/gptjax train --distributed $(line "$@") >>~/gptjax.log 2>&1 </dev/null &"
  on all "$command"' echo $! >~/gptjax.pid'
}

stop() { # and wait: a delete right after must not cut the last checkpoint short
  local command='{ pid=$(cat ~/gptjax.pid) && kill -TERM "$pid"; } 2>/dev/null || { echo "not training"; exit 0; }'
  command+='; for i in $(seq 600); do kill -0 "$pid" 2>/dev/null || exit 0; sleep 1; done'
  on all "$command; echo 'error: still saving after 600 s; see logs' >&2; exit 1"
}

name=${TPU_NAME-} zone=${TPU_ZONE-} project=${TPU_PROJECT-} type=${TPU_TYPE-} version=${TPU_RUNTIME_VERSION-}
wait=${TPU_WAIT-120} bucket=${TPU_BUCKET-} spot='' repo='' ref='' worker=0 verb='' dry_run=''

for arg; do # --dry-run counts wherever it stands, also after --
  shift
  if [ "$arg" = --dry-run ]; then dry_run=1; else set -- "$@" "$arg"; fi
done
while [ "${1---}" != -- ]; do
  case $1 in
    -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; exit ;;
    --spot) spot=1; shift; continue ;;
    --*=*) arg=$1; shift; set -- "${arg%%=*}" "${arg#*=}" "$@" ;;
    --*) [ "${2---}" != -- ] || fail "$1: a value is missing; see $0 --help" ;;
    *) [ -z "$verb" ] || fail "$1: unexpected after $verb; what gptjax train is to get goes after --"
      verb=$1; shift; continue ;;
  esac
  case $1 in
    --name) name=$2 ;; --zone) zone=$2 ;; --project) project=$2 ;; --type) type=$2 ;; --wait) wait=$2 ;;
    --runtime-version) version=$2 ;; --bucket) bucket=$2 ;; --repo) repo=$2 ;; --ref) ref=$2 ;; --worker) worker=$2 ;;
    *) fail "$1: no such flag; see $0 --help (what gptjax train is to get goes after --)" ;;
  esac
  shift 2
done
case $verb in
  create | install | run | logs | stop | status | delete) ;;
  *) fail "${verb:-subcommand missing}: choose from create install run logs stop status delete" ;;
esac
[ $# -eq 0 ] || shift # the --
[ "$verb" = run ] || [ $# -eq 0 ] || fail "$1: only run takes arguments after --"
[ "$name" ] || fail "--name: missing; name the queued resource, such as --name gpt3, or set TPU_NAME"
[ "$zone" ] || fail "--zone: missing; name the zone, such as --zone us-east5-a, or set TPU_ZONE"
[ "$dry_run" ] || command -v gcloud >/dev/null || fail "gcloud: not found; install the Google Cloud CLI, or --dry-run"
where=("--zone=$zone" ${project:+"--project=$project"})
"$verb" "$@"
