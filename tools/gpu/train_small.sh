#!/usr/bin/env bash
# Train a small model on the GPU, stop it, continue it, evaluate it. Exit 77: megatron-core is not to be had.
set -uo pipefail
python=${1:-python3} out=${2:-.}
"$python" -c 'import megatron.core' 2>/dev/null || { echo "megatron-core is not importable; pass --wheels DIR"; exit 77; }
deadline=""
"$python" -c 'import pytest_timeout' 2>/dev/null && deadline="--timeout 170"
# shellcheck disable=SC2086  # a list of words
"$python" -m pytest -p no:cacheprovider tests/flow/test_training.py -q $deadline --junitxml "$out/train.xml" \
  -k "goes_through_its_stages or stopped_by_a_signal or validation"
