#!/usr/bin/env bash
# Build the Dockerfile for real without a container engine, a GPU or access to NGC: buildah on a stand-in base made of
# Debian, Python and PyTorch's CPU build. Every instruction runs as it does on the NGC image; the stand-in only lacks what
# NVIDIA ships (CUDA, TransformerEngine, apex, DALI), and the build says so. Then runs the image as its own user:
# `medgpt doctor` and the first steps of the demo.
#
#   make image-test                        needs root, buildah and debootstrap (Debian, Ubuntu: apt install both)
#   PIP_ARGS="--find-links /wheels" VOLUMES="/wheels" tools/image/build_on_stand_in.sh
#
# With NVCC=yes the stand-in also brings NVIDIA's compiler (from PyPI), and the CUDA sources are compiled for the GPUs
# it knows.
#
# WORK        folder for the base and the image (a new one below /tmp, removed at the end, unless given)
# PIP_ARGS    passed to every pip call          VOLUMES   folders of this machine that the build may read
# MIRROR      of Debian, for debootstrap        SUITE     of Debian (bookworm)
set -euo pipefail
cd "$(dirname "$0")/../.."
for program in buildah debootstrap; do
  command -v "$program" >/dev/null || { echo "image-test: $program not found (apt install buildah debootstrap)" >&2; exit 2; }
done
[[ $EUID == 0 ]] || { echo "image-test: must be root (debootstrap and chroot need it)" >&2; exit 2; }

: "${SUITE:=bookworm}" "${MIRROR:=}" "${PIP_ARGS:=}" "${VOLUMES:=}" "${TORCH:=torch==2.13.0}" "${NVCC:=}"
read -r -a pip_args <<<"$PIP_ARGS"
if [[ -z ${WORK:-} ]]; then
  WORK=$(mktemp -d /tmp/medgpt-image.XXXXXX)
  trap 'rm -rf "$WORK"' EXIT
fi
mkdir -p "$WORK"
storage=(--storage-driver vfs --root "$WORK/storage" --runroot "$WORK/run")
mounts=(--volume /etc/ssl/certs:/etc/ssl/certs:ro)
for folder in $VOLUMES; do mounts+=(--volume "$folder:$folder:ro"); done
image() { buildah "${storage[@]}" "$@"; }

if [[ ! -x $WORK/base/usr/bin/python3 ]]; then
  echo "== stand-in base: Debian $SUITE with Python"
  packages=python3,python3-venv,python3-pip,python3-setuptools,python3-wheel,ca-certificates${NVCC:+,g++}
  debootstrap --variant=minbase --include="$packages" "$SUITE" "$WORK/base" ${MIRROR:+"$MIRROR"} \
    >"$WORK/debootstrap.log" || { tail -5 "$WORK/debootstrap.log" >&2; exit 1; }
fi
if ! image images --quiet stand-in >/dev/null 2>&1; then
  echo "== stand-in base: PyTorch"
  container=$(image from scratch)
  image add --quiet "$container" "$WORK/base" / >/dev/null
  # The NGC image brings torch; so does the stand-in.
  image run --isolation chroot "${mounts[@]}" "$container" -- \
    python3 -m pip install --quiet --no-cache-dir --break-system-packages "$TORCH" "${pip_args[@]}"
  if [[ -n $NVCC ]]; then
    image run --isolation chroot "${mounts[@]}" "$container" -- python3 -m pip install --quiet --no-cache-dir \
      --break-system-packages nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-runtime nvidia-cuda-cccl \
      "${pip_args[@]}"
    # shellcheck disable=SC2016 # expanded inside
    image run --isolation chroot "$container" -- bash -c \
      'printf "#!/bin/sh\nexec %s \"\$@\"\n" "$(find /usr/local/lib -path "*/bin/nvcc" -type f)" >/usr/local/bin/nvcc
       chmod +x /usr/local/bin/nvcc && nvcc --version | tail -1' # a link would not find its headers
  fi
  image commit --quiet --rm "$container" stand-in >/dev/null
fi

echo "== Dockerfile"
# Docker's format: the OCI one has no SHELL, and pipelines in RUN lines would hide failures.
image bud --format docker --isolation chroot --layers=false --tag medgpt "${mounts[@]}" \
  --build-arg BASE_IMAGE=localhost/stand-in --build-arg PIP_ARGS="$PIP_ARGS" \
  --build-arg REVISION="$(git rev-parse --short HEAD 2>/dev/null || echo unknown)" \
  --build-arg CREATED="$(date -u +%Y-%m-%dT%H:%M:%SZ)" .

echo "== the image, run as its own user"
container=$(image from medgpt)
inside() { image run --isolation chroot "$container" -- "$@"; }
[[ $(inside id -un) == medgpt ]] || { echo "image-test: the image runs as root" >&2; exit 1; }
if inside touch /opt/medgpt/megatron_medgpt/types.py 2>/dev/null; then
  echo "image-test: the user of the image can change its code" >&2
  exit 1
fi
if [[ -n $NVCC ]]; then
  # shellcheck disable=SC2016 # expanded inside
  inside bash -c 'ls "$(python3 -c "import medgpt_kernels, pathlib; print(pathlib.Path(medgpt_kernels.__file__).parent)")"/*/cuda/built/*.so'
fi
inside medgpt doctor
inside medgpt demo --quick --out /workspace/demo
inside test -s /workspace/demo/report.html
image rm "$container" >/dev/null
echo "image-test: built, doctor and the quick demo ran inside"
