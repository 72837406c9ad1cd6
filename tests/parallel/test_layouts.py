"""Every layout computes what one process computes.

The same weights are loaded by reshard into each layout, in float64 and without dropout, and the losses, routing and
gradients of one optimizer step are compared: four rows, some with two images, some with none, one image across the
boundary of two tensor ranks, and with two data ranks one that sees no image at all.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from layout_cases import CASES, MUTANTS, STEPPED
from ranks import run_ranks

WORKER = Path(__file__).with_name("layout_worker.py")
TOLERANCE = 1e-12
"""Relative, of the Frobenius norm. Measured: 3e-15; the mutants below are off by 0.8 and more."""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What every case found; one start of the ranks for each world size."""
    folder = tmp_path_factory.mktemp("layouts")
    results = {}
    for num_ranks in (1, 2, 4):
        run_ranks(WORKER, [str(folder)], num_ranks=num_ranks, deadline_s=1000, folder=folder)
        results |= torch.load(folder / f"world-{num_ranks}.pt")
    return results


pytestmark = pytest.mark.timeout(2400)  # the first test waits for all the ranks
LAYOUTS = [name for name in CASES if name != "one process"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_loss_is_that_of_one_process(found, name):
    assert found[name]["loss"] == pytest.approx(found["one process"]["loss"], rel=TOLERANCE)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_token_goes_to_the_same_experts(found, name):
    assert torch.equal(found[name]["load"], found["one process"]["load"])


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_written_token_is_that_of_one_process(found, name):
    one = found["one process"]["written"]
    assert len({token for tokens in one for token in tokens}) > 10
    assert len({len(tokens) for tokens in one}) == 5
    assert found[name]["written"] == one


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_gradient_is_that_of_one_process(found, name):
    errors = errors_of(found[name]["gradients"], found["one process"]["gradients"])
    assert max(errors.values()) <= TOLERANCE, {key: error for key, error in errors.items() if error > TOLERANCE}


@pytest.mark.parametrize("name", LAYOUTS)
def test_replicas_hold_equal_gradients(found, name):
    assert found[name]["gradients"]["replicas differ by"] <= TOLERANCE


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradient_norm_is_that_of_one_process(found, name):
    """megatron-core adds the norm's parts up in float32: a few roundings of 6e-8."""
    assert found[name]["grad_norm"] == pytest.approx(found["one process"]["grad_norm"], rel=1e-6)


def test_every_gradient_is_there_and_not_zero(found):
    gradients = dict(found["one process"]["gradients"])
    gradients.pop("replicas differ by")
    assert {name.split(".")[0] for name in gradients} == {"vision", "projector", "language"}
    assert all(gradient.norm() > 0 for gradient in gradients.values())


@pytest.mark.parametrize("name", [name for name in STEPPED if name != "one process"])
def test_parameters_agree_after_twenty_steps_in_float64(found, name):
    """Gradients are clipped by a norm that megatron-core computes in float32, so they carry its relative error (1e-6 at
    most, see above) into Adam, whose step is at most about the learning rate (1e-3) per element: 20 * 1e-3 * 1e-6."""
    mine, theirs = (found[case]["steps"][torch.float64] for case in (name, "one process"))
    assert worst_difference(mine["parameters"], theirs["parameters"]) <= 2e-8
    assert mine["grad_norms"] == pytest.approx(theirs["grad_norms"], rel=1e-6)


@pytest.mark.parametrize("name", [name for name in STEPPED if name != "one process"])
def test_distributed_optimizer_stays_with_one_process_for_twenty_steps(found, name):
    """float32, as the optimizer is. Rounding noise d of a gradient element moves an Adam step by up to
    lr * d / epsilon: gradients here are clipped to norm 1, so d is of the order 1e-9 and twenty steps of 1e-3 stay
    within 2e-3 of one another; a wrong gradient moves whole steps, 2e-2."""
    mine, theirs = (found[case]["steps"][torch.float32] for case in (name, "one process"))
    assert worst_difference(mine["parameters"], theirs["parameters"]) <= 2e-3
    # A wrong gradient is off at the first step; later, rounding that Adam has turned into steps is all that is seen.
    assert mine["grad_norms"][:10] == pytest.approx(theirs["grad_norms"][:10], rel=1e-4)
    assert mine["parameters"]["replicas differ by"] == 0


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_layout_is_caught(found, name):
    one, broken = found["one process"], found[name]
    errors = errors_of(broken["gradients"], one["gradients"])
    assert max(errors.values()) > 1e6 * TOLERANCE


def errors_of(mine: dict, theirs: dict) -> dict[str, float]:
    """Relative Frobenius error of each tensor."""
    assert set(mine) == set(theirs)
    return {
        name: ((mine[name] - theirs[name]).norm() / theirs[name].norm()).item()
        for name in theirs
        if name != "replicas differ by"
    }


def worst_difference(mine: dict, theirs: dict) -> float:
    return max((mine[name] - theirs[name]).abs().max().item() for name in theirs if name != "replicas differ by")
