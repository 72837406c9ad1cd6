# syntax=docker/dockerfile:1
# Megatron-MedGPT on the NGC PyTorch image. Its own torch, TransformerEngine, apex and DALI stay as they are.
#
#   docker build -t medgpt .                                     on a machine that can pull from nvcr.io
#   make image-test                                              the same instructions on Debian, without GPU or NGC
#
# 26.06 is the release that Megatron-LM's own CI runs on. A tag can be moved; pin its digest where an image must not
# change under you: --build-arg BASE_DIGEST=sha256:... (docker buildx imagetools inspect nvcr.io/nvidia/pytorch:26.06-py3)
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:26.06-py3
ARG BASE_DIGEST=""

# hadolint ignore=DL3006
FROM ${BASE_IMAGE}${BASE_DIGEST:+@}${BASE_DIGEST}
ARG PIP_ARGS=""

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# TOKENIZERS_PARALLELISM is no secret.
# hadolint ignore=DL3064
ENV PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    TOKENIZERS_PARALLELISM=false

# Dependencies first: they change less often than the code. install.py leaves alone what the base brought.
WORKDIR /opt/medgpt
COPY setup.py pyproject.toml constraints.txt LICENSE README.md ./
COPY tools/image tools/image
RUN python3 tools/image/install.py dependencies ${PIP_ARGS:+--pip-args "${PIP_ARGS}"}

COPY megatron_medgpt megatron_medgpt
COPY kernels kernels
COPY tools tools
COPY examples examples
RUN python3 tools/image/install.py package ${PIP_ARGS:+--pip-args "${PIP_ARGS}"} \
 && python3 tools/image/install.py kernels \
 && python3 tools/image/install.py bill-of-materials --out /opt/medgpt/bill-of-materials.json \
 && chmod -R a+rX,go-w /opt/medgpt

# Code is read-only to the user who runs it; runs go to /workspace.
RUN groupadd --gid 10001 medgpt && useradd --create-home --uid 10001 --gid 10001 --shell /bin/bash medgpt \
 && mkdir -p /workspace && chown medgpt:medgpt /workspace
# By number, so that an orchestrator can see that it is not root.
USER 10001:10001
WORKDIR /workspace
ENV HOME=/home/medgpt
# As the last step that runs: says what the image has and what it lacks; a broken install does not become an image.
RUN medgpt doctor
CMD ["medgpt", "--help"]

# Last, because they differ with every build and would end the cache of what follows them.
ARG BASE_IMAGE
ARG BASE_DIGEST
ARG VERSION=0.1.0
ARG REVISION=unknown
ARG CREATED=unknown
ARG SOURCE=unknown
LABEL org.opencontainers.image.title="Megatron-MedGPT" \
      org.opencontainers.image.description="Pretraining of biomedical GPT-oss vision-language models" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.base.name="${BASE_IMAGE}" \
      org.opencontainers.image.base.digest="${BASE_DIGEST}"
