"""What every test file may rely on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Triton reads this when it is first imported, which transformers may do long before the kernel tests begin.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")


SEVERAL_RANKS = (
    "flow",
    "parallel",
    "parity/test_training_parity.py",
    "unit/evaluate/test_engine_layouts.py",
    "unit/evaluate/test_killed_evaluation.py",
)
"""Tests that start ranks of their own. Under ``pytest -n`` one worker takes all of them, so that never more than four
ranks compute at once; every other file goes whole to some worker."""


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        place = item.path.relative_to(here).as_posix()
        group = "ranks" if place.startswith(SEVERAL_RANKS) else place
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="module", autouse=True)
def leave_the_world_afterwards():
    """A test file that joined a world of processes leaves it: the next file starts from none."""
    yield
    import sys

    groups = sys.modules.get("megatron_medgpt.parallel.groups")
    if groups is not None:
        groups.stop()
    # A backward pass outside the engine's schedule leaves a scale of another shape than the schedule copies into.
    moe = sys.modules.get("megatron.core.transformer.moe.moe_utils")
    if moe is not None:
        moe.MoEAuxLossAutoScaler.main_loss_backward_scale = None
