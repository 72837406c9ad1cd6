# shellcheck shell=bash
# Sourced by train.sbatch after environment.sh.
# preflight: check every node before a job burns hours; names the bad node and returns not 0.
preflight() {
  local found="$OUT/preflight/$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
  local check=("$PYTHON" "$CODE/tools/slurm/preflight.py") must_exist=() path
  for path in $NEEDS; do must_exist+=(--needs "$path"); done
  mkdir -p "$found"
  # A node that cannot run the check, or not in time (a file system that hangs), leaves no report; the judge names it.
  # The others report all the same: one that fails must not end them.
  WITHIN=$PREFLIGHT_SECONDS ALONE=yes on_nodes 1 "${check[@]}" node --found "$found" --shared "$OUT" "${must_exist[@]}" || true
  "${check[@]}" judge --found "$found" --gpus "$GPUS_PER_NODE" --gpu "$GPU" --min-free-gb "$MIN_FREE_GB" \
    --nodes "$NODES" || return
  if [[ $GPUS_PER_NODE -gt 0 || $MIN_BANDWIDTH_GB_S != 0 ]]; then
    WITHIN=$((PREFLIGHT_SECONDS + 300)) on_nodes 1 "$PYTHON" -m torch.distributed.run \
      --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$RANKS_PER_NODE" --rdzv-backend=c10d \
      --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$MASTER_ADDR:$((MASTER_PORT + 1))" \
      "$CODE/tools/slurm/bandwidth.py" --gpu "$GPU" --min-gb-s "$MIN_BANDWIDTH_GB_S"
  fi
}
