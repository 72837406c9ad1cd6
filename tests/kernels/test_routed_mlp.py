"""The fused MoE layer against its reference, forward and every gradient; the reference against autograd in fp64."""

# ruff: noqa: E501  (mutants quote the kernels' source as it stands)

from __future__ import annotations

import pytest
import torch
from medgpt_kernels import grouped_mlp
from medgpt_kernels.dispatch import triton_refusal
from medgpt_kernels.grouped_mlp import cases, launch, reference, routed, routed_reference
from medgpt_kernels.mx import op as mx_op
from medgpt_kernels.mx import reference as mx
from medgpt_kernels.route import op as route
from medgpt_kernels.testing import assert_as_close_as_torch, assert_bitwise, mutant

LIMIT = 7.0
NAMES = ("x_TH", "weights_TK", "gate_up_EHG", "gate_up_bias_EG", "down_EFH", "down_bias_EH")
needs_triton = pytest.mark.skipif(triton_refusal() is not None, reason=str(triton_refusal()))


def outcome(call, given: dict, learned: tuple[str, ...] = NAMES, seed: int = 11) -> list[torch.Tensor]:
    """Output and the gradients of the named inputs under a random gradient of the output."""
    leaves = {name: given[name].detach().clone().requires_grad_(name in learned) for name in NAMES}
    out = call(*leaves.values())
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(given["x_TH"].dtype)
    out.backward(grad.bfloat16().to(out.dtype).to(out.device))
    return [out.detach(), *(leaves[name].grad for name in learned)]


def in_fp64(given: dict) -> dict:
    return {name: value.double() for name, value in given.items()}


def by_autograd(experts_TK: torch.Tensor, limit: float = LIMIT):
    """The layer from the reference of one run of rows, differentiated by autograd: independent of ``routed_reference``."""

    def call(x, weights, w1, b1, w2, b2):
        slots = experts_TK.shape[1]
        entries = torch.argsort(experts_TK.flatten(), stable=True)
        counts = torch.bincount(experts_TK.flatten(), minlength=w1.shape[0]).tolist()
        rows = reference.grouped_mlp(x[entries // slots], counts, w1, b1, w2, b2, limit=limit)
        weighted = (rows * weights.flatten()[entries, None]).to(x.dtype)
        return torch.zeros_like(x).index_add(0, entries // slots, weighted)

    return call


@pytest.mark.parametrize("name", ["zipf", "some experts empty", "one takes everything"])
def test_reference_backward_is_what_autograd_gives(name):
    experts = cases.choices(name, 19, 5, 2)
    given = cases.inputs(19, 24, 16, 5, experts.shape[1], dtype=torch.float64, seed=0)
    exact = outcome(by_autograd(experts), given)
    ours = outcome(lambda *a: routed_reference.routed_mlp(*a[:2], experts, *a[2:], limit=LIMIT), given)
    for a, b in zip(ours, exact):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_cases_clamp_on_every_side():
    given = cases.inputs(*cases.SMALL[0], dtype=torch.float32, seed=1)
    z = given["x_TH"] @ given["gate_up_EHG"][0] + given["gate_up_bias_EG"][0]
    assert (z[:, 0::2] > LIMIT).any() and (z[:, 0::2] < -LIMIT).any()
    assert (z[:, 1::2] > LIMIT).any() and (z[:, 1::2] < -LIMIT).any()


def tile_of(dtype: torch.dtype, device: torch.device) -> int:
    """Rows of a tile: as few as there can be where Triton is interpreted; on a GPU those that training has, with which
    the products are ``wgmma``, but in fp32, which has no such products."""
    return 128 if device.type == "cuda" and dtype == torch.bfloat16 else 16


def fused(
    experts: torch.Tensor, num_experts: int, device, *, limit: float = LIMIT, schedule="triton", tile=16, **options
):
    index = route.index(experts.to(device), num_experts, tile=tile, implementation="triton")
    return lambda x, weights, *rest: routed.routed_mlp(
        x, weights, index, *rest, limit=limit, implementation=schedule, **options
    )


@needs_triton
@pytest.mark.parametrize(
    ("name", "dtype", "schedule"),
    [("zipf", torch.float32, "triton"), ("zipf", torch.bfloat16, "triton"), ("some experts empty", torch.float32, "triton"),
     ("one takes everything", torch.bfloat16, "triton"), ("zipf", torch.bfloat16, "tma"), ("zipf", torch.bfloat16, "tma-4-stages"), ("zipf", torch.bfloat16, "tma-wide"),
     ("some experts empty", torch.float32, "tma-persistent"), ("one takes everything", torch.bfloat16, "tma-persistent")],
)  # fmt: skip
def test_forward_and_every_gradient(name, dtype, schedule, device):
    T, H, F, E, K = cases.SMALL[0]
    experts = cases.choices(name, T, E, K)
    spread = 4.0 if dtype == torch.float32 else 1.0
    given = cases.inputs(T, H, F, E, experts.shape[1], dtype=dtype, seed=1, spread=spread, device=device)
    ours = outcome(fused(experts, E, device, schedule=schedule, tile=tile_of(dtype, device)), given)
    plain = outcome(by_autograd(experts.to(device)), given)
    exact = outcome(by_autograd(experts.to(device)), in_fp64(given))
    for name, a, b, c in zip(("out", *NAMES), ours, plain, exact):
        try:
            assert_as_close_as_torch(a, b, c)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@needs_triton
def test_no_tokens_give_no_output_and_zero_gradients(device):
    _, H, F, E, K = cases.SMALL[0]
    given = cases.inputs(0, H, F, E, K, dtype=torch.float32, seed=2, device=device)
    leaves = {name: value.requires_grad_() for name, value in given.items()}
    out = fused(torch.zeros((0, K), dtype=torch.int32), E, device)(*leaves.values())
    out.sum().backward()
    assert out.shape == (0, H)
    for name in NAMES[2:]:
        assert torch.equal(leaves[name].grad, torch.zeros_like(leaves[name]))


@needs_triton
@pytest.mark.parametrize(("precision", "schedule"), [("bf16", "triton"), ("fp8", "triton"), ("bf16", "tma")])
def test_what_is_not_a_number_shows_in_the_tokens_that_met_it_and_in_no_other(precision, schedule, device):
    """A clamp that gives the other number of a pair would hide it: the hardware's minimum of NaN and 7 is 7."""
    T, H, F, E, K = 9, 64, 32, 3, 1
    experts = cases.choices("zipf", T, E, K)
    given = cases.inputs(T, H, F, E, K, dtype=torch.bfloat16, seed=8, spread=1.0, device=device)
    given["gate_up_EHG"][1, 5] = float("nan")
    tile = tile_of(torch.bfloat16, device)
    out = fused(experts, E, device, schedule=schedule, tile=tile, precision=precision)(*given.values())
    met = (experts == 1).any(1).to(device)
    assert met.any() and not met.all()
    assert out[met].isnan().all() and out[~met].isfinite().all()


@needs_triton
def test_rows_that_are_sorted_already_are_one_slot_tokens(device):
    """What expert parallelism hands over: rows of several tokens, sorted, their weights beside them."""
    counts = torch.tensor([0, 20, 3, 0, 14])
    _, H, F, E, _ = cases.SMALL[0]
    given = cases.inputs(37, H, F, E, 1, dtype=torch.float32, seed=3, device=device)
    index = route.index_sorted(counts.to(device), 37, tile=16, implementation="triton")
    experts = torch.repeat_interleave(torch.arange(E), counts)[:, None]
    assert torch.equal(routed.experts_of(index).cpu().long(), experts)
    ours = outcome(lambda x, w, *r: routed.routed_mlp(x, w, index, *r, limit=LIMIT, implementation="triton"), given)
    plain = outcome(by_autograd(experts.to(device)), given)
    exact = outcome(by_autograd(experts.to(device)), in_fp64(given))
    for a, b, c in zip(ours, plain, exact):
        assert_as_close_as_torch(a, b, c)


@needs_triton
@pytest.mark.parametrize(
    ("dtype", "schedule"),
    [(torch.float32, "triton"), (torch.bfloat16, "triton"), (torch.float32, "tma-persistent"), (torch.bfloat16, "tma")],
)
def test_fp8_rounds_where_its_reference_rounds(dtype, schedule, device):
    """Activations and dz are rounded from numbers that differ in their last bits, so some land on the other E4M3
    neighbour: the bound is twice the reference's own distance between its dtype and fp64, plus one part in twenty of what
    FP8 itself costs."""
    T, H, F, E, K = cases.SMALL[0]
    experts = cases.choices("zipf", T, E, K).to(device)
    given = cases.inputs(T, H, F, E, K, dtype=dtype, seed=4, spread=1.0, device=device)

    def expected(x, weights, *rest):
        return routed_reference.routed_mlp(x, weights, experts, *rest, limit=LIMIT, precision="fp8")

    def rms(x: torch.Tensor) -> torch.Tensor:
        return x.double().square().mean().sqrt()

    tile = tile_of(dtype, device)
    ours = outcome(fused(experts, E, device, schedule=schedule, tile=tile, precision="fp8"), given)
    plain, exact = outcome(expected, given), outcome(expected, in_fp64(given))
    unrounded = outcome(by_autograd(experts), in_fp64(given))
    for name, a, b, c, d in zip(("out", *NAMES), ours, plain, exact, unrounded):
        cost = rms(c - d)
        assert rms(a - c) <= 2 * rms(b - c) + 0.05 * cost, name
        assert cost < 0.1 * rms(d), name


MANY_ROWS = (700, 448, 320, 5, 2) if torch.cuda.is_available() else (150, 96, 64, 2, 1)
"""(T, H, F, E, K): more than one tile of 128 rows for every expert; small where Triton is interpreted."""
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="minutes in the interpreter")


@needs_triton
@pytest.mark.parametrize(
    ("precision", "schedule"),
    [("bf16", "triton"), *(pytest.param(p, s, marks=on_a_gpu) for s in launch.SCHEDULES for p in ("bf16", "fp8", "mxfp4")
                           if (p, s) != ("bf16", "triton"))],
)  # fmt: skip
def test_tiles_of_the_size_that_training_has(precision, schedule, device):
    """Tiles of 128 rows, several an expert, forward and every gradient: in bf16 as close as PyTorch; rounded, as close to
    the reference that rounds at the same places as a twentieth of what rounding costs, and twice that reference's own
    distance."""
    T, H, F, E, K = MANY_ROWS
    experts = cases.choices("zipf", T, E, K).to(device)
    given = cases.inputs(T, H, F, E, K, dtype=torch.bfloat16, seed=13, spread=1.0, device=device)

    def expected(x, weights, *rest):
        return routed_reference.routed_mlp(x, weights, experts, *rest, limit=LIMIT, precision=precision)

    ours = outcome(fused(experts, E, device, schedule=schedule, tile=128, precision=precision), given)
    plain, exact = outcome(expected, given), outcome(expected, in_fp64(given))
    unrounded = outcome(by_autograd(experts), in_fp64(given))
    for name, a, b, c, d in zip(("out", *NAMES), ours, plain, exact, unrounded):
        assert (a - c).norm() <= 2 * (b - c).norm() + 0.05 * (c - d).norm(), name


def packed_experts(given: dict) -> tuple[dict, tuple[torch.Tensor, ...]]:
    """The same case with expert weights that MXFP4 holds exactly, and their blocks."""
    made, rounded = [], dict(given)
    for name in ("gate_up_EHG", "down_EFH"):
        blocks, scales = mx.quantise_mxfp4(given[name].float().transpose(1, 2).contiguous().cpu())
        made += [blocks.to(given[name].device), scales.to(given[name].device)]
        values = mx.dequantise_mxfp4(blocks, scales, torch.float32).transpose(1, 2).contiguous()
        rounded[name] = values.to(given[name].dtype).to(given[name].device)
    return rounded, tuple(made)


@needs_triton
@pytest.mark.parametrize(
    ("dtype", "schedule"), [(torch.float32, "triton"), (torch.bfloat16, "triton"), (torch.bfloat16, "tma-persistent")]
)
def test_packed_mxfp4_experts_are_the_plain_ones_with_the_same_numbers(dtype, schedule, device):
    """Bit for bit: decoding is exact, and the products run in the same order."""
    T, H, F, E, K = cases.SMALL[0]
    experts = cases.choices("zipf", T, E, K)
    rounded, (b1, s1, b2, s2) = packed_experts(cases.inputs(T, H, F, E, K, dtype=dtype, seed=5, device=device))
    tile = tile_of(dtype, device)
    index = route.index(experts.to(device), E, tile=tile, implementation="triton")

    def call(x, weights, _w1, bias1, _w2, bias2):
        return routed.routed_mlp_frozen(
            x, weights, index, routed.packed(b1, s1), bias1, routed.packed(b2, s2), bias2, limit=LIMIT,
            implementation=schedule,
        )  # fmt: skip

    ours = outcome(call, rounded, learned=NAMES[:2])
    plain = outcome(fused(experts, E, device, schedule=schedule, tile=tile), rounded, learned=NAMES[:2])
    for a, b in zip(ours, plain):
        assert_bitwise(a, b)


@needs_triton
@pytest.mark.parametrize("schedule", ["triton", "tma-4-stages"])
def test_weights_that_learn_in_mxfp4_are_the_plain_ones_rounded_and_their_gradients_pass_straight_through(
    schedule, device
):
    """Bit for bit: the products multiply what MXFP4 holds, and no rounding stands between a gradient and its weight."""
    T, H, F, E, K = cases.SMALL[0]
    experts = cases.choices("zipf", T, E, K)
    given = cases.inputs(T, H, F, E, K, dtype=torch.float32, seed=5, device=device)
    rounded, _ = packed_experts(given)
    ours = outcome(fused(experts, E, device, schedule=schedule, precision="mxfp4"), given)
    plain = outcome(fused(experts, E, device, schedule=schedule), rounded)
    for a, b in zip(ours, plain):
        assert_bitwise(a, b)
    reference_of = outcome(
        lambda *a: routed_reference.routed_mlp(*a[:2], experts.to(device), *a[2:], limit=LIMIT, precision="mxfp4"),
        given,
    )
    exact = outcome(by_autograd(experts.to(device)), in_fp64(rounded))
    for a, b, c in zip(ours, reference_of, exact):
        assert_as_close_as_torch(a, b, c)


@needs_triton
def test_mxfp4_in_e4m3_is_the_fp8_layer_on_the_same_numbers(device):
    T, H, F, E, K = cases.SMALL[0]
    experts = cases.choices("zipf", T, E, K)
    rounded, (b1, s1, b2, s2) = packed_experts(cases.inputs(T, H, F, E, K, dtype=torch.bfloat16, seed=6, device=device))
    tile = tile_of(torch.bfloat16, device)
    index = route.index(experts.to(device), E, tile=tile, implementation="triton")
    w1, w2 = routed.packed_to_fp8(b1, s1), routed.packed_to_fp8(b2, s2)

    def exact(x, weights, _w1, bias1, _w2, bias2):
        return routed.routed_mlp_frozen(x, weights, index, w1, bias1, w2, bias2, limit=LIMIT)

    # Rounding these weights to E4M3 is the identity, so both ways multiply the same numbers, in the same order.
    ours = outcome(exact, rounded, learned=NAMES[:2])
    again = outcome(fused(experts, E, device, tile=tile, precision="fp8"), rounded, learned=NAMES[:2])
    for a, b in zip(ours, again):
        assert_bitwise(a, b)


@needs_triton
def test_weight_gradients_accumulate_over_micro_batches(device):
    T, H, F, E, K = cases.SMALL[0]
    experts = cases.choices("some experts empty", T, E, K)
    given = cases.inputs(T, H, F, E, K, dtype=torch.float32, seed=7, device=device)
    index = route.index(experts.to(device), E, tile=16, implementation="triton")
    dz = torch.randn(index.num_rows, 2 * F, device=device)
    once, bias_once = torch.empty((E, H, 2 * F), device=device), torch.empty((E, 2 * F), device=device)
    options = {"gather_a": True, "gather_b": False}
    args = (given["x_TH"], dz, given["weights_TK"], index)
    routed.weight_grads(*args, **options, grad_EKN=once, grad_bias_EN=bias_once, accumulate=False)
    twice, bias_twice = once.clone(), bias_once.clone()
    routed.weight_grads(*args, **options, grad_EKN=twice, grad_bias_EN=bias_twice, accumulate=True)
    assert_bitwise(twice, once + once)
    assert_bitwise(bias_twice, bias_once + bias_once)
    empty = index.counts == 0
    assert empty.any() and (once[empty] == 0).all()


@needs_triton
@pytest.mark.parametrize("precision", ["bf16", "fp8", "mxfp4"])
def test_only_tokens_preactivation_and_index_are_kept_for_the_backward_pass(precision, device):
    T, H, F, E, K = cases.SMALL[0]
    given = cases.inputs(T, H, F, E, K, dtype=torch.bfloat16, seed=8, device=device)
    leaves = {name: value.requires_grad_() for name, value in given.items()}
    out = fused(cases.choices("zipf", T, E, K), E, device, precision=precision)(*leaves.values())
    assert precision == "bf16" or not any(isinstance(w, routed.Weights) for w in (out.grad_fn.w1, out.grad_fn.w2))
    own = {leaf.data_ptr() for leaf in leaves.values()}
    kept = [t for t in out.grad_fn.saved_tensors if t.data_ptr() not in own]
    assert [tuple(t.shape) for t in kept] == [(out.grad_fn.index.num_rows, 2 * F)]


@needs_triton
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"x_TH": torch.zeros(37, 128)}, "x_TH has width 128, gate_up_EHG 192"),
        ({"x_TH": torch.zeros(192, 37).t()}, "x_TH is not contiguous"),
        ({"x_TH": torch.zeros(37, 192, dtype=torch.float64)}, "x_TH is float64"),
        (
            {"gate_up_EHG": torch.zeros(5, 192, 320, dtype=torch.bfloat16)},
            "gate_up_EHG is bfloat16, x_TH float32; they must be equal",
        ),
        ({"weights_TK": torch.zeros(37, 3)}, r"weights_TK has shape \(37, 3\)"),
        ({"down_EFH": torch.zeros(5, 160, 128)}, r"down_EFH is \(160, 128\); gate_up_EHG asks for \(160, 192\)"),
        ({"x_TH": torch.zeros(37, 2, 192)}, r"x_TH has shape \(37, 2, 192\); allowed: \(T, H\)"),
        ({"gate_up_EHG": torch.zeros(192, 320)}, r"gate_up_EHG has shape \(192, 320\); allowed: \(E, K, N\)"),
        ({"gate_up_bias_EG": torch.zeros(5, 319)}, r"gate_up_bias_EG has shape \(5, 319\); allowed: \(5, 320\)"),
        ({"down_bias_EH": torch.zeros(4, 192)}, r"down_bias_EH has shape \(4, 192\); allowed: \(5, 192\)"),
        ({"down_bias_EH": torch.zeros(5, 192, dtype=torch.int32)}, "down_bias_EH is int32; allowed: bfloat16"),
        ({"down_EFH": torch.zeros(4, 160, 192)}, r"down_EFH holds 4 experts; gate_up_EHG 5"),
        ({"gate_up_EHG": torch.zeros(5, 192, 320, device="meta")}, "gate_up_EHG is on meta, x_TH on"),
        ({"weights_TK": torch.zeros(37, 2, dtype=torch.float64)}, "weights_TK is float64; allowed: float32"),
    ],
)
def test_a_call_that_cannot_be_served_is_refused_by_name(change, named):
    T, H, F, E, K = cases.SMALL[0]
    given = {**cases.inputs(T, H, F, E, K, dtype=torch.float32, seed=9), **change}
    index = route.index(cases.choices("zipf", T, E, K), E, tile=16, implementation="reference")
    with pytest.raises(ValueError, match=named):
        routed.routed_mlp(*[given[name] for name in NAMES[:2]], index, *[given[name] for name in NAMES[2:]], limit=LIMIT,
                          implementation="triton")  # fmt: skip


@needs_triton
def test_a_schedule_by_descriptors_refuses_rows_that_they_cannot_load(device):
    T, H, F, E, K = 8, 40, 24, 2, 1
    given = cases.inputs(T, H, F, E, K, dtype=torch.bfloat16, seed=9, device=device)
    experts = torch.zeros(T, 1, dtype=torch.int32)
    with pytest.raises(
        ValueError, match=r"'tma' cannot serve this call: rows of 40 columns take 40 bytes; TMA .* of 16"
    ):
        fused(experts, E, device, schedule="tma", precision="fp8")(*given.values())


@pytest.mark.parametrize("schedule", launch.SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tiles_in_flight_fit_the_shared_memory_of_a_multiprocessor(schedule, dtype):
    """227 KB of one program on Hopper, as many tiles of both operands as there are stages."""
    chosen = launch.SCHEDULES[schedule]
    for kind in ("plain", "fp8", "mxfp4"):
        size = 1 if kind == "fp8" else dtype.itemsize
        for columns in (launch.FORWARD_COLUMNS, chosen.row_columns, launch.ROW_COLUMNS):
            made = chosen.blocks(kind, 128, columns, dtype)
            tiles = made["BLOCK_K"] * (made["BLOCK_M"] + made["BLOCK_N"]) * size
            assert tiles * made["num_stages"] <= 227 * 1024, (kind, columns)


@needs_triton
def test_weights_rounded_before_are_those_that_each_pass_rounds(device):
    T, H, F, E, K = 9, 64, 32, 3, 1
    experts = cases.choices("zipf", T, E, K)
    given = cases.inputs(T, H, F, E, K, dtype=torch.bfloat16, seed=6, spread=1.0, device=device)
    tile = tile_of(torch.bfloat16, device)
    for precision, make in (("fp8", routed.to_fp8), ("mxfp4", routed.to_mxfp4)):
        before = tuple(make(given[name], implementation="triton") for name in ("gate_up_EHG", "down_EFH"))
        kept = outcome(fused(experts, E, device, tile=tile, precision=precision, rounded=before), given)
        for a, b in zip(kept, outcome(fused(experts, E, device, tile=tile, precision=precision), given)):
            assert_bitwise(a, b)


@pytest.mark.parametrize("spread", [14, 15])
def test_a_tile_that_is_not_exact_in_e4m3_is_refused_and_counted(spread):
    blocks, scales = torch.full((1, 40, 2, 16), 0x11, dtype=torch.uint8), torch.full((1, 40, 2), 120, dtype=torch.uint8)
    scales[0, 7, 1] = 120 - spread
    if spread == 14:
        routed.packed_to_fp8(blocks, scales, implementation="reference")
        return
    with pytest.raises(ValueError, match="1 of 1 tiles have exponents that spread over more than 14"):
        routed.packed_to_fp8(blocks, scales, implementation="reference")


@pytest.mark.parametrize("make", [routed.packed, routed.packed_to_fp8])
def test_a_nan_scale_is_refused_where_the_weights_are_given(make):
    blocks, scales = torch.zeros(2, 40, 2, 16, dtype=torch.uint8), torch.full((2, 40, 2), 120, dtype=torch.uint8)
    scales[1, 3, 0] = scales[0, 0, 1] = 255
    with pytest.raises(ValueError, match=r"scales holds 2 NaN scales \(E8M0 255\) of 160; allowed: 0 to 254"):
        make(blocks, scales)


def test_fake_quantised_experts_train_through_their_rounding():
    w = torch.randn(2, 64, 32, requires_grad=True)
    rounded = mx_op.fake_quantise_mxfp4(w.transpose(1, 2), implementation="reference").transpose(1, 2)
    (rounded * 3).sum().backward()
    assert not torch.equal(rounded, w) and (w.grad == 3).all()


MUTANTS = {
    "gate_up bias dropped": ("z = rounding.cast(z + bias", "z = rounding.cast(z + 0 * bias"),
    "down bias dropped": ("out += bias.to(tl.float32)", "out += 0 * bias.to(tl.float32)"),
    "gate clamped below too": ("gate = tl.minimum(gate, limit, ", "gate = tl.minimum(tl.maximum(gate, -limit), limit, "),
    "up not clamped below": ("up = tl.maximum(up, -limit, ", "up = tl.maximum(up, -1e9, "),
    "plus one dropped": ("a = (up + 1.0) * gate * tl.sigmoid(gate * ALPHA)", "a = up * gate * tl.sigmoid(gate * ALPHA)"),
    "alpha of one": ("gate * tl.sigmoid(gate * ALPHA)", "gate * tl.sigmoid(gate)"),
    "wrong tail mask": ("a_mask = row_mask[:, None] & (k[None, :] < K_SIZE)\n        a = tl.load(a_ptr + a_rows[:, None] * K_SIZE + k[None, :], mask=a_mask, other=0.0)\n        if KIND == \"mxfp4\":\n            if ALONG_K", "a_mask = row_mask[:, None] & (k[None, :] < K_SIZE - 1)\n        a = tl.load(a_ptr + a_rows[:, None] * K_SIZE + k[None, :], mask=a_mask, other=0.0)\n        if KIND == \"mxfp4\":\n            if ALONG_K"),
    "stale row": ("to = tl.maximum(entry, 0).to(tl.int64)", "to = tl.maximum(entry - 1, 0).to(tl.int64)"),
    "router gradient without the bias": ("tl.where(n == 0, of_bias, 0.0)", "tl.where(n == 0, 0 * of_bias, 0.0)"),
    "router weight missing in dz": ("    da *= weight[:, None]\n", ""),
    "gradient through the clamp of gate": ("tl.where(raw_gate <= limit, da", "tl.where(raw_gate <= 1e9, da"),
    "gradient through the clamp of up": ("tl.where(tl.abs(raw_up) <= limit, da", "tl.where(raw_up <= limit, da"),
}  # fmt: skip
MUTANTS_OF_GRADIENTS = {
    "down bias gradient unweighted": ("bias += tl.sum(b.to(tl.float32) * weight[:, None], 0)", "bias += tl.sum(b.to(tl.float32) + 0 * weight[:, None], 0)"),
    "last row missing in the weight gradient": ("row_mask = offset < count\n", "row_mask = offset < count - 1\n"),
    "dots with the bias of the first experts alone": ("bias_ptr + experts[None, :] * H", "bias_ptr + 0 * experts[None, :] * H"),
}  # fmt: skip
MUTANTS_OF_PERSISTENT = {
    "rows of the first tile": ("m * BLOCK_M, w_desc", "0 * BLOCK_M, w_desc"),
    "last tile of an expert left out": ("(counts + TILE - 1) // TILE", "counts // TILE"),
    "weights of the first expert": ("tl.reshape(desc.load([expert, row, column])", "tl.reshape(desc.load([0 * expert, row, column])"),
    "wrong tail mask": ("            mask = row_mask[:, None] & (columns[None, :] < K_SIZE)\n            a = tl.load", "            mask = row_mask[:, None] & (columns[None, :] < K_SIZE - 1)\n            a = tl.load"),
}  # fmt: skip


def _agrees(device, K: int, schedule: str = "triton") -> bool:
    """At a limit of 1 a tenth of the values is clamped on each side, so every clamp weighs."""
    T, H, F, E = 9, 40, 24, 2
    experts = cases.choices("zipf", T, E, K)
    given = cases.inputs(T, H, F, E, K, dtype=torch.float32, seed=10, spread=1.0, device=device)
    ours = outcome(fused(experts, E, device, limit=1.0, schedule=schedule), given)
    exact = outcome(by_autograd(experts.to(device), limit=1.0), in_fp64(given))
    return all((a - b).abs().max() <= 1e-5 * b.abs().max() for a, b in zip(ours, exact))


@needs_triton
def test_every_mutant_is_caught(device):
    from medgpt_kernels.grouped_mlp import gradients, persistent
    from medgpt_kernels.grouped_mlp import triton as kernels

    schedules = {kernels: "triton", gradients: "triton", persistent: "tma-persistent"}
    assert _agrees(device, 1) and _agrees(device, 2) and _agrees(device, 2, "tma-persistent")
    for module, mutants in ((kernels, MUTANTS), (gradients, MUTANTS_OF_GRADIENTS), (persistent, MUTANTS_OF_PERSISTENT)):
        caught = set()
        for name, change in mutants.items():
            with mutant(module, *change, package=grouped_mlp):
                if not _agrees(device, 1 if name == "stale row" else 2, schedules[module]):
                    caught.add(name)
        assert caught == set(mutants)


MUTANTS_OF_HALVES = {
    "right half from the left's columns, packed": ("columns + HALF, columns + HALF < N_SIZE, first, K", "columns, columns + HALF < N_SIZE, first, K"),
    "right half from the left's columns, fp8": ("w_first + HALF * stride_n + offset", "w_first + offset"),
    "right half stored on the left": ("a_right, rows, row_mask, first + HALF // 2, G", "a_right, rows, row_mask, first, G"),
    "scale of a group from one half": ("tl.maximum(tl.max(rounding.finite_size(left), 1), tl.max(rounding.finite_size(right), 1))", "tl.max(rounding.finite_size(left), 1)"),
    "scale of the first tile of columns": ("tl.load(scales_ptr + column // 128 * scale_stride_n,", "tl.load(scales_ptr + 0 * scale_stride_n,"),
    "wrong tail mask of the right half": ("columns[None, :] + 64 < WIDTH)", "columns[None, :] < WIDTH)"),
    "wrong nibble": ("tl.join(packed & 15, packed >> 4)", "tl.join(packed >> 4, packed & 15)"),
}  # fmt: skip


def _halves_agree(device) -> bool:
    """Packed and FP8 weights through the product in two halves: three tiles of columns of FP8's scales, the last not
    whole, and a right half that ends in the middle."""
    T, H, F, E, K = 9, 64, 160, 2, 1
    experts = cases.choices("zipf", T, E, K).to(device)
    given = cases.inputs(T, H, F, E, K, dtype=torch.float32, seed=12, spread=1.0, device=device)
    growing = torch.exp2((torch.arange(2 * F, device=device) // 64).float())
    given["gate_up_EHG"] = given["gate_up_EHG"] * growing
    rounded, (b1, s1, b2, s2) = packed_experts(given)
    index = route.index(experts, E, tile=16, implementation="triton")
    x, weights, _, bias1, _, bias2 = rounded.values()
    ours = routed.routed_mlp_frozen(
        x, weights, index, routed.packed(b1, s1), bias1, routed.packed(b2, s2), bias2, limit=1e4
    )
    plain = fused(experts, E, device, limit=1e4)(*rounded.values())
    fp8 = fused(experts, E, device, limit=1e4, precision="fp8")(*rounded.values())
    expected = routed_reference.routed_mlp(x, weights, experts, *list(rounded.values())[2:], limit=1e4, precision="fp8")
    return torch.equal(ours, plain) and bool((fp8 - expected).norm() <= 1e-3 * expected.norm())


@needs_triton
def test_every_mutant_of_the_product_in_halves_is_caught(device):
    from medgpt_kernels.grouped_mlp import triton as kernels

    assert _halves_agree(device)
    caught = set()
    for name, change in MUTANTS_OF_HALVES.items():
        with mutant(kernels, *change, package=grouped_mlp):
            if not _halves_agree(device):
                caught.add(name)
    assert caught == set(MUTANTS_OF_HALVES)
