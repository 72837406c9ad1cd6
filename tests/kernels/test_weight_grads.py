"""Gradients written into the optimizer's buffer: stored by the first micro-batch, added by the others."""

from __future__ import annotations

import pytest
import torch
from medgpt_kernels.dispatch import triton_refusal
from medgpt_kernels.grouped_mlp import cases, op, routed, routed_reference
from medgpt_kernels.grouped_mlp.weight_grads import GradSink
from medgpt_kernels.route import op as route
from medgpt_kernels.testing import assert_bitwise

STACKS = ("gate_up_EHG", "gate_up_bias_EG", "down_EFH", "down_bias_EH")
T, H, F, E, K = 11, 48, 32, 4, 1
CHOICES = (torch.tensor([0, 1] * 5 + [0]), torch.tensor([1, 3] * 5 + [1]))
"""Experts of two micro-batches: one is left idle by the second alone, one by the first alone, one by both."""


def grouped(x, weights, experts, *stacks, direct):
    order = torch.argsort(experts.flatten(), stable=True)
    counts = torch.bincount(experts.flatten(), minlength=E).tolist()
    rows = op.grouped_mlp(x[order], counts, *stacks, limit=7.0, direct=direct)
    return torch.zeros_like(x).index_add(0, order, rows) * weights


def plain_routed(x, weights, experts, *stacks, direct):
    return routed_reference.routed_mlp(x, weights, experts, *stacks, limit=7.0, direct=direct)


def fused(x, weights, experts, *stacks, direct):
    index = route.index(experts.int().to(x.device), E, tile=16, implementation="triton")
    return routed.routed_mlp(x, weights, index, *stacks, limit=7.0, direct=direct, implementation="triton")


def gradients(way, given: dict, *, direct: bool) -> list[torch.Tensor]:
    """After two micro-batches, as data parallelism adds them up in fp32. The buffer is not cleared before: what the
    first micro-batch does not overwrite shows."""
    stacks = [given[name].detach().clone().requires_grad_() for name in STACKS]
    for stack in stacks:
        stack.main_grad = torch.full(stack.shape, float("nan") if direct else 0.0, device=stack.device)
        stack.grad_added_to_main_grad = False
    for micro, chosen in enumerate(CHOICES):
        out = way(given["x_TH"] + micro, given["weights_TK"], chosen[:, None], *stacks, direct=direct)
        out.float().square().sum().backward()
        for stack in stacks:
            assert stack.grad is not None, "the hooks that wait for a gradient never run"
            assert stack.grad_added_to_main_grad == direct
            if not direct:
                stack.main_grad += stack.grad
            stack.grad = None
    return [stack.main_grad for stack in stacks]


@pytest.mark.parametrize(
    ("way", "dtype"),
    [(grouped, torch.float32), (grouped, torch.bfloat16), (plain_routed, torch.bfloat16), (fused, torch.float32)],
)
def test_the_buffer_holds_to_the_bit_what_autograd_would_have_added(way, dtype, device):
    if way is fused and triton_refusal() is not None:
        pytest.skip(str(triton_refusal()))
    where = device if way is fused else "cpu"
    given = cases.inputs(T, H, F, E, K, dtype=dtype, seed=1, spread=1.0, device=where)
    for name, found, expected in zip(STACKS, *(gradients(way, given, direct=direct) for direct in (True, False))):
        assert_bitwise(found, expected)
        assert found[2].count_nonzero() == 0 and found[3].count_nonzero(), name


def test_a_weight_without_a_buffer_is_left_to_autograd():
    weight = torch.zeros(2, 3, requires_grad=True)
    sink = GradSink(weight, direct=True)
    sink.add(1, torch.ones(3))
    assert sink.finish().tolist() == [[0, 0, 0], [1, 1, 1]]


def test_a_weight_and_its_bias_that_were_not_cleared_together_are_refused(device):
    if triton_refusal() is not None:
        pytest.skip(str(triton_refusal()))
    given = cases.inputs(T, H, F, E, K, dtype=torch.float32, seed=1, device=device)
    stacks = [given[name].requires_grad_() for name in STACKS]
    for stack in stacks:
        stack.main_grad, stack.grad_added_to_main_grad = torch.zeros_like(stack.detach()), stack is stacks[0]
    out = fused(given["x_TH"], given["weights_TK"], CHOICES[0][:, None], *stacks, direct=True)
    with pytest.raises(ValueError, match="main_grad of a weight and of its bias must be cleared together"):
        out.sum().backward()
