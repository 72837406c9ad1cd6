"""What every test file may rely on."""

from __future__ import annotations

import os
import signal
import sys
import threading

import pytest

# Triton reads this when it is first imported, which transformers may do long before the kernel tests begin.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell starts what it runs in the background with SIGINT ignored, and everything below inherits that; tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

SEVERAL_RANKS = (
    "flow",
    "parallel",
    "parity/test_training_parity.py",
    "unit/evaluate/test_engine_layouts.py",
    "unit/evaluate/test_killed_evaluation.py",
)
"""Tests that start ranks of their own."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """One worker takes all tests with ranks of their own, so that no more than four ranks compute at once; every other
    file goes whole to some worker. (``--dist loadgroup`` does not see its groups in pytest 9.2.) With another
    ``--dist`` than loadscope, as it is asked for."""
    if config.getvalue("dist") != "loadscope":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            place = nodeid.split("::")[0].removeprefix("tests/")
            return "ranks" if place.startswith(SEVERAL_RANKS) else place

    return ByFile(config, log)


def same_random_numbers() -> None:
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(20_000)


@pytest.fixture(autouse=True)
def same_random_numbers_in_any_order():
    """What a test draws without a seed of its own does not depend on the tests before it."""
    same_random_numbers()


@pytest.fixture(scope="module", autouse=True)
def leave_the_world_afterwards():
    """A test file that joined a world of processes leaves it: the next file starts from none, with the threads that
    it would have alone."""
    same_random_numbers()
    torch = sys.modules.get("torch")
    num_threads = torch.get_num_threads() if torch is not None else 0
    yield
    if num_threads:
        torch.set_num_threads(num_threads)
    groups = sys.modules.get("megatron_medgpt.parallel.groups")
    if groups is not None:
        groups.stop()
    # A backward pass outside the engine's schedule leaves a scale of another shape than the schedule copies into.
    moe = sys.modules.get("megatron.core.transformer.moe.moe_utils")
    if moe is not None:
        moe.MoEAuxLossAutoScaler.main_loss_backward_scale = None
