#!/usr/bin/env bash
# Train on TPU slices: one Cloud TPU queued resource, the same command on every host of it.
#
#   export TPU_NAME=gpt3 TPU_ZONE=us-east5-a TPU_TYPE=v5p-1024 TPU_BUCKET=my-bucket
#   launch/tpu_pod.sh create      # ask for the slices and wait until they are there
#   launch/tpu_pod.sh install     # this clone's commit, Python and the bucket, on every host
#   launch/tpu_pod.sh run -- configs/gpt3_13b.py --run runs/a     # gptjax run --distributed ...
#   launch/tpu_pod.sh logs        # follow worker 0
#   launch/tpu_pod.sh stop        # SIGTERM: gptjax saves a checkpoint and ends
#   launch/tpu_pod.sh delete      # until then every chip costs
#
# The words after -- start a run and go on with it alike. Slices that may be taken away, or a run of weeks:
#
#   launch/tpu_pod.sh resume -- configs/gpt3_13b.py --run runs/a  # whatever is missing, until it trains again
#   launch/tpu_pod.sh watch --spot -- configs/gpt3_13b.py --run runs/a    # the same, until training is done
#
# Both look at what is there: slices that are gone are deleted and asked for again, installed and started. watch may
# be ended and begun at any time, on any machine; the training does not notice. It installs the commit that it was begun
# with, and gives up where a start brings no new checkpoint so many times in a row. Also: status (state of the request),
# and --dry-run anywhere, which prints the commands and runs none.
#
#   --name NAME            the queued resource and its nodes              or TPU_NAME
#   --zone ZONE            such as us-east5-a                             or TPU_ZONE
#   --project PROJECT      default: gcloud's own                          or TPU_PROJECT
#   --type TYPE            create: such as v5p-1024 or v6e-256            or TPU_TYPE
#   --slices N             create: so many of them, joined by the network (default 1) or TPU_SLICES
#   --runtime-version V    create: default by type                        or TPU_RUNTIME_VERSION
#   --spot                 create: cheaper, may be taken away             or TPU_SPOT=1
#   --gcloud OPTION        create: one more option of gcloud, such as --gcloud=--reserved; may be repeated
#   --wait MINUTES         create: look for so long (default 120)         or TPU_WAIT
#   --bucket BUCKET        install: mounted at ~/gptjax-bucket of every host, and runs/ lies in it. or TPU_BUCKET
#                          Several hosts need one to checkpoint; after a reboot, install again.
#   --node N, --worker N   logs: which slice, and which of its workers (default 0)
#   --tries N              watch: starts in a row without a new checkpoint (default 5)
#   --delete-when-done     watch: delete the slices when training is done
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
queue() { go gcloud compute tpus queued-resources "$@"; }
resource() { queue "$1" "$name" "${where[@]}" "${@:2}"; }
on() { queue ssh "$name" "${where[@]}" "--node=$1" "--worker=$2" "--command=$3"; }
whole() {
  [[ $2 =~ ^(0|[1-9][0-9]*)$ && ($2 != 0 || $3 = 0) ]] || fail "$1 $2: must be a whole number from $3, such as $4"
}

ask() {
  [ "$type" ] || fail "--type: missing; name the slice, such as --type v5p-1024, or set TPU_TYPE"
  [ "$version" ] || case $type in
    v[234]-[0-9]*) version=tpu-ubuntu2204-base ;;
    v5litepod-[0-9]*) version=v2-alpha-tpuv5-lite ;;
    v5p-[0-9]*) version=v2-alpha-tpuv5 ;;
    v6e-[0-9]*) version=v2-alpha-tpuv6e ;;
    *) fail "--type $type: unknown; use v2- v3- v4- v5litepod- v5p- v6e-N, or give --runtime-version too" ;;
  esac
  local nodes=("--node-id=$name")
  [ "$slices" -eq 1 ] || nodes=("--node-count=$slices" "--node-prefix=$name")
  resource create "${nodes[@]}" "--accelerator-type=$type" "--runtime-version=$version" ${spot:+--spot} \
    ${more[@]+"${more[@]}"}
}

create() {
  ask
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
logs() { on "$node" "$worker" 'tail -n 100 -F ~/gptjax.log'; }
delete() { resource delete --force "$@"; }

pack() { # a clone of one commit travels: hosts need no right to read where it came from. Once: a watch stays with it
  local root commit edits
  [ -z "$packed" ] || return 0
  root=$(dirname "${BASH_SOURCE[0]}")/..
  commit=$(git -C "$root" rev-parse HEAD 2>/dev/null) || fail "install: $root is no git clone with a commit to install"
  root=$(git -C "$root" rev-parse --show-toplevel)
  edits=$(git -C "$root" status --porcelain)
  edits=${edits%%$'\n'*}
  [ -z "$edits" ] || fail "install: ships a commit, and ${edits:3} in $root is not as committed; commit it, or undo"
  note "installs commit $commit"
  packed=${TMPDIR:-/tmp}/gptjax-$commit
  trap 'go rm -rf "$packed" "$packed.tgz"' EXIT
  go rm -rf "$packed"
  go git clone -q --bare --depth 1 "file://$root" "$packed"
  go tar -C "$packed" -czf "$packed.tgz" .
}

install() {
  local command
  pack
  command='set -e; rm -rf ~/gptjax.git; mkdir ~/gptjax.git; tar -xzf ~/gptjax.tgz -C ~/gptjax.git'
  command+='; git init -q ~/gptjax; cd ~/gptjax; git fetch -q --depth 1 "file://$HOME/gptjax.git" HEAD'
  command+='; git checkout -q --detach FETCH_HEAD'
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
  queue scp "$packed.tgz" "$name:gptjax.tgz" "${where[@]}" --node=all --worker=all && on all all "$command"
}

going='pid=$(cat ~/gptjax.pid 2>/dev/null) && grep -qas gptjax "/proc/$pid/cmdline"' # of a host: does it train?

run() { start 'echo "error: already training, process $pid; stop it first" >&2; exit 1' "$@"; }
start() { # $1: what a host does that trains already
  local command inner
  inner=".venv/bin/gptjax run --distributed $(line "${@:2}") & echo \$! >~/gptjax.pid; wait \$!"
  inner+='; case $? in 0) echo done ;; 130 | 143) ;; *) echo failed ;; esac >~/gptjax.status'
  command="set -e; cd ~/gptjax; if $going; then $1; fi; rm -f ~/gptjax.pid ~/gptjax.status ~/gptjax.stopped"
  command+="; nohup sh -c $(quote "$inner") >>~/gptjax.log 2>&1 </dev/null &"
  on all all "$command"' until [ -s ~/gptjax.pid ]; do sleep 0.1; done'
}

stop() { # and wait: a delete right after must not cut the last checkpoint short
  local command="{ $going && touch ~/gptjax.stopped && kill -TERM \"\$pid\"; } 2>/dev/null"
  command+=' || { echo "not training"; exit 0; }; for _ in $(seq 600)'
  command+='; do kill -0 "$pid" 2>/dev/null || exit 0; sleep 1; done'
  on all all "$command; echo 'error: still saving after 600 s; see logs' >&2; exit 1"
}

look() { # from each host a line: training, stopped (by stop), done, failed or idle; and the newest checkpoint
  local command="if $going; then s=training; elif [ -e ~/gptjax.stopped ]; then s=stopped"
  command+='; else s=$(cat ~/gptjax.status 2>/dev/null); fi; cd ~/gptjax 2>/dev/null'
  command+="; n=\$(ls $(quote "$folder/checkpoints") 2>/dev/null | grep -x '[0-9]*' | sort -n | tail -n 1)"
  on all all "$command"'; echo "gptjax: ${s:-idle} ${n:--1}"'
}

state() { # of the request, NONE where there is none; what cannot be known is to be waited for
  local found
  if found=$(status 2>&1); then echo "${found##*$'\n'}"; return; fi
  case $found in *NOT_FOUND* | *'not found'*) echo NONE ;; *) echo "UNREACHABLE (${found##*$'\n'})" ;; esac
}

resume() { keep start "$@"; }
watch() {
  [ "$folder" ] || fail "watch: after -- give --run, such as --run runs/a: its checkpoints show whether the run gets on"
  keep end "$@"
}

keep() { # to the start of training, or its end ($1): at each look what is missing is brought, one thing at a time
  local found reason
  pause=60 failures=0 furthest=-2 seen=''
  pack
  if [ "$dry_run" ]; then rehearse "${@:2}"; return; fi
  while true; do
    found=$(state)
    case $found in
      ACTIVE)
        pause=60
        if hosts "$@"; then return; fi ;;
      NONE)
        note "$name: there is none; asked for"
        ask || { slower; count "$name: cannot be asked for"; } ;;
      FAILED | SUSPENDED) # FAILED is mostly want of room: ask less and less often, but go on
        reason=$(resource describe '--format=value(state.failedData.error.message,state.stateInitiator)') || reason=''
        note "$name: $found ${reason:+($reason)}; deleted"
        [ "$found" = SUSPENDED ] || slower
        delete --quiet || true
        continue ;;
      *) note "$name: $found" ;;
    esac
    sleep "$pause"
  done
}

rehearse() {
  note '# every minute, by the state of the request:'; status
  note '# FAILED or SUSPENDED:'; delete --quiet
  note '# none:'; ask
  note '# ACTIVE: what do the hosts do?'; look
  note '# one of them does not train:'; install; start 'exit 0' "$@"
  [ -z "$tidy" ] || { note '# training is done:'; delete --quiet; }
}

hosts() { # true where there is nothing left to do
  local said words step
  said=$(look) || { note "$name: a host does not answer"; return 1; }
  words=$(sed -n 's/^gptjax: \(.*\) .*/\1/p' <<<"$said" | sort -u | tr '\n' ' ')
  note "$name: $words"
  [ "$words" ] || return 1
  case $words in *training*) seen=1 ;; esac
  case $seen:$words in # how an earlier start ended is no news
    1:*done*) # on one host, so all steps are made
      if [ "$tidy" ]; then delete --quiet; fi
      return ;;
    1:*failed*) fail "--name $name: a host gave up; see logs, and mend it. The chips cost until delete" ;;
    1:*stopped*) note "$name: was stopped"; return ;;
    1:'training ') if [ "$1" = start ]; then return; else return 1; fi ;;
  esac
  if ! install; then count "$name: cannot be installed"; return 1; fi
  step=$(look | sed -n 's/^gptjax: .* //p' | sort -n | tail -n 1) # now that install has brought the bucket
  if [ "${step:--1}" -gt "$furthest" ]; then furthest=${step:--1} failures=0; else count "$name: is no further"; fi
  if start 'exit 0' "${@:2}"; then seen=1; else count "$name: cannot be started"; fi
  return 1
}

slower() { pause=$((pause < 960 ? pause * 2 : 960)); }
count() {
  failures=$((failures + 1))
  [ "$failures" -lt "$tries" ] ||
    fail "--name $1: no new checkpoint in $tries tries; see logs. The chips cost until delete"
}

name=${TPU_NAME-} zone=${TPU_ZONE-} project=${TPU_PROJECT-} type=${TPU_TYPE-} version=${TPU_RUNTIME_VERSION-}
slices=${TPU_SLICES-1} wait=${TPU_WAIT-120} bucket=${TPU_BUCKET-} spot=${TPU_SPOT-} more=() folder=''
node=0 worker=0 tries=5 tidy='' packed='' verb='' dry_run=''
verbs='create install run logs status stop resume watch delete'

for arg; do # --dry-run counts wherever it stands, also after --
  shift
  if [ "$arg" = --dry-run ]; then dry_run=1; else set -- "$@" "$arg"; fi
done
while [ "${1---}" != -- ]; do
  case $1 in
    -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; exit ;;
    --spot) spot=1; shift; continue ;;
    --delete-when-done) tidy=1; shift; continue ;;
    --*=*) arg=$1; shift; set -- "${arg%%=*}" "${arg#*=}" "$@" ;;
    --*) [ "${2---}" != -- ] || fail "$1: a value is missing; see $0 --help" ;;
    *) [ -z "$verb" ] || fail "$1: unexpected after $verb; what gptjax run is to get goes after --"
      verb=$1; shift; continue ;;
  esac
  case $1 in
    --name) name=$2 ;; --zone) zone=$2 ;; --project) project=$2 ;; --type) type=$2 ;; --slices) slices=$2 ;;
    --runtime-version) version=$2 ;; --gcloud) more+=("$2") ;; --wait) wait=$2 ;; --bucket) bucket=$2 ;;
    --node) node=$2 ;; --worker) worker=$2 ;; --tries) tries=$2 ;;
    *) fail "$1: no such flag; see $0 --help (what gptjax run is to get goes after --)" ;;
  esac
  shift 2
done
case " $verbs " in *" ${verb:- } "*) ;; *) fail "${verb:-subcommand missing}: choose from $verbs" ;; esac
[ $# -eq 0 ] || shift # the --
case $verb in
  run | resume | watch) [ $# -gt 0 ] || fail "$verb: nothing to train; add -- configs/NAME.py --run runs/NAME" ;;
  *) [ $# -eq 0 ] || fail "$1: only run, resume and watch take arguments after --" ;;
esac
for arg; do
  case $arg in
    --resume | --resume=*) fail "$arg: the words that started a run go on with it, too: CONFIG --run runs/NAME" ;;
    --run=*) folder=${arg#*=} ;;
  esac
  [ "${before-}" != --run ] || folder=$arg
  before=$arg
done
[ "$name" ] || fail "--name: missing; name the queued resource, such as --name gpt3, or set TPU_NAME"
[ "$zone" ] || fail "--zone: missing; name the zone, such as --zone us-east5-a, or set TPU_ZONE"
whole --slices "$slices" 1 2
whole --wait "$wait" 0 '120 (minutes)'
whole --tries "$tries" 1 5
[ "$dry_run" ] || command -v gcloud >/dev/null || fail "gcloud: not found; install the Google Cloud CLI, or --dry-run"
where=("--zone=$zone" ${project:+"--project=$project"})
"$verb" "$@"
