# make demo    train a small medical vision-language model on this machine, start to finish
# make test    everything CI runs on this Python's line of megatron-core
# make check   the quick part, before every commit
# Each sets up its own virtual environment first. PIP_ARGS is passed to pip (for example another index).

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EXTRAS ?= dev,dali
PIP_ARGS ?=
# Two lines of megatron-core are supported; this is the Python of the other one.
PYTHON_NEWEST ?= $(shell for p in python3.13 python3.12; do $$p -c 'import venv' 2>/dev/null && { echo $$p; break; }; done)
VENV_NEWEST ?= .venv-newest

# Two files at a time; what starts several ranks stays with one worker (tests/conftest.py).
PYTEST ?= -m pytest -n 2 --dist loadscope

export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-newest check format setup setup-newest clean slurm-test image-test twins lock
.PHONY: convert-bench convert-matrix vllm-test fuzz chat-test gpu-rehearsal formats

setup: $(VENV)/ready

$(VENV)/ready: setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "Python 3.10 or later is needed; found $$($(PYTHON) -V). Set PYTHON=python3.x"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "python3-venv is missing (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	@echo "setting up $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install -q --upgrade pip wheel "setuptools<82" $(PIP_ARGS)
	@$(BIN)/python -m pip install -q torch==2.13.0 $(PIP_ARGS)
	@$(BIN)/python -m pip install -q -c constraints.txt -e '.[$(EXTRAS)]' $(PIP_ARGS)
	@touch $@

demo: setup
	@$(BIN)/medgpt demo --out demo

check: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check -q . || { echo "run: make format"; exit 1; }
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache >/tmp/medgpt-imports.$$$$ 2>&1 || { cat /tmp/medgpt-imports.$$$$; rm -f /tmp/medgpt-imports.$$$$; exit 1; }; rm -f /tmp/medgpt-imports.$$$$
	@$(BIN)/python $(PYTEST) tests/unit -x -q

test: setup
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache
	@$(BIN)/python $(PYTEST) tests

format: setup
	@$(BIN)/ruff format -q .
	@$(BIN)/ruff check -q --fix .

setup-newest:
	@test -n "$(PYTHON_NEWEST)" || { echo "no Python 3.12 or later found; set PYTHON_NEWEST=/path/to/python3.12"; exit 1; }
	@$(MAKE) --no-print-directory setup PYTHON=$(PYTHON_NEWEST) VENV=$(VENV_NEWEST)

# The other line of megatron-core: what touches the engine. Ingest, shards, reports, Slurm and network namespaces do not.
test-newest: setup-newest
	@$(VENV_NEWEST)/bin/python $(PYTEST) tests/unit tests/parallel tests/parity tests/flow \
	  --ignore tests/unit/ingest --ignore tests/unit/data --ignore tests/unit/observe \
	  --ignore tests/flow/test_slurm.py --ignore tests/flow/test_slurm_bad_nodes.py \
	  --ignore tests/flow/test_slurm_launchers.py --ignore tests/flow/test_two_hosts.py \
	  --ignore tests/flow/test_curriculum_example.py

# A real two-node Slurm on this host (Debian: apt install slurm-wlm munge, as root), and two hosts in network namespaces.
slurm-test: setup
	@MEDGPT_SLURM=all $(BIN)/python -m pytest tests/flow/test_slurm.py tests/flow/test_slurm_bad_nodes.py \
	  tests/flow/test_two_hosts.py tests/flow/test_slurm_launchers.py

# A tiny twin of every cluster recipe, both stages, in its layout as far as four ranks carry it (CI trains two).
twins: setup
	@MEDGPT_TWINS=all $(BIN)/python -m pytest tests/flow/test_cluster_recipes.py -rP

# The image's locks with hashes, for both lines of megatron-core; no more than their Pythons and pip are needed.
lock:
	@$(PYTHON) tools/image/lock.py --pip-args "$(PIP_ARGS)"
	@$(PYTHON_NEWEST) tools/image/lock.py --pip-args "$(PIP_ARGS)"

# The container on a stand-in base (Debian: apt install buildah debootstrap, as root).
image-test:
	@tools/image/build_on_stand_in.sh

# A 20B in MXFP4 with random blocks (13.8 GB) converted in and out, with its figures.
convert-bench: setup
	@$(BIN)/python tools/convert/benchmark.py --work build/convert-bench

# Every layout x dtype x tower of the converters, by logits.
convert-matrix: setup
	@$(BIN)/python tools/convert/matrix.py

# Exports in vLLM itself, on this machine's CPU: its logits, its pixels, its server under `medgpt eval` (6 GB of packages
# in an environment of their own; seven minutes and the download).
vllm-test: setup
	@test -n "$(PYTHON_NEWEST)" || { echo "no Python 3.12 or later found; set PYTHON_NEWEST=/path/to/python3.12"; exit 1; }
	@PYTHON="$(PYTHON_NEWEST)" PIP_ARGS="$(PIP_ARGS)" tools/convert/vllm_on_a_cpu.sh build/vllm
	@MEDGPT_VLLM=$(CURDIR)/build/vllm/bin/python $(BIN)/python -m pytest tests/flow/test_vllm.py -rP --timeout 1800

# 20,000 damaged inputs for each reader: tables, archives, pictures, slides, vocabularies, datasets (CI does a few of each).
fuzz: setup
	@MEDGPT_FUZZ_CASES=20000 $(BIN)/python -m pytest -n 2 --dist load --timeout 7200 tests/unit/data/test_damaged_datasets.py \
	  tests/unit/ingest/test_damaged_files.py tests/unit/ingest/test_damaged_inputs.py
	@MEDGPT_FUZZ_CASES=1 $(BIN)/python $(PYTEST) $$(grep -rl 'hypothesis import' tests/unit --exclude 'test_damaged_*' --exclude conftest.py)

# The page of `medgpt chat` with Gradio, which asks for an older Pillow than ours and so gets a folder of its own; by
# keyboard too, where a Chromium is installed.
chat-test: setup
	@$(BIN)/python -m pip install -q --target build/chat-packages 'gradio>=6.31' playwright $(PIP_ARGS)
	@PYTHONPATH=build/chat-packages $(BIN)/python -m pytest tests/unit/chat

# The demo's first stage with experts unrounded, in FP8 and in MXFP4: how far the loss curves come apart (a quarter of an
# hour).
formats: setup
	@MEDGPT_FORMATS=all $(BIN)/python -m pytest tests/flow/test_kernel_formats.py -rP --timeout 7200

# Everything tools/gpu/verify.sh does, in a tiny form without a GPU.
gpu-rehearsal: setup
	@PYTHON=$(BIN)/python tools/gpu/verify.sh --rehearse --only machine,build,tests,bench,sanitize --out build/rehearsal

clean:
	rm -rf $(VENV) $(VENV_NEWEST) demo build *.egg-info
