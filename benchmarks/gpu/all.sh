#!/bin/sh
# Measures this machine's GPU: every row, most important first, in some eight minutes; then tunes tiles in the time that is left.
#
#     benchmarks/gpu/all.sh FOLDER [SECONDS]
#
# FOLDER gets rows.jsonl and tiles.json; SECONDS (540) bounds the whole. WHEELS may name a folder of wheels for packages that this
# Python lacks (see README.md); nothing is installed into it, they go to a temporary folder.
set -eu
folder=$1
seconds=${2:-540}
here=$(dirname "$0")
python=${PYTHON:-python3}
mkdir -p "$folder"
if [ -n "${WHEELS:-}" ]; then
    site=$(mktemp -d)
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl
    PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
    export PYTHONPATH
fi
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=true PYTHONUNBUFFERED=1
began=$(date +%s)
"$python" "$here/rows.py" --to "$folder/rows.jsonl" --seconds "$((seconds - 60))" || echo "some rows failed: $folder/rows.jsonl says why"
left=$((seconds - ($(date +%s) - began)))
if [ "$left" -gt 30 ]; then
    "$python" "$here/tune.py" --to "$folder/tiles.json" --seconds "$((left - 10))"
fi
