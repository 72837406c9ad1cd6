"""Routing against its reference; the reference against loops over single tokens."""

# ruff: noqa: E501  (mutants quote the kernels' source as it stands)

from __future__ import annotations

import math

import pytest
import torch
from medgpt_kernels import route
from medgpt_kernels.dispatch import triton_refusal
from medgpt_kernels.mx import reference as mx_reference
from medgpt_kernels.route import cases, op, reference
from medgpt_kernels.testing import assert_as_close_as_torch, assert_bitwise, mutant

needs_triton = pytest.mark.skipif(triton_refusal() is not None, reason=str(triton_refusal()))


def test_reference_router_is_softmax_over_the_largest_logits_of_each_token():
    given = cases.inputs(9, 24, 6, dtype=torch.float64, seed=0)
    weights, experts = reference.top_k(reference.logits(**given), 3)
    for t in range(9):
        logits = [
            math.fsum((given["x_TH"][t] * given["weight_EH"][e]).tolist()) + float(given["bias_E"][e]) for e in range(6)
        ]
        best = sorted(range(6), key=lambda e: -logits[e])[:3]
        assert experts[t].tolist() == best
        total = sum(math.exp(logits[e]) for e in best)
        for k, e in enumerate(best):
            assert math.isclose(float(weights[t, k]), math.exp(logits[e]) / total, rel_tol=1e-12)


def test_reference_index_lists_every_choice_once_sorted_by_expert_then_token():
    experts = cases.zipf_experts(13, 5, 2, seed=1)
    row_entry, token_row, tile_expert, counts = reference.index(experts, 5, 16)
    kept = [int(entry) for entry in row_entry if entry >= 0]
    assert kept == sorted(range(26), key=lambda entry: (int(experts.flatten()[entry]), entry // 2))
    for row, entry in enumerate(row_entry.tolist()):
        if entry >= 0:
            assert int(token_row.flatten()[entry]) == row
            assert int(tile_expert[row // 16]) == int(experts.flatten()[entry])
    assert counts.tolist() == torch.bincount(experts.flatten(), minlength=5).tolist()


@needs_triton
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", cases.ROUTES)
def test_logits_choices_and_fp8_rows_are_the_references(shape, dtype, norm, device):
    T, H, E, K = shape
    given = cases.inputs(T, H, E, dtype=dtype, seed=2, device=device)
    norm_H = (torch.rand(H, generator=torch.Generator().manual_seed(1)) + 0.5).to(dtype).to(device) if norm else None
    got = op.route(**given, top_k=K, norm_H=norm_H, quantise=True, implementation="triton")
    exact_given = {name: value.double() for name, value in given.items()}
    if norm:
        plain = reference.rms_norm(given["x_TH"], norm_H, 1e-5)
        assert_as_close_as_torch(got.normed_TH, plain, reference.rms_norm(exact_given["x_TH"], norm_H.double(), 1e-5))
        exact_given["x_TH"] = got.normed_TH.double()
        given["x_TH"] = got.normed_TH
    assert_as_close_as_torch(got.logits_TE, reference.logits(**given), reference.logits(**exact_given))
    weights, experts = reference.top_k(got.logits_TE, K)
    assert_bitwise(got.experts_TK, experts)
    assert_as_close_as_torch(got.weights_TK, weights, reference.top_k(got.logits_TE.double(), K)[0])
    codes, scales = mx_reference.quantise_rows(got.normed_TH.cpu())
    assert_bitwise(got.codes_TH.cpu(), codes)
    assert_bitwise(got.scales_TG.cpu(), scales)
    index = op.index(got.experts_TK, E, tile=16, histogram=got.histogram, implementation="triton")
    assert_same_index(index, reference.index(experts.cpu(), E, 16))


def assert_same_index(index: op.RowIndex, expected: tuple) -> None:
    for ours, theirs in zip((index.row_entry, index.token_row, index.tile_expert, index.counts), expected):
        assert_bitwise(ours.cpu(), theirs)


def choices(name: str) -> tuple[torch.Tensor, int]:
    return {
        "zipf": (cases.zipf_experts(150, 7, 3, seed=3), 7),
        "one takes everything": (torch.full((130, 1), 2, dtype=torch.int32), 4),
        "an empty expert at each end": (torch.randint(1, 5, (90, 1), dtype=torch.int32), 6),
        "more blocks than one chunk of the scan": (cases.balanced_experts(64 * 65, 3, 1), 3),
        "no tokens": (torch.zeros((0, 4), dtype=torch.int32), 8),
        "one expert": (torch.zeros((20, 1), dtype=torch.int32), 1),
    }[name]


@needs_triton
@pytest.mark.parametrize(
    "name",
    ["zipf", "one takes everything", "an empty expert at each end", "more blocks than one chunk of the scan", "no tokens",
     "one expert"],
)  # fmt: skip
def test_index_is_the_references_whatever_the_choices(name, device):
    experts, E = choices(name)
    index = op.index(experts.to(device), E, tile=32, implementation="triton")
    assert_same_index(index, reference.index(experts, E, 32))
    counts, M = index.counts, experts.numel()
    ordered = op.index_sorted(counts, M, tile=32, implementation="triton")
    for ours, theirs in zip(
        (ordered.row_entry, ordered.token_row, ordered.tile_expert), reference.index_sorted(counts.cpu(), M, 32)
    ):
        assert_bitwise(ours.cpu(), theirs)


@needs_triton
def test_equal_logits_go_to_the_lower_expert_and_nan_shows_in_the_weights(device):
    given = cases.inputs(3, 32, 4, dtype=torch.float32, seed=4, device=device)
    given["x_TH"][0] = 0
    given["bias_E"][:] = 1.0
    given["x_TH"][2, 5] = float("nan")
    got = op.route(**given, top_k=2, implementation="triton")
    assert got.experts_TK[0].tolist() == [0, 1]
    assert got.weights_TK[2].isnan().all() and not got.weights_TK[:2].isnan().any()
    assert ((got.experts_TK >= 0) & (got.experts_TK < 4)).all()


def gradients(given: dict, norm_H, K: int, seed: int, implementation: str):
    leaves = {name: value.detach().clone().requires_grad_() for name, value in given.items()}
    norm = None if norm_H is None else norm_H.detach().clone().requires_grad_()
    got = op.route(**leaves, top_k=K, norm_H=norm, implementation=implementation)
    generator = torch.Generator().manual_seed(seed)

    def like(x):
        return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype).to(x.device)

    total = (got.weights_TK * like(got.weights_TK)).sum() + (got.logits_TE * like(got.logits_TE)).sum()
    if norm is not None:
        total = total + (got.normed_TH.to(total.dtype) * like(got.normed_TH).to(total.dtype)).sum()
    total.backward()
    return got.experts_TK, [leaf.grad for leaf in (*leaves.values(), *(() if norm is None else (norm,)))]


@needs_triton
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_tokens_router_and_norm(dtype, norm, device):
    given = cases.inputs(70, 160, 5, dtype=dtype, seed=5, device=device)
    norm_H = (torch.rand(160, generator=torch.Generator().manual_seed(1)) + 0.5).to(dtype).to(device) if norm else None
    chosen, ours = gradients(given, norm_H, 3, 6, "triton")
    plain_chosen, plain = gradients(given, norm_H, 3, 6, "reference")
    exact_given = {name: value.double() for name, value in given.items()}
    exact_chosen, exact = gradients(exact_given, None if norm_H is None else norm_H.double(), 3, 6, "reference")
    assert torch.equal(chosen, exact_chosen) and torch.equal(plain_chosen, exact_chosen), (
        "pick another seed: a near tie"
    )
    for a, b, c in zip(ours, plain, exact):
        assert_as_close_as_torch(a, b, c)


@needs_triton
def test_balance_and_z_losses_and_their_gradient(device):
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(130, 6, generator=generator) * 3
    share, kept = torch.rand(6, generator=generator), (torch.rand(130, generator=generator) > 0.2).float()
    results = []
    for implementation, dtype in (
        ("triton", torch.float32),
        ("reference", torch.float32),
        ("reference", torch.float64),
    ):
        leaf = logits.clone().to(dtype).to(device).requires_grad_()
        rest = [t.to(dtype).to(device) for t in (share, kept, kept.sum())]
        balance, z = op.losses(leaf, *rest, implementation=implementation)
        (0.3 * balance + 0.7 * z).backward()
        results.append((balance.detach(), z.detach(), leaf.grad))
    for ours, plain, exact in zip(*results):
        assert_as_close_as_torch(ours, plain, exact)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"top_k": 9}, "top_k=9 of 4 experts"),
        ({"x_TH": torch.zeros(3, 16)}, "x_TH has width 16, weight_EH 32"),
        ({"x_TH": torch.zeros(3, 32, dtype=torch.int32)}, "x_TH is int32"),
        ({"x_TH": torch.zeros(32, 3).t()}, "x_TH is not contiguous"),
        ({"bias_E": torch.zeros(5)}, r"bias_E has shape \(5,\)"),
    ],
)
def test_a_router_call_that_cannot_be_served_is_refused_by_name(change, named):
    with pytest.raises(ValueError, match=named):
        op.route(**{**cases.inputs(3, 32, 4, dtype=torch.float32, seed=0), "top_k": 2, **change})


MUTANTS = {
    "bias dropped": ("logits += tl.load(bias_ptr + experts, mask=experts < E, other=0.0)", "logits += 0 * tl.load(bias_ptr + experts, mask=experts < E, other=0.0)"),
    "softmax over all experts": ("total += tl.exp(best - largest)", "total = tl.sum(tl.exp(rank - largest[:, None]), 1)"),
    "rank within the block dropped": ("place = base[None, :] + tl.cumsum(chosen, 0) - chosen", "place = base[None, :] + 0 * chosen"),
    "runs not padded": ("padded = (total + TILE - 1) // TILE * TILE", "padded = total"),
    "stale padding": ("tl.store(row_entry_ptr + rows, -1, mask=rows < end[:, None])", "tl.store(row_entry_ptr + rows, -1, mask=rows < start[:, None])"),
    "mean of the gradient dropped": ("(weight * (grad_weight - mean))", "(weight * (grad_weight - 0 * mean))"),
}  # fmt: skip


def _agrees(device) -> bool:
    given = cases.inputs(20, 160, 5, dtype=torch.float32, seed=8, device=device)
    chosen, ours = gradients(given, None, 3, 9, "triton")
    expected, plain = gradients(given, None, 3, 9, "reference")
    if not torch.equal(chosen, expected) or not all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours, plain)):
        return False
    index = op.index(expected, 5, tile=16, implementation="triton")
    made = (index.row_entry, index.token_row, index.tile_expert, index.counts)
    return all(torch.equal(a.cpu(), b) for a, b in zip(made, reference.index(expected.cpu(), 5, 16)))


@needs_triton
def test_every_mutant_is_caught(device):
    from medgpt_kernels.route import triton as kernels

    assert _agrees(device)
    caught = set()
    for name, (old, new) in MUTANTS.items():
        with mutant(kernels, old, new, package=route):
            if not _agrees(device):
                caught.add(name)
    assert caught == set(MUTANTS)
