"""The platform, and that megatron-core still needs each replacement: a red test here means one can go."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.parallel.platform import current_device, engine_version, platform, prepare_engine

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="replacements are for machines without CUDA")
NO_CUDA = ("CUDA", "Found no NVIDIA driver")


@pytest.fixture(scope="module")
def unprepared():
    """What the engine answers in a process where nobody has prepared it."""
    program = Path(__file__).with_name("unprepared_engine.py")
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@on_cpu
@pytest.mark.parametrize("defect", ["device_queries", "streams", "factories", "optimizer_state", "device_generator"])
def test_the_engine_still_asks_for_cuda(unprepared, defect):
    """answer_device_queries, give_streams_that_do_nothing, place_factories_on_the_cpu,
    exchange_optimizer_state_on_the_host, draw_no_random_numbers_on_the_device."""
    assert not unprepared[defect].startswith("answered"), unprepared
    assert any(word in unprepared[defect] for word in NO_CUDA)


@on_cpu
def test_the_optimizer_still_refuses_cpu_tensors(unprepared):
    """accept_cpu_tensors_in_the_optimizer."""
    assert unprepared["optimizer_types"].startswith("AssertionError")


@on_cpu
def test_the_dispatcher_still_hands_tensors_to_all_to_all(unprepared):
    """hand_lists_to_all_to_all."""
    assert unprepared["all_to_all_lists"] == "answered Tensor"


@on_cpu
def test_the_engine_still_reduces_over_one_rank(unprepared):
    """skip_collectives_of_one_rank."""
    assert unprepared["collectives_of_one_rank"] == "answered calls"


@on_cpu
def test_every_gloo_group_still_polls_with_a_thread_of_its_own(unprepared):
    """share_one_network_loop."""
    assert unprepared["network_loops"] == "answered 4 for 4 groups"


def test_the_engine_still_leaves_slices_unmarked(unprepared):
    """model/language.py, _mark_slices."""
    if engine_version() >= (0, 17):
        pytest.skip(f"megatron-core {engine_version()} marks the slices it does not initialise")
    assert unprepared["slice_marks"] == "answered no mark"


@on_cpu
def test_only_the_engine_sees_the_stand_in():
    prepare_engine()
    import megatron.core.tensor_parallel.mappings as engine_module

    assert engine_module.torch is not torch
    assert engine_module.torch.cuda.current_device() == torch.device("cpu")
    assert engine_module.torch.zeros(2, device="cuda").device.type == "cpu"
    assert engine_module.torch.Tensor is torch.Tensor
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(2, device="cuda")


@on_cpu
def test_preparing_twice_changes_nothing():
    prepare_engine()
    import megatron.core.tensor_parallel.mappings as engine_module

    before = engine_module.torch
    prepare_engine()
    assert engine_module.torch is before


@on_cpu
def test_tensor_types_are_as_ever_outside_the_optimizer():
    prepare_engine()
    assert torch.zeros(1).type() == "torch.FloatTensor"


def test_cuda_is_chosen_where_there_is_a_device():
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert platform().kind == current_device().type == expected


@on_cpu
def test_asking_for_cuda_without_a_device_says_what_to_set():
    with pytest.raises(UsageError, match="set it to cpu or auto"):
        platform(kind="cuda")
