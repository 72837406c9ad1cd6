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
