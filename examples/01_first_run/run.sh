#!/usr/bin/env bash
# The first run, step by step. Usage: run.sh [FOLDER]. Needs medgpt on PATH or in .venv/bin.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-work/first}
command -v medgpt > /dev/null || PATH="$here/../../.venv/bin:$PATH"

medgpt phantoms --out "$out/phantoms" --images 200 --questions 32
python "$here/../../tools/data/train_tokenizer.py" --out "$out/tokenizer" --vocab-size 512 \
  "$out/phantoms/train/captions.jsonl" "$out/phantoms/train/dialogues.json"
for part in captions.jsonl dialogues.json; do
  medgpt ingest "$out/phantoms/train/$part" --tokenizer "$out/tokenizer" --key-file "$out/identity.key" \
    --out "$out/${part%%.*}"
done
medgpt inspect "$out/dialogues" --verify
medgpt train "$here/run.yaml" --nproc 2 out="$out/run" tokenizer="$out/tokenizer" \
  stages.align.data.0.path="$out/captions" stages.instruct.data.0.path="$out/dialogues" \
  stages.instruct.data.1.path="$out/captions" stages.instruct.validation_data.0.path="$out/dialogues"
medgpt eval phantoms --data "$out/phantoms/test" --checkpoint "$out/run" --sequence-length 256 \
  --out "$out/run/eval/phantoms.json"
medgpt report "$out/run"
