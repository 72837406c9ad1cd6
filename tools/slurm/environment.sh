# shellcheck shell=bash
# Sourced by the sbatch files: settings, the environment of every rank, and how a command is run on a node.
# Settings come from the file that submit.py writes, or from these defaults and the environment.

: "${WORKSPACE:=$PWD}" "${RUN:=demo-quick}" "${OUT:=$WORKSPACE/runs/$RUN}" "${OVERRIDES:=}"
: "${LAUNCH:=torchrun}" "${RUNTIME:=bare}" "${IMAGE:=}" "${MOUNTS:=}" "${PYTHON:=python}" "${SETUP:=}"
: "${GPU:=cpu}" "${GPUS_PER_NODE:=0}" "${RANKS_PER_NODE:=$((GPUS_PER_NODE > 0 ? GPUS_PER_NODE : 1))}"
: "${NETWORK_INTERFACE:=}" "${SAVE_SECONDS:=300}" "${MAX_RESTARTS:=3}" "${PREFLIGHT:=yes}"
: "${MIN_BANDWIDTH_GB_S:=0}" "${MIN_FREE_GB:=20}" "${NEEDS:=}" "${CODE:=$PWD}"
: "${PREFLIGHT_SECONDS:=180}" "${MEET_SECONDS:=300}" "${PEER_SECONDS:=120}"

cd "$WORKSPACE" || exit 2 # what runs and commands name by a relative path lies below it
umask 077
ulimit -c 0 # a core dump would hold pixels
# shellcheck source=/dev/null
[[ -z $SETUP ]] || source "$SETUP"

# Ranks meet at the first node, on a port that no other job of this user is likely to have; both are the same on every
# node because they are made here, once. NodeAddr is what Slurm itself uses to reach the node.
NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,)
first_host=${NODES%%,*}
MASTER_ADDR=$(scontrol show node "$first_host" --oneliner | tr ' ' '\n' | sed -n 's/^NodeAddr=//p')
export MASTER_ADDR=${MASTER_ADDR:-$first_host}
export MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7919 + ${SLURM_RESTART_COUNT:-0} * 104729 + RANDOM) % 12000)) # below the ports that connections take
export MEDGPT_MEET_SECONDS=$MEET_SECONDS # ranks that have not all come by then give up, and say who is missing

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # ranks share a node's cores; the data path has threads of its own
export PYTHONUNBUFFERED=1                    # the last lines before a kill reach the log
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1     # a lost peer is an error, not a hang
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
export TOKENIZERS_PARALLELISM=false # workers fork after the tokenizer was used
if [[ -n $NETWORK_INTERFACE ]]; then
  # Rendezvous has no authentication: keep it on the private network.
  export NCCL_SOCKET_IFNAME=$NETWORK_INTERFACE GLOO_SOCKET_IFNAME=$NETWORK_INTERFACE
fi
case $GPU in
  h100 | h200)
    # One queue keeps a tensor-parallel exchange in front of the product that waits for it (Hopper and older).
    export CUDA_DEVICE_MAX_CONNECTIONS=1
    ;;
  b200 | b300 | gb200 | gb300)
    # Blackwell schedules copies and products separately; a single queue only serialises them.
    unset CUDA_DEVICE_MAX_CONNECTIONS
    ;;
esac
case $GPU in
  gb200 | gb300)
    export NCCL_MNNVL_ENABLE=1 # NVLink reaches beyond the node, through the rack
    ;;
esac
if [[ $GPU != cpu ]]; then
  # Rows of a batch differ in images and documents, so sizes vary; without this the allocator fragments.
  export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
fi

# on_nodes TASKS_PER_NODE COMMAND...: run a command on every node of the job, in the container where there is one.
# WITHIN=seconds ends it after that time; ALONE=yes lets the tasks of the other nodes go on when one has failed.
on_nodes() {
  local tasks=$1
  shift
  local options=(--nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node="$tasks" --export=ALL)
  local run=(srun) container=()
  [[ -z ${WITHIN:-} ]] || run=(timeout --signal=TERM --kill-after=15 "$WITHIN" srun)
  [[ ${ALONE:-} == yes ]] || options+=(--kill-on-bad-exit=1)
  case $RUNTIME in
    bare) ;;
    pyxis)
      options+=(--container-image="$IMAGE" --no-container-mount-home --container-workdir="$WORKSPACE")
      [[ -z $MOUNTS ]] || options+=(--container-mounts="$MOUNTS")
      ;;
    apptainer)
      container=(apptainer exec --pwd "$WORKSPACE")
      [[ $GPU == cpu ]] || container+=(--nv)
      [[ -z $MOUNTS ]] || container+=(--bind "$MOUNTS")
      container+=("$IMAGE")
      ;;
    *)
      echo "runtime=$RUNTIME: allowed are bare, pyxis, apptainer" >&2
      return 2
      ;;
  esac
  "${run[@]}" "${options[@]}" "${container[@]}" "$@"
}
