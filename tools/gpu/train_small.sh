#!/usr/bin/env bash
# Train a small model on the GPU, stop it, continue it, evaluate it. Exit 77: megatron-core is not to be had.
set -uo pipefail
python=${1:-python3} out=${2:-.} wheels=${3:-}
if [ -n "$wheels" ]; then
  site=$(mktemp -d)
  "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl || exit 1
  export PYTHONPATH="$site:$PYTHONPATH"
fi
"$python" -c 'import megatron.core' 2>/dev/null || { echo "megatron-core is not importable; pass --wheels DIR"; exit 77; }
"$python" -m pytest -p no:cacheprovider tests/flow/test_training.py -q --timeout 170 --junitxml "$out/train.xml" \
  -k "goes_through_its_stages or stopped_by_a_signal or validation"
