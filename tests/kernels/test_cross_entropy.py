"""Chunked, vocabulary-parallel cross entropy against whole logits, loss and both gradients."""

# ruff: noqa: E501  (mutants quote the kernels' source as it stands)

from __future__ import annotations

import math

import pytest
import torch
from medgpt_kernels import cross_entropy as package
from medgpt_kernels.cross_entropy import cases, op, reference
from medgpt_kernels.dispatch import triton_refusal
from medgpt_kernels.testing import assert_as_close_as_torch, mutant

needs_triton = pytest.mark.skipif(triton_refusal() is not None, reason=str(triton_refusal()))


def inputs(T: int, H: int, V: int, dtype: torch.dtype, device="cpu"):
    generator = torch.Generator().manual_seed(T)
    hidden = torch.randn(T, H, generator=generator).to(dtype).to(device)
    weight = (torch.randn(V, H, generator=generator) * H**-0.5 * 3).to(dtype).to(device)
    labels = torch.randint(0, V, (T,), generator=generator)
    labels[::5] = -100
    labels[-1] = V - 1
    return hidden, weight, labels.to(device)


def outcome(call, hidden, weight, labels):
    hidden, weight = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    loss = call(hidden, weight, labels)
    scale = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype, device=loss.device)
    (loss * scale).sum().backward()
    return loss.detach(), hidden.grad, weight.grad


def test_reference_is_the_negative_logarithm_of_the_labels_share():
    hidden, weight, labels = inputs(7, 8, 11, torch.float64)
    loss = reference.cross_entropy(hidden, weight, labels)
    for t in range(7):
        powers = [math.exp(math.fsum((hidden[t] * row).tolist())) for row in weight]
        expected = 0.0 if labels[t] < 0 else -math.log(powers[labels[t]] / math.fsum(powers))
        assert math.isclose(float(loss[t]), expected, rel_tol=1e-12, abs_tol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", cases.SMALL)
@pytest.mark.parametrize("implementation", ["reference", pytest.param("triton", marks=needs_triton)])
def test_loss_and_gradients_in_chunks(implementation, shape, dtype, device):
    given = inputs(*shape, dtype, device)
    ours = outcome(lambda *a: op.cross_entropy(*a, chunk_tokens=5, implementation=implementation), *given)
    plain = outcome(reference.cross_entropy, *given)
    exact = outcome(reference.cross_entropy, given[0].double(), given[1].double(), given[2])
    for a, b, c in zip(ours, plain, exact):
        assert_as_close_as_torch(a, b, c)
    assert (ours[0][given[2] == -100] == 0).all() and (ours[1][given[2] == -100] == 0).all()


def test_fp64_stays_fp64():
    given = inputs(9, 16, 50, torch.float64)
    ours = outcome(lambda *a: op.cross_entropy(*a, chunk_tokens=4), *given)
    for a, b in zip(ours, outcome(reference.cross_entropy, *given)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


class _Summed:
    """Stands for a group of two ranks whose parts a test runs one after the other."""

    def size(self) -> int:
        return 2


@needs_triton
def test_two_halves_of_the_vocabulary_make_the_whole(monkeypatch, device):
    """Both ranks' parts, their reductions done by hand: the loss on each is the whole loss, gradients add up."""
    hidden, weight, labels = inputs(6, 16, 64, torch.float32, device)
    exact = outcome(reference.cross_entropy, hidden.double(), weight.double(), labels)
    plain = outcome(reference.cross_entropy, hidden, weight, labels)
    halves = weight[:40].contiguous(), weight[40:].contiguous()
    sums = [op._sums(hidden @ w.t(), labels, first, "triton") for w, first in zip(halves, (0, 40))]
    largest = torch.maximum(sums[0][0], sums[1][0])

    def all_reduce(tensor, op=None, group=None):
        if tensor.dim() == 1:
            tensor.copy_(largest)
        else:
            tensor.copy_(sum(torch.stack((total * torch.exp(top - largest), target)) for top, total, target in sums))

    monkeypatch.setattr(op.dist, "all_reduce", all_reduce)
    parts = [
        outcome(lambda h, w, y, f=first: op.cross_entropy(h, w, y, first_id=f, group=_Summed(), implementation="triton"),
                hidden, half, labels)
        for half, first in zip(halves, (0, 40))
    ]  # fmt: skip
    for loss, _, _ in parts:
        assert_as_close_as_torch(loss, plain[0], exact[0])
    assert_as_close_as_torch(parts[0][1] + parts[1][1], plain[1], exact[1])
    assert_as_close_as_torch(torch.cat((parts[0][2], parts[1][2])), plain[2], exact[2])


def test_logits_of_more_than_one_chunk_never_exist(monkeypatch):
    hidden, weight, labels = inputs(30, 16, 64, torch.float32)
    seen = []
    real = op._sums
    monkeypatch.setattr(op, "_sums", lambda logits, *rest: (seen.append(logits.shape[0]), real(logits, *rest))[1])
    op.cross_entropy(hidden, weight, labels, chunk_tokens=7)
    assert seen == [7, 7, 7, 7, 2]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"labels_T": torch.zeros(3, dtype=torch.int32)}, "labels_T is int32; allowed: int64"),
        ({"weight_VH": torch.zeros(8, 5)}, r"weight_VH has shape \(8, 5\)"),
        ({"weight_VH": torch.zeros(4, 8).t()}, "weight_VH is not contiguous"),
        ({"chunk_tokens": 0}, "chunk_tokens=0"),
    ],
)
def test_a_call_that_cannot_be_served_is_refused_by_name(change, named):
    given = {
        "hidden_TH": torch.zeros(3, 4),
        "weight_VH": torch.zeros(8, 4),
        "labels_T": torch.zeros(3, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=named):
        op.cross_entropy(**{**given, **change})


MUTANTS = {
    "maximum not carried": ("total = total * tl.exp(largest - safe) + tl.exp(logits - safe)", "total = total + tl.exp(logits - safe)"),
    "label one off": ("tl.where((columns == label) & (columns < V)", "tl.where((columns == label + 1) & (columns < V)"),
    "onehot dropped": ("tl.where(columns == label, 1.0, 0.0)) * grad", "0.0) * grad"),
    "wrong tail mask": ("mask=columns < V, other=float(\"-inf\")).to(tl.float32)\n        above", "mask=columns < V - 1, other=float(\"-inf\")).to(tl.float32)\n        above"),
}  # fmt: skip


@needs_triton
def test_every_mutant_is_caught(device):
    from medgpt_kernels.cross_entropy import triton as kernels

    given = inputs(6, 16, 1100, torch.float32, device)
    expected = outcome(reference.cross_entropy, *given)

    def agrees() -> bool:
        ours = outcome(lambda *a: op.cross_entropy(*a, implementation="triton"), *given)
        return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, expected))

    assert agrees()
    caught = set()
    for name, change in MUTANTS.items():
        with mutant(kernels, *change, package=package):
            if not agrees():
                caught.add(name)
    assert caught == set(MUTANTS)
