#!/usr/bin/env bash
# Published weights -> one stage -> a Hugging Face folder -> transformers. Usage: run.sh [FOLDER].
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-work/public}
command -v medgpt > /dev/null || PATH="$here/../../.venv/bin:$PATH"

medgpt phantoms --out "$out/phantoms" --images 60 --questions 8
python "$here/../../tools/data/train_tokenizer.py" --out "$out/tokenizer" --vocab-size 512 \
  "$out/phantoms/train/captions.jsonl"
medgpt ingest "$out/phantoms/train/captions.jsonl" --tokenizer "$out/tokenizer" --key-file "$out/identity.key" \
  --out "$out/captions"

# With the public weights: --language gpt-oss-20b --vision clip-vit-large-patch14-336
python "$here/small_weights.py" "$out/published" "$out/tokenizer"
medgpt convert hf-to-megatron --language "$out/published/language" --vision "$out/published/vision" --out "$out/start"

medgpt train "$here/run.yaml" --nproc 2 out="$out/run" tokenizer="$out/tokenizer" \
  stages.align.data.0.path="$out/captions" checkpoint.start_from="$out/start"

medgpt convert megatron-to-hf --checkpoint "$out/run" --out "$out/export" --dtype bf16
medgpt convert verify --checkpoint "$out/run" --hf "$out/export"
image=$(find "$out/phantoms" -name '*.png' | sort | sed -n 1p)
python "$here/generate.py" "$out/export" "$image" "Which modality is this?"
