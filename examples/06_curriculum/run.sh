#!/usr/bin/env bash
# curriculum.sh with small stand-ins for everything that is downloaded. Usage: run.sh [FOLDER].
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$here/../..
out=${1:-work/curriculum}
command -v medgpt > /dev/null || PATH="$root/.venv/bin:$PATH"
mkdir -p "$out"
out=$(cd "$out" && pwd)

if [[ ! -e $out/stand-ins/weights ]]; then
  rm -rf "$out/stand-ins"
  medgpt phantoms --out "$out/stand-ins/phantoms" --images 60 --validation 0 --questions 16
  python "$here/stand_ins.py" make "$out/stand-ins/phantoms/train" "$out/stand-ins"
  medgpt phantoms --out "$out/stand-ins/others" --images 8 --validation 0 --questions 16 --seed 1
  python "$root/examples/03_inputs/make_inputs.py" "$out/stand-ins/others" "$out/stand-ins/sets"
  # One picture of the evaluation hides in the training data, as it happens; the audit is to find it.
  cp "$out/stand-ins/phantoms/test/Images/Phantom CT/00002.jpg" "$out"/stand-ins/sets/pmc_vqa/images/2.*
  mv "$out/stand-ins/pubmedvision" "$out/stand-ins/sets"
  python "$root/tools/data/train_tokenizer.py" --out "$out/stand-ins/tokenizer" --vocab-size 512 \
    "$out/stand-ins/phantoms/train/captions.jsonl" "$out/stand-ins/phantoms/train/dialogues.json"
  python "$root/examples/02_import_train_export/small_weights.py" "$out/stand-ins/weights" "$out/stand-ins/tokenizer"
fi
rm -f "$out/stand-ins/url"
python "$here/stand_ins.py" serve "$out/stand-ins/bucket" "$out/stand-ins/url" &
server=$!
trap 'kill $server' EXIT
until [[ -s $out/stand-ins/url ]]; do sleep 0.1; done

export BUCKET LLAVA_MED=$out/stand-ins/llava_med SETS=$out/stand-ins/sets OMNIMEDVQA=$out/stand-ins/phantoms/test
export GPT_OSS=$out/stand-ins/weights/language VISION=$out/stand-ins/weights/vision TOKENIZER=$out/stand-ins/tokenizer
export OUT=$out RUN=$here/run.yaml NPROC=2 EVAL_LAYOUT="--nproc 2 --expert 2 --max-new-tokens 8"
BUCKET=$(cat "$out/stand-ins/url")
bash "$here/curriculum.sh"
