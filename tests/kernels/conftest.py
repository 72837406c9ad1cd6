"""Kernel tests run in Triton's interpreter where there is no GPU, which must be chosen before Triton is imported."""

from __future__ import annotations

import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    imported = sys.modules.get("triton")
    if imported is not None and not imported.knobs.runtime.interpret:
        raise RuntimeError("triton was imported before TRITON_INTERPRET was set; run tests/kernels by itself")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _poisoned_outputs():
    from medgpt_kernels.testing import poisoned

    with poisoned():
        yield
