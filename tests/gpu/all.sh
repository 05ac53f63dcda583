#!/usr/bin/env bash
# What the README says of GPUs, measured on the one that is there within an hour (TOTAL_SECONDS): a part for which no time
# is left is skipped.
#
#     tests/gpu/all.sh [--out DIR] [--data DIR] [--tiny] [PART ...]
#     tests/gpu/all.sh --list
#
# Each part runs by itself under a limit of less than 10 minutes, with DIR/PART/log and DIR/PART/result.json (status,
# seconds, device, versions, date) beside what it measured. One that fails does not stop the next; then the exit status
# is 1. --data is a folder with tinyshakespeare.txt, wikitext2-valid.txt and gpt2-bpe; parts that need it are skipped
# without. --tiny runs the same parts with sizes for a CPU. PYTHON names another interpreter.
set -uo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python}

# part, minutes (of an H100 where it has run them, with a compile of PyTorch's peer in most), whether it needs the text
PARTS="correctness 4 text
gpt2_124m 3 -
gpt2_350m 3 -
gpt2_774m 3 -
gpt2_1558m 4 -
dense_2k 1 -
banded_2k 1 -
dense_32k 1 -
banded_32k 1 -
attention 2 -
layouts 4 -
options 5 -
stream 1 text
shakespeare 1 text
generate 3 -
replies 5 text
search 9 -"

out=gpu-results data="" tiny="" chosen=()
while (($#)); do
    case $1 in
        --list) while read -r part minutes _; do echo "$part $minutes"; done <<<"$PARTS"; exit ;;
        --out | --data)
            [[ $# -ge 2 ]] || { echo "error: $1: give a folder" >&2; exit 2; }
            [[ $1 = --out ]] && out=$2 || data=$2
            shift ;;
        --tiny) tiny=1 ;;
        *)
            grep -q "^$1 " <<<"$PARTS" || { echo "error: $1: no such part; see --list" >&2; exit 2; }
            chosen+=("$1") ;;
    esac
    shift
done
for folder in ../shared/data shared/data; do
    [[ -z $data && -d $folder ]] && data=$folder
done

# Two micro-batches a step: gradients are summed as those of many are.
gpt2() { # CONFIG, micro-batch, flags
    local config=$1 micro=$2
    shift 2
    single "configs/$config.py" --train.micro_batch_size "$micro" --train.batch_size $((2 * micro)) "$@"
}
gpt3() { # pattern, length, rows
    single configs/gpt3_1_3b.py --data.lanes 1 --train.ramp_start 0 --train.ramp_tokens 0 \
        --train.micro_batch_size "$3" --train.batch_size "$3" --model.attention_pattern "$1" --model.seq_len "$2"
}
single() { gptjax bench single "$@" --steps 5 --timeout 400 --out "$here" "${small[@]}"; }
gptjax() { "$python" -m gptjax "$@"; }
peer=(--peer tests/peers/gpt2_torch.py)
small=() ; lengths=512,2048,8192,32768
if [[ -n $tiny ]]; then
    small=(--model.num_layers 2 --model.num_heads 2 --model.embed_dim 32 --model.seq_len 64 --model.window 16)
    small+=(--train.micro_batch_size 2 --train.batch_size 4)
    [[ ${PART_OF_ALL:-} = stream ]] || small+=(--model.vocab_size 512) # GPT-2's tokenizer needs all of its own
    lengths=64,256
fi

run_part() {
    case $1 in
        correctness)
            "$python" tests/gpu/check.py --text "$data/tinyshakespeare.txt" --out "$here" ${tiny:+--tiny} ;;
        gpt2_124m) gpt2 gpt2_124m 32 "${peer[@]}" ;;
        gpt2_350m) gpt2 gpt2_350m 16 "${peer[@]}" ;;
        gpt2_774m) gpt2 gpt2_774m 8 "${peer[@]}" ;;
        gpt2_1558m) gpt2 gpt2_1558m 4 "${peer[@]}" ;;
        dense_2k) gpt3 dense 2048 8 ;;
        banded_2k) gpt3 dense,banded 2048 8 ;;
        dense_32k) gpt3 dense 32768 1 ;;
        banded_32k) gpt3 dense,banded 32768 1 ;;
        attention)
            gptjax bench attention --lengths "$lengths" --window $((${lengths%%,*} / 2)) --heads 8 \
                --out "$here" ;;
        layouts)
            gptjax bench layouts configs/gpt2_124m.py --steps 5 --train.batch_size 64 --timeout 120 --out "$here" "${small[@]}" \
                --layouts own,scan,micro=,remat=dots,remat=full+scan ;;
        options) # each in its own folder, to be held against gpt2_124m
            local failed=0 root=$here
            for option in train.deterministic=true model.fp8=true optimizer.kind=muon; do
                here=$root/${option%%=*}
                gpt2 gpt2_124m 32 "--$option" || failed=1
            done
            return "$failed" ;;
        stream)
            gpt2 gpt2_124m 32 --stream --data.source "$data/wikitext2-valid.txt" --data.tokenizer "gpt2:$data/gpt2-bpe" ;;
        search) gpt2 gpt2_124m 32 --search "${peer[@]}" ;;
        generate)
            gptjax bench generate configs/gpt2_124m.py --weights auto,int8 --peer tests/peers/generate_torch.py --out "$here" \
                "${small[@]}" ;;
        replies)
            "$python" tests/gpu/replies.py --text "$data/tinyshakespeare.txt" --tokenizer "gpt2:$data/gpt2-bpe" \
                --out "$here" ${tiny:+--tiny} ;;
        shakespeare)
            gptjax train configs/shakespeare_gpu.py --data.source "$data/tinyshakespeare.txt" \
                --run "$here/run" "${small[@]}" ${tiny:+--data.lanes 1 --train.total_tokens 5000} ;;
    esac
}

if [[ ${PART_OF_ALL:-} ]]; then # the inner call, under the limit of its part
    here=$out/$PART_OF_ALL
    run_part "$PART_OF_ALL"
    exit
fi

# Once: device, versions and date of every result.
about=$("$python" -c 'import json; from gptjax.bench.measure import provenance; print(json.dumps(provenance()))') ||
    about='{"device": null}'

record() { # part, status, seconds, says
    "$python" - "$out/$1/result.json" "$about" "$@" <<'PY'
import json, sys
from pathlib import Path

path, about, part, status, seconds, says = sys.argv[1:]
result = json.loads(about) | {"part": part, "status": status, "seconds": int(seconds), "says": says}
Path(path).write_text(json.dumps(result, indent=1) + "\n")
PY
    summary+=("$(printf '%-12s %-8s %5s s  %s' "$@")")
}

summary=() bad=0
while read -r part _ needs; do
    [[ ${#chosen[@]} -eq 0 || " ${chosen[*]} " = *" $part "* ]] || continue
    mkdir -p "$out/$part"
    if [[ $needs = text && ! -d $data ]]; then
        record "$part" skipped 0 "no folder of text; name one with --data"
        continue
    fi
    left=$((${TOTAL_SECONDS:-3600} - SECONDS)) limit=${PART_SECONDS:-570}
    if ((left < 60)); then
        record "$part" skipped 0 "no time left; run it by itself"
        continue
    fi
    echo "== $part" >&2
    start=$SECONDS
    PART_OF_ALL=$part timeout -k 10 $((left < limit ? left : limit)) "$0" --out "$out" --data "$data" ${tiny:+--tiny} \
        >"$out/$part/log" 2>&1 </dev/null
    status=$? name=ok
    # `bench single` says in its rows what did not run, the peer's too.
    [[ $status -eq 124 || $status -eq 137 ]] && name=timeout
    [[ $status -ne 0 && $name = ok ]] && name=failed
    if [[ $name = ok ]] && grep -rqE '"status": "(failed|timeout|out of memory)"' --include=single.json --include=layouts.json "$out/$part"; then
        name=partly
    fi
    [[ $name = ok ]] || bad=1
    record "$part" "$name" $((SECONDS - start)) "$(tail -n 1 "$out/$part/log" | cut -c -100)"
    echo "${summary[-1]}" >&2
done <<<"$PARTS"

printf '%s\n' "" "${summary[@]}" | tee "$out/summary.txt"
exit "$bad"
