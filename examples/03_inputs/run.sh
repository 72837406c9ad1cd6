#!/usr/bin/env bash
# Every kind of input, ingested and trained on for ten steps, with a stop on the way. Usage: run.sh [FOLDER [INPUT...]].
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-work/inputs}
command -v medgpt > /dev/null || PATH="$here/../../.venv/bin:$PATH"
inputs=("${@:2}")
[ ${#inputs[@]} -gt 0 ] ||
  inputs=(llava messages roco vqa_rad pmc_vqa slake omnimedvqa webdataset energon pairs dicom series nifti
    slides)

mkdir -p "$out"
cd "$out"
medgpt phantoms --out phantoms --images 24 --validation 0 --questions 16
python "$here/make_inputs.py" phantoms inputs
python "$here/../../tools/data/train_tokenizer.py" phantoms/train/captions.jsonl phantoms/train/dialogues.json \
  --out tokenizer --vocab-size 512

ingest() { medgpt ingest "$@" --tokenizer tokenizer --key-file identity.key --workers 1; }
for input in "${inputs[@]}"; do
  case $input in
    llava)      ingest inputs/llava/alignment.json --out data/llava ;;
    messages)   ingest inputs/messages/chat.jsonl --out data/messages ;;
    roco)       ingest inputs/roco/traindata.csv --image-root inputs/roco/images --out data/roco ;;
    vqa_rad)    ingest inputs/vqa_rad --out data/vqa_rad ;;
    pmc_vqa)    ingest inputs/pmc_vqa/train.csv --image-root inputs/pmc_vqa/images --out data/pmc_vqa ;;
    slake)      ingest inputs/slake/train.json --out data/slake ;;
    omnimedvqa) ingest inputs/omnimedvqa --out data/omnimedvqa ;;
    webdataset) ingest "inputs/webdataset/train-{000000..000001}.tar" --out data/webdataset ;;
    energon)    ingest inputs/energon --out data/energon ;;
    pairs)      ingest inputs/pairs --out data/pairs ;;
    dicom)      ingest inputs/dicom/reports.csv --image-root inputs/dicom/tree --out data/dicom ;;
    series)     ingest inputs/series/reports.csv --image-root inputs/series/tree --slices even:3 --out data/series ;;
    nifti)      ingest inputs/nifti/volumes.csv --slices even:3 --out data/nifti ;;
    slides)     ingest inputs/slides/slides.csv --um-per-px 1 --tile-px 96 --tiles even:4 --out data/slides ;;
  esac
done

# One stage of ten steps for each input.
stages=
for input in "${inputs[@]}"; do
  stages+="{name: $input, data: [{path: data/$input}], num_steps: 10, sequence_length: 256, global_batch_rows: 2},"
done
train=(medgpt train "$here/run.yaml" "stages=[${stages%,}]")
"${train[@]}" &
running=$!
until [ -s run/metrics.jsonl ] || ! kill -0 $running 2>/dev/null; do sleep 0.1; done
kill -TERM $running 2>/dev/null || true # as Ctrl-C or a cluster stops it: it saves and ends
wait $running
"${train[@]}" # the same command goes on where it was
