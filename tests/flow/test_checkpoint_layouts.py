"""Exact resume, and resume in another layout, of the whole small model with its optimizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checkpoint_ranks import run_ranks

from megatron_medgpt.parallel.groups import start, stop

# isort: split
from megatron.core.dist_checkpointing import load_plain_tensors

CASES = [
    ["resume-bf16-tp2-ep2", "resume", "2,1,2", "bfloat16"],
    ["resume-pp2-idle-stage", "resume", "1,2,1", "float32", "encoder+language+experts+router"],
    ["resume-ep2", "resume", "1,1,2", "float32"],
    ["reshard", "reshard", "2,1,2", "1,2,1", "1,1,2", "1,1,1", "2,1,2"],
    ["weights", "weights", "2,1,2"],
]
Run = tuple[Path, str]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("two")
    return folder, run_ranks(2, folder, json.dumps(CASES))[1]


@pytest.fixture
def read() -> Iterator[Callable[[Path], dict[str, torch.Tensor]]]:
    started_here = not dist.is_initialized()
    if started_here:
        start(timeout_s=60, kind="cpu")
    yield lambda path: load_plain_tensors(str(path))
    if started_here:
        stop()


def assert_done(run: Run, case: str) -> Path:
    folder, told = run
    assert told.count(f"done {case}\n") == 2, told
    return folder / case


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("case", [case[0] for case in CASES if case[1] == "resume"])
def test_a_resumed_run_is_bitwise_the_unbroken_one(two_ranks, case):
    assert_done(two_ranks, case)


def test_every_layout_reads_every_other_with_its_optimizer(two_ranks, read):
    folder = assert_done(two_ranks, "reshard")
    first = read(folder / "0" / "step-00000002")
    moments = [value for name, value in first.items() if name.startswith("optimizer.state.exp_avg.")]
    assert len(moments) > 20
    assert all(value.abs().sum() > 0 for value in moments)
    for index in range(1, 5):
        assert_equal(read(folder / str(index) / "step-00000002"), first)


def test_the_next_stage_starts_from_the_same_weights_in_any_layout(two_ranks, read):
    folder = assert_done(two_ranks, "weights")
    first = {k: v for k, v in read(folder / "step-00000001").items() if not k.startswith("optimizer.")}
    for step in (2, 3, 4):
        assert_equal(read(folder / f"step-0000000{step}"), first)


def test_four_ranks_read_what_two_wrote(two_ranks, read):
    written = assert_done(two_ranks, "reshard")
    cases = [["reshard", "take_over", "2,2,2", "0", "four"]]
    fine, told = run_ranks(4, written.parent, json.dumps(cases))
    assert fine, told
    assert_equal(read(written / "four" / "step-00000002"), read(written / "0" / "step-00000002"))
