#!/usr/bin/env bash
# From the published files to an evaluated model. What was done is not done again: give the same command after a stop.
# The settings, from the environment:
: "${LLAVA_MED:?folder with llava_med_{alignment_500k,instruct_60k_inline_mention}.json and llava_med_image_urls.jsonl}"
: "${SETS:?folder with any of pubmedvision, vqa_rad, path_vqa, slake, pmc_vqa}"
: "${OMNIMEDVQA:?folder of OmniMedVQA as it is unpacked}"
: "${GPT_OSS:?folder of GPT-oss}" "${VISION:?folder of CLIP ViT-L/14-336 or MedSigLIP}"
: "${TOKENIZER:=$GPT_OSS}" "${OUT:=work/curriculum}" "${RUN:=20b-8xh100}" "${NPROC:=8}" "${BUCKET:=}"
: "${EVAL_LAYOUT:=--nproc $NPROC --expert $NPROC}"
set -euo pipefail
tools=$(cd "$(dirname "$0")/../../tools" && pwd)
mkdir -p "$OUT"
cd "$OUT"
is_there() { [[ -e $1 ]] && echo "$1 is there"; }

# 1. LLaVA-Med's pictures: each from its article, with its licence. What may not be taken is listed as refused.
python "$tools/data/fetch_pmc.py" "$LLAVA_MED/llava_med_image_urls.jsonl" --out images ${BUCKET:+--bucket "$BUCKET"}

# 2. Ingest. Records whose picture could not be had are rejects, so their share may be large.
ingest() { # NAME INPUT OPTION...
  is_there "data/$1/dataset.json" ||
    medgpt ingest "${@:2}" --tokenizer "$TOKENIZER" --key-file identity.key --suspicious-text mask --out "data/$1"
}
ingest align "$LLAVA_MED/llava_med_alignment_500k.json" --image-root images --max-reject-rate 0.5
ingest instruct "$LLAVA_MED/llava_med_instruct_60k_inline_mention.json" --image-root images --max-reject-rate 0.5
align='{path: data/align}' instruct='{path: data/instruct, weight: 2}' # weight 2: shown twice an epoch
for set in vqa_rad path_vqa slake pmc_vqa pubmedvision; do
  [[ -d $SETS/$set ]] || continue
  case $set in
    slake)   ingest slake "$SETS/slake/train.json" ;;
    pmc_vqa) ingest pmc_vqa "$SETS/pmc_vqa/train.csv" --image-root "$SETS/pmc_vqa/images" ;;
    pubmedvision)
      ingest pubmedvision_align "$SETS/$set/PubMedVision_Alignment_VQA.json" --image-root "$SETS/$set"
      ingest pubmedvision "$SETS/$set/PubMedVision_InstructionTuning_VQA.json" --image-root "$SETS/$set"
      align+=', {path: data/pubmedvision_align}'
      ;;
    *) ingest "$set" "$SETS/$set" ;;
  esac
  instruct+=", {path: data/$set}"
done

# 3. Does the training data hold pictures of the evaluation? Those samples are listed, and left out below.
is_there leakage/exclude.jsonl ||
  python "$tools/data/audit_leakage.py" --train data/* --eval omnimedvqa="$OMNIMEDVQA" --out leakage

# 4. The public weights become one checkpoint, which every layout loads.
is_there start/manifest.json || medgpt convert hf-to-megatron --language "$GPT_OSS" --vision "$VISION" --out start

# 5. Train: the projector on captions, then everything but the encoder on dialogues and questions.
train=(medgpt train "$RUN" --nproc "$NPROC" out=run tokenizer="$TOKENIZER" checkpoint.start_from=start
  stages.align.data="[$align]" stages.align.exclude=leakage/exclude.jsonl
  stages.instruct.data="[$instruct]" stages.instruct.exclude=leakage/exclude.jsonl)
is_there run/checkpoints || "${train[@]}" --dry-run
"${train[@]}"

# 6. Ask it, look, and take it elsewhere.
read -ra layout <<< "$EVAL_LAYOUT"
medgpt eval omnimedvqa --data "$OMNIMEDVQA" --checkpoint run "${layout[@]}" --text-only \
  --protocol official-qa,official-prefix,letter --out run/eval/omnimedvqa.json
mkdir -p run/leakage && cp leakage/* run/leakage
medgpt report run
is_there exported/config.json || medgpt convert megatron-to-hf --checkpoint run --out exported
medgpt convert verify --checkpoint run --hf exported
