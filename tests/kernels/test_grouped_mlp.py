"""Experts over sorted rows, and the clamped SwiGLU inside them."""

from __future__ import annotations

import math

import pytest
import torch
from medgpt_kernels.clamped_swiglu import op as swiglu
from medgpt_kernels.clamped_swiglu import reference as swiglu_reference
from medgpt_kernels.grouped_mlp import op, reference

COUNTS = {"uneven": [3, 0, 5, 1], "one expert has all": [0, 0, 9, 0], "no rows": [0, 0, 0, 0]}
LIMIT = 0.8


def tensors_for(counts, *, hidden: int = 6, inner: int = 5, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(3)
    num = len(counts)
    shapes = [(sum(counts), hidden), (num, hidden, 2 * inner), (num, 2 * inner), (num, inner, hidden), (num, hidden)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def by_hand(rows, counts, gate_up, gate_up_bias, down, down_bias):
    """The definition in plain Python, one row and one channel at a time."""
    out, start = torch.zeros(rows.shape[0], down.shape[2], dtype=rows.dtype), 0
    for expert, count in enumerate(counts):
        for row in range(start, start + count):
            raw = [
                (rows[row] * gate_up[expert, :, g]).sum().item() + gate_up_bias[expert, g].item()
                for g in range(gate_up.shape[2])
            ]
            inner = []
            for gate, up in zip(raw[0::2], raw[1::2]):
                gate, up = min(gate, LIMIT), max(-LIMIT, min(up, LIMIT))
                inner.append((up + 1) * gate / (1 + math.exp(-1.702 * gate)))
            out[row] = torch.tensor(inner, dtype=rows.dtype) @ down[expert] + down_bias[expert]
        start += count
    return out


@pytest.mark.parametrize("implementation", [reference, op], ids=["reference", "op"])
@pytest.mark.parametrize("counts", COUNTS)
def test_output_is_the_definition(implementation, counts):
    counts = COUNTS[counts]
    tensors = tensors_for(counts)
    with torch.no_grad():
        found = implementation.grouped_mlp(tensors[0], counts, *tensors[1:], limit=LIMIT)
        torch.testing.assert_close(found, by_hand(tensors[0], counts, *tensors[1:]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("counts", COUNTS)
def test_gradients_are_those_of_the_reference_and_zero_for_idle_experts(counts):
    counts = COUNTS[counts]
    tensors = tensors_for(counts)
    out = op.grouped_mlp(tensors[0], counts, *tensors[1:], limit=LIMIT)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    found = torch.autograd.grad(out, tensors, grad)
    plain = reference.grouped_mlp(tensors[0], counts, *tensors[1:], limit=LIMIT)
    wanted = torch.autograd.grad(plain, tensors, grad)
    for mine, theirs in zip(found, wanted):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)
    for expert, count in enumerate(counts):
        if not count:
            assert all((gradient[expert] == 0).all() for gradient in found[1:])


def test_frozen_experts_still_pass_gradients_to_the_rows():
    counts = COUNTS["uneven"]
    rows, *weights = tensors_for(counts)
    frozen = [weight.detach() for weight in weights]
    (found,) = torch.autograd.grad(op.grouped_mlp(rows, counts, *frozen, limit=LIMIT).sum(), rows)
    (wanted,) = torch.autograd.grad(op.grouped_mlp(rows, counts, *weights, limit=LIMIT).sum(), rows)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_within_twice_the_error_of_the_reference(dtype):
    counts = [30, 0, 50, 20]
    tensors = tensors_for(counts, hidden=32, inner=24, dtype=dtype)
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]

    def all_of(module, arguments):
        out = module.grouped_mlp(arguments[0], counts, *arguments[1:], limit=7.0)
        upstream = torch.ones_like(out)
        return [out.detach(), *torch.autograd.grad(out, arguments, upstream)]

    for truth, mine, theirs in zip(all_of(reference, wide), all_of(op, tensors), all_of(reference, tensors)):
        assert (mine - truth).norm() <= 2 * (theirs - truth).norm() + torch.finfo(dtype).eps * truth.norm()


def test_swiglu_gradient_is_the_finite_difference_on_both_sides_of_the_clamps():
    gate_up = (3 * torch.randn(7, 10, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).requires_grad_()
    assert (gate_up.detach().abs() > LIMIT).any() and (gate_up.detach().abs() < LIMIT).any()
    assert torch.autograd.gradcheck(lambda t: swiglu.clamped_swiglu(t, LIMIT), gate_up, eps=1e-7, atol=1e-6)
    torch.testing.assert_close(
        swiglu.clamped_swiglu(gate_up, LIMIT), swiglu_reference.clamped_swiglu(gate_up, LIMIT), rtol=1e-14, atol=0
    )


def test_swiglu_leaves_its_input_alone():
    gate_up = torch.randn(4, 6)
    before = gate_up.clone()
    swiglu.clamped_swiglu(gate_up, LIMIT)
    assert torch.equal(gate_up, before)
