"""Row movement against its reference, with gradients; the FP8 payload bit for bit."""

# ruff: noqa: E501  (mutants quote the kernels' source as it stands)

from __future__ import annotations

import pytest
import torch
from medgpt_kernels import permute as package
from medgpt_kernels.dispatch import triton_refusal
from medgpt_kernels.mx.cases import awkward
from medgpt_kernels.permute import op, reference
from medgpt_kernels.route import cases as route_cases
from medgpt_kernels.route import op as route
from medgpt_kernels.testing import assert_as_close_as_torch, assert_bitwise, mutant

needs_triton = pytest.mark.skipif(triton_refusal() is not None, reason=str(triton_refusal()))
IMPLEMENTATIONS = ["reference", pytest.param("triton", marks=needs_triton)]


def index_of(T: int, E: int, K: int, *, tile: int, device="cpu") -> route.RowIndex:
    return route.index(route_cases.zipf_experts(T, E, K, seed=T).to(device), E, tile=tile, implementation="reference")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_combine_of_permute_is_every_token_times_the_sum_of_its_weights(implementation, device):
    index = index_of(19, 5, 3, tile=16, device=device)
    x = torch.randn(19, 72).to(device)
    weights = torch.rand(19, 3).to(device)
    rows = op.permute(x, index, implementation=implementation)
    assert (rows[index.row_entry < 0] == 0).all()
    out = op.combine(rows, weights, index, implementation=implementation)
    torch.testing.assert_close(out, x * weights.sum(1, keepdim=True), rtol=1e-5, atol=1e-6)


def outcome(implementation: str, x, weights, index):
    x, weights = x.detach().clone().requires_grad_(), weights.detach().clone().requires_grad_()
    rows = op.permute(x, index, implementation=implementation)
    out = op.combine(rows * 1.5, weights, index, implementation=implementation)
    out.backward(
        torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(out.dtype).to(out.device)
    )
    return out.detach(), x.grad, weights.grad


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("T", "E", "K", "H", "tile"), [(37, 5, 2, 200, 16), (1, 3, 1, 40, 16), (21, 4, 4, 136, 1)])
def test_permute_and_combine_with_their_gradients(T, E, K, H, tile, dtype, device):
    generator = torch.Generator().manual_seed(T)
    index = index_of(T, E, K, tile=tile, device=device)
    x = torch.randn(T, H, generator=generator).to(dtype).to(device)
    weights = torch.rand(T, K, generator=generator).to(device)
    ours, plain = outcome("triton", x, weights, index), outcome("reference", x, weights, index)
    for a, b, c in zip(ours, plain, outcome("reference", x.double(), weights.double(), index)):
        assert_as_close_as_torch(a, b, c)


@needs_triton
def test_no_tokens_and_rows_of_other_ranks(device):
    index = index_of(0, 5, 2, tile=16, device=device)
    empty = torch.zeros(0, 40, device=device)
    assert op.combine(
        op.permute(empty, index, implementation="triton"), None, index, implementation="triton"
    ).shape == (0, 40)
    rows = torch.randn(3, 40, device=device)
    token_row = torch.tensor([[2, -1], [-1, -1]], dtype=torch.int32, device=device)
    elsewhere = route.RowIndex(
        torch.tensor([-1, -1, 0], dtype=torch.int32, device=device), token_row, token_row[0], token_row[0], 1
    )
    out = op.combine(rows, None, elsewhere, implementation="triton")
    assert torch.equal(out, torch.stack((rows[2], torch.zeros_like(rows[2]))))


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("H", [64, 320])
def test_fp8_payload_is_the_references_bytes_and_comes_back_exactly(H, dtype, device):
    index = index_of(11, 4, 2, tile=1, device=device)
    x = awkward((11, H), seed=0, dtype=dtype).to(device)
    payload = op.pack_fp8(x, index, implementation="triton")
    assert_bitwise(payload.cpu(), reference.pack_fp8(x.cpu(), index.row_entry.cpu(), 2))
    assert payload.shape[1] % 16 == 0 and payload.shape[1] <= H + -(-H // 128) + 15
    rows = op.unpack_fp8(payload, H, dtype, implementation="triton")
    assert_bitwise(rows.cpu(), reference.unpack_fp8(payload.cpu(), H, dtype))
    wide = op.unpack_fp8(payload, H, torch.float32, implementation="triton")
    assert_bitwise(rows.float(), wide)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_exchange_rounds_forward_to_one_part_in_sixteen_and_leaves_the_gradient(implementation, device):
    rows = torch.randn(9, 200).to(device).requires_grad_()
    arrived = op.exchange_fp8(rows, lambda t: t.flip(0), lambda t: t.flip(0), implementation=implementation)
    grad = torch.randn(9, 200).to(device)
    arrived.backward(grad)
    assert torch.equal(rows.grad, grad.flip(0))
    # E4M3 keeps 3 bits after the leading one: half a step is 1/16 of the value; below 2^-6 of the scale the step is fixed.
    error, size = (arrived.flip(0) - rows).detach().abs(), rows.detach().abs()
    largest = size.max()
    assert (error <= torch.maximum(size / 16, largest * 2.0**-17)).all() and error.max() > 0


def test_a_call_that_cannot_be_served_is_refused_by_name():
    index = index_of(4, 2, 1, tile=16)
    with pytest.raises(ValueError, match="x_TH is float64"):
        op.permute(torch.zeros(4, 8, dtype=torch.float64), index)
    with pytest.raises(ValueError, match="rows_RH is not contiguous"):
        op.combine(torch.zeros(8, index.num_rows).t(), None, index)
    with pytest.raises(ValueError, match="payload_RP has rows of 8 bytes; 128 values need 144"):
        op.unpack_fp8(torch.zeros(4, 8, dtype=torch.uint8), 128, torch.bfloat16)


MUTANTS = {
    "router weight dropped": ("part *= tl.load(weights_ptr", "part += 0 * tl.load(weights_ptr"),
    "stale row": ("row = tl.load(token_row_ptr + tokens * SLOTS + slot, mask=tokens < T, other=-1).to(tl.int64)\n        mask", "row = tl.load(token_row_ptr + tokens * SLOTS, mask=tokens < T, other=-1).to(tl.int64)\n        mask"),
    "padding not zero": ("x = tl.load(x_ptr + tokens[:, None] * H + columns[None, :], mask=(entry[:, None] >= 0) & inside, other=0.0)\n    if WEIGHTED", "x = tl.load(x_ptr + tokens[:, None] * H + columns[None, :], mask=(entry[:, None] >= -1) & inside, other=0.0)\n    if WEIGHTED"),
    "scale byte one off": ("(exponent + 127).to(tl.uint8)", "(exponent + 128).to(tl.uint8)"),
    "wrong tail mask": ("inside = columns[None, :] < H\n    total", "inside = columns[None, :] < H - 1\n    total"),
}  # fmt: skip


@needs_triton
def test_every_mutant_is_caught(device):
    from medgpt_kernels.permute import triton as kernels

    index = index_of(9, 4, 2, tile=16, device=device)
    x, weights = torch.randn(9, 72).to(device), torch.rand(9, 2).to(device)
    expected = outcome("reference", x, weights, index)
    expected_rows, payload = (
        op.permute(x, index, implementation="reference"),
        op.pack_fp8(x, index, implementation="reference"),
    )

    def agrees() -> bool:
        close = all(torch.allclose(a, b, atol=1e-4) for a, b in zip(outcome("triton", x, weights, index), expected))
        same = torch.equal(op.permute(x, index, implementation="triton"), expected_rows)
        return close and same and torch.equal(op.pack_fp8(x, index, implementation="triton"), payload)

    assert agrees()
    caught = set()
    for name, change in MUTANTS.items():
        with mutant(kernels, *change, package=package):
            if not agrees():
                caught.add(name)
    assert caught == set(MUTANTS)
