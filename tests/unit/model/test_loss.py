from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_medgpt.model.loss import cross_entropy
from megatron_medgpt.types import IGNORE_INDEX


def inputs(num_rows: int = 9, vocabulary: int = 11, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(num_rows, vocabulary, generator=generator, dtype=torch.float64)).to(dtype)
    labels = torch.randint(0, vocabulary, (num_rows,), generator=generator)
    labels[::4] = IGNORE_INDEX
    return logits.requires_grad_(), labels


def test_loss_and_gradient_are_those_of_torch():
    logits, labels = inputs()
    weights = torch.linspace(0.5, 2, len(labels), dtype=torch.float64)
    found = cross_entropy(logits, labels)
    wanted = F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE_INDEX)
    torch.testing.assert_close(found, wanted)
    assert found.dtype == torch.float64
    (mine,), (theirs,) = (torch.autograd.grad((loss * weights).sum(), logits) for loss in (found, wanted))
    torch.testing.assert_close(mine, theirs)


def test_rows_without_a_target_are_exactly_zero():
    logits, labels = inputs()
    loss = cross_entropy(logits, labels)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert (loss[labels == IGNORE_INDEX] == 0).all()
    assert (gradient[labels == IGNORE_INDEX] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_logits_are_computed_in_float32(dtype):
    logits, labels = inputs(dtype=dtype)
    loss = cross_entropy(logits, labels)
    assert loss.dtype == torch.float32
    wanted = F.cross_entropy(logits.double(), labels, reduction="none", ignore_index=IGNORE_INDEX)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient.dtype == dtype


def test_no_rows_give_no_loss_and_a_gradient():
    logits = torch.zeros(0, 5, requires_grad=True)
    loss = cross_entropy(logits, torch.zeros(0, dtype=torch.int64))
    assert loss.shape == (0,)
    loss.sum().backward()
    assert logits.grad.shape == (0, 5)


def test_huge_logits_do_not_overflow():
    logits = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([1]))
    assert loss.item() == pytest.approx(2e4)
    loss.sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[1.0, -1.0, 0.0]]))
