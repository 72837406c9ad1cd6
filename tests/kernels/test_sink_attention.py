"""Attention with sinks: every implementation against an independent float64 computation, row by row."""

from __future__ import annotations

import math

import pytest
import torch
from medgpt_kernels.sink_attention import flex, reference
from medgpt_kernels.sink_attention.op import PackedRows, choose, sink_attention

SHAPES = {
    "one position": {"batch": 1, "heads": 2, "groups": 1, "length": 1, "dim": 4},
    "odd sizes": {"batch": 2, "heads": 6, "groups": 3, "length": 37, "dim": 10},
    "longer than a tile": {"batch": 1, "heads": 4, "groups": 4, "length": 200, "dim": 16},
}
WINDOWS = {"no window": None, "window": 8, "window of one": 1, "window beyond the row": 1000}


def inputs(*, batch: int, heads: int, groups: int, length: int, dim: int, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(length)
    shapes = [(batch, heads, length, dim), (batch, groups, length, dim), (batch, groups, length, dim), (heads,)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    cuts = torch.rand(batch, length, generator=generator) < 0.1
    return [tensor.requires_grad_() for tensor in tensors], cuts.cumsum(1).to(torch.int32)


def by_hand(query, key, value, sinks, documents, *, window, scale):
    """The definition, one query at a time: softmax over the visible keys and the sink, weighted sum of the values."""
    batch, heads, length, _ = query.shape
    per_group = heads // key.shape[1]
    out = torch.zeros_like(query)
    for b in range(batch):
        for a in range(heads):
            for s in range(length):
                seen = [
                    t for t in range(s + 1) if documents[b, t] == documents[b, s] and (window is None or s - t < window)
                ]
                scores = torch.stack([query[b, a, s] @ key[b, a // per_group, t] * scale for t in seen] + [sinks[a]])
                weights = torch.softmax(scores, 0)[:-1]
                out[b, a, s] = sum(w * value[b, a // per_group, t] for w, t in zip(weights, seen))
    return out


def by(name, tensors, documents, **options):
    query, key, value, sinks = tensors
    if name == "flex":
        mask = flex.block_mask(documents, options["window"])
        return flex.sink_attention(query, key, value, sinks, mask, scale=options["scale"])
    return sink_attention(query, key, value, sinks, PackedRows(documents, name), **options)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", ["reference", "fused_cpu", "flex"])
def test_output_is_the_definition(name, window):
    tensors, documents = inputs(**SHAPES["odd sizes"])
    options = {"window": WINDOWS[window], "scale": 0.3}
    with torch.no_grad():
        wanted = by_hand(*tensors, documents, **options)
        tensors = [tensor.detach() for tensor in tensors]  # flex refuses what wants gradients on a CPU
        torch.testing.assert_close(by(name, tensors, documents, **options), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_gradients_are_those_of_the_reference_in_float64(shape, window):
    tensors, documents = inputs(**SHAPES[shape])
    options = {"window": WINDOWS[window], "scale": 0.3}
    grad = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = torch.autograd.grad(by("fused_cpu", tensors, documents, **options), tensors, grad)
    wanted = torch.autograd.grad(by("reference", tensors, documents, **options), tensors, grad)
    for mine, theirs in zip(found, wanted):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


def test_reference_gradients_are_finite_differences():
    tensors, documents = inputs(batch=1, heads=2, groups=1, length=6, dim=4)
    assert torch.autograd.gradcheck(
        lambda *t: by("reference", t, documents, window=3, scale=0.5), tensors, eps=1e-6, atol=1e-8
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_is_within_twice_the_error_of_the_reference(dtype):
    tensors, documents = inputs(**SHAPES["longer than a tile"], dtype=dtype)
    options = {"window": None, "scale": 0.25}
    grad = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]

    def all_of(name, arguments, upstream):
        out = by(name, arguments, documents, **options)
        return [out.detach(), *torch.autograd.grad(out, arguments, upstream)]

    exact = all_of("reference", wide, grad.double())
    plain, fused = all_of("reference", tensors, grad), all_of("fused_cpu", tensors, grad)
    for truth, mine, theirs in zip(exact, fused, plain):
        assert (mine - truth).norm() <= 2 * (theirs - truth).norm() + torch.finfo(dtype).eps * truth.norm()


def test_rescaling_by_the_log_sum_exp_gives_the_gradients_of_the_sink():
    """The identity of flex.py, through autograd of a plain attention (flex has no backward pass on a CPU)."""
    (query, key, value, sinks), documents = inputs(batch=1, heads=2, groups=2, length=12, dim=4)
    scores = query @ key.transpose(-1, -2) * 0.5
    scores = scores.masked_fill(~reference.visible(documents, 5), -math.inf)
    lse = scores.logsumexp(-1)
    out = torch.softmax(scores, -1) @ value * torch.sigmoid(lse - sinks.view(1, -1, 1)).unsqueeze(-1)
    tensors = (query, key, value, sinks)
    wanted = by("reference", tensors, documents, window=5, scale=0.5)
    grad = torch.randn_like(out)
    for mine, theirs in zip(torch.autograd.grad(out, tensors, grad), torch.autograd.grad(wanted, tensors, grad)):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention has no backward pass on a CPU")
@pytest.mark.parametrize("window", WINDOWS)
def test_flex_gradients_are_within_twice_the_error_of_the_reference(window):
    tensors, documents = inputs(batch=2, heads=8, groups=2, length=384, dim=64, dtype=torch.float32)
    tensors = [tensor.detach().cuda().requires_grad_() for tensor in tensors]
    documents = documents.cuda()
    options = {"window": WINDOWS[window], "scale": 0.125}
    grad = torch.randn_like(tensors[0])
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    exact = torch.autograd.grad(by("reference", wide, documents, **options), wide, grad.double())
    plain = torch.autograd.grad(by("reference", tensors, documents, **options), tensors, grad)
    found = torch.autograd.grad(by("flex", tensors, documents, **options), tensors, grad)
    for truth, mine, theirs in zip(exact, found, plain):
        # TF32 products are allowed in the compiled kernel: 2**-11 of the norm.
        assert (mine - truth).norm() <= 2 * (theirs - truth).norm() + 2**-11 * truth.norm()


def test_a_sink_far_below_the_scores_changes_nothing():
    (query, key, value, _), documents = inputs(**SHAPES["odd sizes"])
    sinks = torch.full((query.shape[1],), -1e4, dtype=torch.float64)
    out = by("fused_cpu", (query, key, value, sinks), documents, window=None, scale=0.3)
    key, value = (tensor.repeat_interleave(2, 1) for tensor in (key, value))
    mask = reference.visible(documents, None)
    plain = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(out, plain)


def test_masks_are_made_once_for_all_layers():
    rows = PackedRows(torch.zeros(1, 8, dtype=torch.int32), "fused_cpu")
    assert rows.mask(4, torch.float32) is rows.mask(4, torch.float32)
    assert rows.mask(4, torch.float32) is not rows.mask(None, torch.float32)


@pytest.mark.parametrize(("name", "device"), [("flex", "cpu"), ("fused_cpu", "cuda"), ("fast", "cpu")])
def test_an_implementation_that_cannot_serve_is_refused(name, device):
    with pytest.raises(ValueError, match=r"set it to|allowed"):
        choose(name, torch.device(device))
