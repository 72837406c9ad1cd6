#!/usr/bin/env bash
# Memory errors and shared-memory races over one small launch of every kernel. Exit 77: it cannot run here.
set -uo pipefail
python=${1:-python3}
[ "${CUDA_VISIBLE_DEVICES-any}" = "" ] && { echo "compute-sanitizer needs a GPU"; exit 77; }
command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not installed"; exit 77; }
export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # so that every tensor is an allocation of its own with guarded ends
probe=$(compute-sanitizer "$python" -c 'import torch; torch.ones(4, device="cuda").sum().item()' 2>&1)
case $probe in *"Device not supported"*|*"error 999"*) echo "compute-sanitizer does not support this virtual machine"; exit 77 ;; esac
"$python" kernels/every_kernel.py || exit 1 # compiles them, outside the tool
status=0
for tool in memcheck racecheck; do
  echo "== $tool"
  # Of PyTorch's kernels, by their mangled names, nothing is asked.
  compute-sanitizer --tool "$tool" --error-exitcode 9 --kernel-name-exclude kns=_ZN2at "$python" kernels/every_kernel.py \
    || status=1
done
exit $status
