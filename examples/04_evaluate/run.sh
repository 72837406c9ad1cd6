#!/usr/bin/env bash
# A trained model's figures, and what they are worth. Usage: run.sh [FOLDER [DEMO]], where DEMO is what `make demo` made
# (without it a model is trained for a few seconds, which knows nothing).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-work/evaluate}
demo=${2:-$out/demo}
command -v medgpt > /dev/null || PATH="$here/../../.venv/bin:$PATH"
questions=$demo/phantoms/test
[[ -e $demo/summary.json ]] || medgpt demo --quick --out "$demo"

# 1. Published protocols, with controls, in any layout. The model is loaded once.
medgpt eval phantoms --data "$questions" --checkpoint "$demo/run" --nproc 2 --expert 2 --max-new-tokens 8 \
  --protocol official-prefix,letter --text-only --out "$out/eval/ours.json"

# 2. The same letters from the exported model, in transformers. An endpoint is asked with --endpoint URL.
medgpt eval phantoms --data "$questions" --hf "$demo/exported" --protocol letter --max-new-tokens 8 --no-controls \
  --out "$out/eval/exported.json"

# 3. Answers that any other model has written, scored by the same rule and tested against ours, question by question.
python "$here/other_model.py" "$questions" > "$out/other.jsonl"
medgpt score phantoms --data "$questions" --predictions "$out/other.jsonl" --protocol letter \
  --against "$out/eval/ours.letter.json" --out "$out/eval/other.json"

# 4. Has the training data seen the questions?
python "$here/../../tools/data/audit_leakage.py" --train "$demo/data/captions" "$demo/data/dialogues" \
  --eval phantoms="$questions" --out "$out/leakage"

# 5. All of it on one page: the run's own, with these results and what the search has found.
cp -r "$demo/run" "$out/run" && cp "$out"/eval/* "$out/run/eval/" && cp -r "$out/leakage" "$out/run/leakage"
medgpt report "$out/run"
