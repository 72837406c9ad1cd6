from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist

from megatron_medgpt.parallel.groups import start, stop


@pytest.fixture(scope="module", autouse=True)
def world_of_one() -> Iterator[None]:
    if dist.is_initialized():
        yield
        return
    start(timeout_s=60, kind="cpu")
    yield
    stop()
