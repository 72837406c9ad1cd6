"""What every test file may rely on."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module", autouse=True)
def leave_the_world_afterwards():
    """A test file that joined a world of processes leaves it: the next file starts from none."""
    yield
    import sys

    groups = sys.modules.get("megatron_medgpt.parallel.groups")
    if groups is not None:
        groups.stop()
