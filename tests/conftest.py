"""What every test file may rely on."""

from __future__ import annotations

import os

import pytest

# Triton reads this when it is first imported, which transformers may do long before the kernel tests begin.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")


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
