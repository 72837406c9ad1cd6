"""What an op does not serve it refuses by the argument's name, before any launch."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch
from medgpt_kernels.clamped_swiglu.op import clamped_swiglu
from medgpt_kernels.cross_entropy.op import cross_entropy
from medgpt_kernels.dispatch import triton_refusal
from medgpt_kernels.grouped_mlp import op as grouped
from medgpt_kernels.grouped_mlp import routed
from medgpt_kernels.grouped_mlp.packed import PackedStack, packed_mlp
from medgpt_kernels.mx import op as mx
from medgpt_kernels.permute import op as permute
from medgpt_kernels.projector import op as projector
from medgpt_kernels.route import op as route
from medgpt_kernels.sink_attention.cached import cached_sink_attention
from medgpt_kernels.sink_attention.op import PackedRows, sink_attention

BF16, LONG, INT, BYTE, WIDE = torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.float64


def zeros(*shape: int, dtype=torch.float32, device="cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def meta(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("meta")


def strided(*shape: int, dtype=torch.float32) -> torch.Tensor:
    """Of a shape, but laid out the other way round."""
    return zeros(*shape[:-2], shape[-1], shape[-2], dtype=dtype).transpose(-1, -2)


CHOICES = zeros(4, 2, dtype=INT) + torch.arange(2, dtype=INT)
INDEX = route.index(CHOICES, 3, tile=16, implementation="reference")
UNPADDED = route.index(CHOICES, 3, tile=1, implementation="reference")
ROWS = INDEX.num_rows
PLACES = projector.placement(range(4), range(4), num_images=1, side=2, fold=1)


def same(payload: torch.Tensor) -> torch.Tensor:
    return payload


# Every op by a call that it serves: its arguments, and (argument, what is wrong, what is said).
SERVED = {
    route.route: {"x_TH": zeros(4, 8), "weight_EH": zeros(3, 8), "bias_E": zeros(3), "top_k": 2, "norm_H": zeros(8)},
    route.index: {"experts_TK": CHOICES, "num_experts": 3, "histogram": zeros(1, 3, dtype=INT)},
    route.index_sorted: {"counts_E": torch.tensor([2, 0, 3]), "num_rows": 5},
    route.losses: {"logits_TE": zeros(4, 3), "share_E": zeros(3), "kept_T": zeros(4), "num_tokens": torch.ones(())},
    permute.permute: {"x_TH": zeros(4, 8), "index": INDEX},
    permute.pack_fp8: {"x_TH": zeros(4, 8), "index": INDEX},
    permute.unpack_fp8: {"payload_RP": zeros(4, 144, dtype=BYTE), "hidden": 128, "dtype": BF16},
    permute.combine: {"rows_RH": zeros(ROWS, 8), "weights_TK": zeros(4, 2), "index": INDEX},
    permute.permute_exchange_fp8: {"x_TH": zeros(4, 8), "index": UNPADDED, "forth": same, "back": same},
    permute.exchange_fp8: {"rows_MH": zeros(4, 8), "forth": same, "back": same},
    mx.quantise_rows: {"x_MK": zeros(4, 8)},
    mx.quantise_tiles: {"w_ERC": zeros(2, 4, 8)},
    mx.quantise_tiles_in: {"w_ERC": zeros(2, 4, 8), "plain": False, "flipped": True},
    mx.mxfp4_to_e4m3_in: {
        "blocks": zeros(1, 4, 2, 16, dtype=BYTE), "scales": zeros(1, 4, 2, dtype=BYTE), "plain": True, "flipped": False
    },
    mx.quantise_mxfp4: {"w": zeros(4, 64)},
    mx.dequantise_mxfp4: {"blocks": zeros(4, 2, 16, dtype=BYTE), "scales": zeros(4, 2, dtype=BYTE)},
    mx.mxfp4_to_e4m3: {"blocks": zeros(1, 4, 2, 16, dtype=BYTE), "scales": zeros(1, 4, 2, dtype=BYTE)},
    mx.fake_quantise_mxfp4: {"w": zeros(4, 64)},
    mx.check_scales: {"scales": zeros(4, dtype=BYTE)},
    grouped.grouped_linear: {
        "rows_MI": zeros(5, 8), "weight_EIO": zeros(3, 8, 6), "bias_EO": zeros(3, 6), "counts": [2, 0, 3]
    },
    grouped.grouped_mlp: {
        "rows_MH": zeros(5, 8), "counts": [2, 0, 3], "gate_up_EHG": zeros(3, 8, 12), "gate_up_bias_EG": zeros(3, 12),
        "down_EFH": zeros(3, 6, 8), "down_bias_EH": zeros(3, 8), "limit": 7.0,
    },
    packed_mlp: {
        "rows_MH": zeros(5, 32), "counts": [2, 0, 3], "gate_up_bias_EG": zeros(3, 64), "down_bias_EH": zeros(3, 32),
        "gate_up": PackedStack(zeros(3, 64, 1, 16, dtype=BYTE), zeros(3, 64, 1, dtype=BYTE), torch.float32),
        "down": PackedStack(zeros(3, 32, 1, 16, dtype=BYTE), zeros(3, 32, 1, dtype=BYTE), torch.float32), "limit": 7.0,
    },
    PackedStack: {"blocks": zeros(3, 64, 1, 16, dtype=BYTE), "scales": zeros(3, 64, 1, dtype=BYTE), "dtype": BF16},
    routed.routed_mlp: {
        "x_TH": zeros(4, 8), "weights_TK": zeros(4, 2), "index": INDEX, "gate_up_EHG": zeros(3, 8, 12),
        "gate_up_bias_EG": zeros(3, 12), "down_EFH": zeros(3, 6, 8), "down_bias_EH": zeros(3, 8), "limit": 7.0,
    },
    routed.to_fp8: {"w_EKN": zeros(2, 32, 8)},
    routed.to_mxfp4: {"w_EKN": zeros(2, 32, 8)},
    routed.plain: {"w_EKN": zeros(2, 32, 8)},
    routed.packed: {"blocks": zeros(1, 4, 2, 16, dtype=BYTE), "scales": zeros(1, 4, 2, dtype=BYTE)},
    routed.packed_to_fp8: {"blocks": zeros(1, 4, 2, 16, dtype=BYTE), "scales": zeros(1, 4, 2, dtype=BYTE)},
    projector.placement: {"tokens": [0, 1], "places": [3, 4], "num_images": 1, "side": 2, "fold": 1},
    projector.project_into: {
        "text_SBH": zeros(6, 1, 8), "features_IPF": zeros(1, 4, 5), "at": PLACES, "weight_1": zeros(7, 5),
        "bias_1": zeros(7), "weight_2": zeros(8, 7), "bias_2": zeros(8), "norm": (zeros(5), zeros(5)),
    },
    sink_attention: {
        "query_BASD": zeros(1, 4, 6, 8), "key_BQSD": zeros(1, 2, 6, 8), "value_BQSD": zeros(1, 2, 6, 8),
        "sinks_A": zeros(4), "rows": PackedRows(zeros(1, 6, dtype=LONG), "reference"), "window": 4, "scale": 1.0,
    },
    PackedRows: {"document_ids_BS": zeros(1, 6, dtype=LONG), "implementation": "reference", "branches": None},
    cached_sink_attention: {
        "query_NAD": zeros(2, 4, 8), "key_NQTD": zeros(2, 2, 5, 8), "value_NQTD": zeros(2, 2, 5, 8),
        "sinks_A": zeros(4), "unseen_NT": zeros(2, 5, dtype=torch.bool), "scale": 1.0,
    },
    cross_entropy: {"hidden_TH": zeros(4, 8), "weight_VH": zeros(9, 8), "labels_T": zeros(4, dtype=LONG)},
    clamped_swiglu: {"gate_up_MG": zeros(4, 6), "limit": 7.0},
}  # fmt: skip

REFUSED = {
    route.route: [
        ("x_TH", zeros(4, 8, dtype=INT), "x_TH is int32; allowed: bfloat16, float16, float32"),
        ("x_TH", zeros(4, 8, dtype=WIDE), "x_TH is float64; allowed: bfloat16, float16, float32"),
        ("x_TH", zeros(2, 2, 8), "x_TH has shape (2, 2, 8); allowed: (T, H)"),
        ("x_TH", strided(4, 8), "x_TH is not contiguous"),
        ("weight_EH", zeros(8), "weight_EH has shape (8,); allowed: (E, H)"),
        ("weight_EH", zeros(3, 8, dtype=LONG), "weight_EH is int64; allowed: bfloat16"),
        ("weight_EH", zeros(3, 8, dtype=BF16), "weight_EH is bfloat16, x_TH float32; they must be equal"),
        ("weight_EH", zeros(3, 7), "x_TH has width 8, weight_EH 7"),
        ("bias_E", meta(zeros(3)), "bias_E is on meta, x_TH on cpu"),
        ("bias_E", zeros(4), "bias_E has shape (4,); allowed: (3,)"),
        ("norm_H", zeros(7), "norm_H has shape (7,); allowed: (8,)"),
        ("norm_H", zeros(8, dtype=LONG), "norm_H is int64; allowed: bfloat16"),
        ("top_k", 4, "top_k=4 of 3 experts; allowed: 1 to E"),
        ("eps", float("nan"), "eps=nan; it must be greater than 0"),
        ("implementation", "fast", "implementation 'fast'; allowed: auto, triton, reference"),
    ],
    route.index: [
        ("experts_TK", CHOICES.long(), "experts_TK is int64; allowed: int32"),
        ("experts_TK", CHOICES[0], "experts_TK has shape (2,); allowed: (T, K)"),
        ("experts_TK", strided(4, 2, dtype=INT), "experts_TK is not contiguous"),
        ("experts_TK", meta(CHOICES), "histogram is on cpu, experts_TK on meta"),
        ("histogram", zeros(1, 3), "histogram is float32; allowed: int32"),
        ("histogram", zeros(2, 3, dtype=INT), "histogram has shape (2, 3); allowed: (1, 3)"),
        ("tile", 24, "tile=24; allowed: 1 and powers of two from 16"),
        ("num_experts", 257, "num_experts=257; allowed: 1 to 256"),
    ],
    route.index_sorted: [
        ("counts_E", zeros(3), "counts_E is float32; allowed: int32, int64"),
        ("counts_E", zeros(1, 3, dtype=INT), "counts_E has shape (1, 3); allowed: (E)"),
        ("counts_E", zeros(6, dtype=INT)[::2], "counts_E is not contiguous"),
        ("counts_E", zeros(257, dtype=INT), "counts_E is of 257 experts; allowed: 1 to 256"),
        ("num_rows", -1, "num_rows=-1; it must not be negative"),
        ("tile", 1, "tile=1; allowed: powers of two from 16"),
    ],
    route.losses: [
        ("logits_TE", zeros(4, 3, dtype=BF16), "logits_TE is bfloat16; allowed: float32"),
        ("logits_TE", zeros(4), "logits_TE has shape (4,); allowed: (T, E)"),
        ("logits_TE", strided(4, 3), "logits_TE is not contiguous"),
        ("kept_T", zeros(5), "kept_T has shape (5,); allowed: (4,)"),
        ("kept_T", zeros(4, dtype=torch.bool), "kept_T is bool; allowed: float32"),
        ("share_E", zeros(4), "share_E has shape (4,); allowed: (3,)"),
        ("share_E", zeros(3, dtype=LONG), "share_E is int64; allowed: bfloat16"),
        ("num_tokens", torch.ones(2), "num_tokens has shape (2,); allowed: one number"),
        ("num_tokens", torch.ones((), device="meta"), "num_tokens is on meta"),
    ],
    permute.permute: [
        ("x_TH", zeros(5, 8), "x_TH has 5 rows; the index is for 4"),
        ("x_TH", zeros(4, 8, dtype=INT), "x_TH is int32; allowed: bfloat16"),
        ("x_TH", zeros(4, 2, 8), "x_TH has shape (4, 2, 8); allowed: two axes"),
        ("x_TH", strided(4, 8), "x_TH is not contiguous"),
        ("x_TH", meta(zeros(4, 8)), "index is on cpu"),
    ],
    permute.pack_fp8: [
        ("x_TH", zeros(3, 8), "x_TH has 3 rows"),
        ("x_TH", zeros(4, 8, dtype=WIDE), "x_TH is float64; allowed: bfloat16"),
        ("x_TH", strided(4, 8), "x_TH is not contiguous"),
        ("x_TH", meta(zeros(4, 8)), "index is on cpu"),
    ],
    permute.unpack_fp8: [
        ("payload_RP", zeros(4, 144), "payload_RP is float32; allowed: uint8"),
        ("payload_RP", zeros(4, 128, dtype=BYTE), "payload_RP has rows of 128 bytes; 128 values need 144"),
        ("payload_RP", zeros(144, dtype=BYTE), "payload_RP has shape (144,); allowed: (R, P)"),
        ("payload_RP", strided(4, 144, dtype=BYTE), "payload_RP is not contiguous"),
        ("dtype", torch.int8, "dtype is torch.int8; allowed: bfloat16"),
        ("hidden", 0, "hidden=0; it must be greater than 0"),
    ],
    permute.combine: [
        ("rows_RH", zeros(4, 8), f"rows_RH has 4 rows; the index is for {ROWS}"),
        ("rows_RH", zeros(ROWS, 8, dtype=INT), "rows_RH is int32; allowed: bfloat16"),
        ("rows_RH", strided(ROWS, 8), "rows_RH is not contiguous"),
        ("weights_TK", zeros(4, 3), "weights_TK has shape (4, 3); allowed: (4, 2)"),
        ("weights_TK", zeros(4, 2, dtype=BF16), "weights_TK is bfloat16; allowed: float32"),
        ("weights_TK", strided(4, 2), "weights_TK is not contiguous"),
        ("weights_TK", meta(zeros(4, 2)), "weights_TK is on meta"),
    ],
    permute.permute_exchange_fp8: [
        ("x_TH", zeros(8), "x_TH has shape (8,); allowed: (T, H)"),
        ("x_TH", zeros(4, 8, dtype=INT), "x_TH is int32; allowed: bfloat16"),
        ("index", INDEX, "index.tile=16; allowed: 1"),
    ],
    permute.exchange_fp8: [
        ("rows_MH", zeros(8), "rows_MH has shape (8,); allowed: (M, H)"),
        ("rows_MH", zeros(4, 8, dtype=INT), "rows_MH is int32; allowed: bfloat16"),
    ],
    mx.quantise_rows: [
        ("x_MK", zeros(4, 8, dtype=WIDE), "x_MK is float64; allowed: bfloat16"),
        ("x_MK", zeros(4, 0), "x_MK has shape (4, 0); allowed: (M, K) with K > 0"),
        ("x_MK", strided(4, 8), "x_MK is not contiguous"),
    ],
    mx.quantise_tiles: [
        ("w_ERC", zeros(4, 8), "w_ERC has shape (4, 8); allowed: (E, R, C)"),
        ("w_ERC", zeros(2, 4, 8, dtype=INT), "w_ERC is int32; allowed: bfloat16"),
        ("w_ERC", strided(2, 4, 8), "w_ERC is not contiguous"),
    ],
    mx.quantise_tiles_in: [
        ("w_ERC", zeros(4, 8), "w_ERC has shape (4, 8); allowed: (E, R, C)"),
        ("flipped", False, "plain and flipped are both False; one of them must be wanted"),
    ],
    mx.mxfp4_to_e4m3_in: [
        ("scales", zeros(1, 4, 2), "scales is float32; allowed: uint8"),
        ("plain", False, "plain and flipped are both False; one of them must be wanted"),
    ],
    mx.quantise_mxfp4: [
        ("w", zeros(4, 40), "w has (4, 40); its last axis must divide by 32"),
        ("w", zeros(4, 64, dtype=INT), "w is int32; allowed: bfloat16"),
        ("w", strided(4, 64), "w is not contiguous"),
        ("mode", "near", "mode is 'near'; allowed: up, floor"),
    ],
    mx.dequantise_mxfp4: [
        ("blocks", zeros(4, 2, 16, dtype=INT), "blocks is int32; allowed: uint8"),
        ("blocks", zeros(4, 2, 8, dtype=BYTE), "blocks (4, 2, 8) and scales (4, 2); allowed: (..., K / 32, 16)"),
        ("blocks", zeros(16, dtype=BYTE), "blocks (16,) and scales (4, 2); allowed"),
        ("scales", strided(4, 2, dtype=BYTE), "scales is not contiguous"),
        ("scales", meta(zeros(4, 2, dtype=BYTE)), "scales is on meta, blocks on cpu"),
        ("dtype", torch.float16, "dtype is torch.float16; allowed: bfloat16, float32"),
    ],
    mx.mxfp4_to_e4m3: [
        ("blocks", zeros(4, 2, 16, dtype=BYTE), "blocks has shape (4, 2, 16); allowed: (E, N, K / 32, 16)"),
        ("scales", zeros(1, 4, 2), "scales is float32; allowed: uint8"),
        ("scales", strided(1, 4, 2, dtype=BYTE), "scales is not contiguous"),
    ],
    mx.fake_quantise_mxfp4: [
        ("w", zeros(4, 40), "w has (4, 40); its last axis must divide by 32"),
        ("w", zeros(4, 64, dtype=WIDE), "w is float64; allowed: bfloat16"),
    ],
    mx.check_scales: [
        ("scales", zeros(4, dtype=INT), "scales is int32; allowed: uint8"),
        ("scales", zeros(4, dtype=BYTE) + 255, "scales holds 4 NaN scales (E8M0 255) of 4; allowed: 0 to 254"),
    ],
    grouped.grouped_linear: [
        ("rows_MI", zeros(5, 7), "rows_MI has width 7; the weights multiply 8"),
        ("rows_MI", zeros(8), "rows_MI has shape (8,); allowed: (M, I)"),
        ("rows_MI", zeros(5, 8, dtype=INT), "rows_MI is int32; allowed: bfloat16"),
        ("weight_EIO", zeros(3, 8, 6, dtype=BF16), "weight_EIO is bfloat16, rows_MI float32; they must be equal"),
        ("weight_EIO", zeros(8, 6), "weight_EIO has shape (8, 6); allowed: (E, K, N)"),
        ("bias_EO", zeros(3, 7), "bias_EO has shape (3, 7); allowed: (3, 6)"),
        ("bias_EO", meta(zeros(3, 6)), "bias_EO is on meta, rows_MI on cpu"),
        ("counts", [5], "counts has 1 entries; the weights are of 3 experts"),
        ("counts", [6, 0, -1], "counts holds -1; it must not be negative"),
        ("counts", [2, 0, 2], "counts add up to 4; rows_MI has 5 rows"),
    ],
    grouped.grouped_mlp: [
        ("rows_MH", zeros(5, 8, dtype=BF16), "gate_up_EHG is float32, rows_MH bfloat16; they must be equal"),
        ("counts", [2, 3], "counts has 2 entries"),
        ("gate_up_EHG", zeros(3, 7, 12), "rows_MH has width 8; the weights multiply 7"),
        ("gate_up_EHG", meta(zeros(3, 8, 12)), "gate_up_EHG is on meta"),
        ("gate_up_bias_EG", zeros(3, 11), "gate_up_bias_EG has shape (3, 11); allowed: (3, 12)"),
        ("down_EFH", zeros(3, 5, 8), "down_EFH is (5, 8); gate_up_EHG asks for (6, 8)"),
        ("down_bias_EH", zeros(3, 8, dtype=LONG), "down_bias_EH is int64, rows_MH float32"),
        ("limit", 0.0, "limit=0.0; it must be greater than 0"),
    ],
    packed_mlp: [
        ("rows_MH", zeros(5, 32, dtype=BF16), "gate_up decodes to torch.float32, rows_MH is torch.bfloat16"),
        ("rows_MH", zeros(5, 64), "rows_MH has width 64; the weights multiply 32"),
        ("down_bias_EH", meta(zeros(3, 32)), "down_bias_EH is on meta, rows_MH on cpu"),
        ("counts", [2, 0, 4], "counts add up to 6"),
        ("gate_up_bias_EG", zeros(3, 64).requires_grad_(), "gate_up_bias_EG requires a gradient"),
        ("down_bias_EH", zeros(3, 31), "down_bias_EH has shape (3, 31); allowed: (3, 32)"),
        ("limit", float("inf"), "limit=inf; it must be greater than 0 and finite"),
    ],
    PackedStack: [
        ("blocks", zeros(64, 1, 16, dtype=BYTE), "blocks (64, 1, 16) and scales (3, 64, 1); allowed"),
        ("scales", zeros(3, 64, 1), "scales is float32; allowed: uint8"),
        ("dtype", torch.float16, "dtype is torch.float16; allowed: bfloat16, float32, float64"),
    ],
    routed.routed_mlp: [
        ("x_TH", zeros(4, 8, dtype=WIDE), "x_TH is float64; allowed: bfloat16"),
        ("x_TH", zeros(3, 8), "x_TH has 3 tokens, weights_TK 4"),
        ("x_TH", strided(4, 8), "x_TH is not contiguous"),
        ("weights_TK", zeros(4, 2, dtype=BF16), "weights_TK is bfloat16; allowed: float32"),
        ("index", UNPADDED, "index.tile=1; products need tiles of at least 16 rows"),
        (
            "rounded",
            (routed.to_fp8(zeros(3, 8, 12)),) * 2,
            "rounded is of kind fp8; precision=bf16, they must be equal",
        ),
        ("gate_up_EHG", zeros(3, 8, 12, dtype=BF16), "gate_up_EHG is bfloat16, x_TH float32; they must be equal"),
        ("gate_up_EHG", zeros(3, 8, 11), "gate_up_EHG has 11 columns; allowed: pairs of gate and up"),
        ("gate_up_EHG", strided(3, 8, 12), "gate_up_EHG is not contiguous"),
        ("gate_up_bias_EG", meta(zeros(3, 12)), "gate_up_bias_EG is on meta, x_TH on cpu"),
        ("down_EFH", zeros(2, 6, 8), "down_EFH holds 2 experts; gate_up_EHG 3"),
        ("down_bias_EH", zeros(3, 7), "down_bias_EH has shape (3, 7); allowed: (3, 8)"),
        ("limit", -7.0, "limit=-7.0; it must be greater than 0"),
        ("precision", "int8", "precision='int8'; allowed: bf16, fp8, mxfp4"),
    ],
    routed.to_fp8: [
        ("w_EKN", zeros(32, 8), "w_EKN has shape (32, 8); allowed: (E, K, N)"),
        ("w_EKN", zeros(2, 32, 8, dtype=WIDE), "w_EKN is float64; allowed: bfloat16"),
        ("w_EKN", strided(2, 32, 8), "w_EKN is not contiguous"),
        ("passes", "sideways", "passes='sideways'; allowed: forward, backward, both"),
    ],
    routed.to_mxfp4: [
        ("w_EKN", zeros(2, 40, 8), "w_EKN has K = 40; allowed: multiples of 32"),
        ("w_EKN", zeros(2, 32, 8, dtype=INT), "w_EKN is int32; allowed: bfloat16"),
        ("w_EKN", strided(2, 32, 8), "w_EKN is not contiguous"),
    ],
    routed.plain: [("w_EKN", zeros(32, 8), "w_EKN has shape (32, 8); allowed: (E, K, N)")],
    routed.packed: [
        ("blocks", zeros(1, 4, 2, 16), "blocks is float32; allowed: uint8"),
        ("scales", zeros(1, 4, 2, dtype=BYTE) + 255, "scales holds 8 NaN scales (E8M0 255) of 8"),
        ("scales", strided(1, 4, 2, dtype=BYTE), "scales is not contiguous"),
    ],
    routed.packed_to_fp8: [
        ("blocks", zeros(4, 2, 16, dtype=BYTE), "blocks has shape (4, 2, 16); allowed: (E, N, K / 32, 16)"),
        ("scales", zeros(1, 4, 2, dtype=BYTE) + 255, "scales holds 8 NaN scales (E8M0 255) of 8"),
    ],
    projector.placement: [
        ("tokens", [0, 4], "tokens must lie in 0 .. 3"),
        ("tokens", [0], "1 tokens for 2 places"),
        ("places", [3, 3], "places names a position twice"),
        ("places", [3, -1], "places holds -1; a place must not be negative"),
        ("fold", 0, "fold=0; it must be greater than 0"),
        ("side", 3, "fold=2 does not divide side=3"),
        ("num_images", -1, "num_images=-1; it must not be negative"),
    ],
    projector.project_into: [
        ("text_SBH", zeros(6, 8), "text_SBH has shape (6, 8); allowed: (S, B, H)"),
        ("text_SBH", zeros(3, 1, 8), "text_SBH has 3 rows; the placement writes to row 3"),
        ("text_SBH", zeros(6, 1, 8, dtype=BF16), "text_SBH is bfloat16, features_IPF float32; they must be equal"),
        ("text_SBH", strided(6, 2, 8)[:, :1], "text_SBH is not contiguous"),
        ("features_IPF", zeros(1, 4, 5, dtype=WIDE), "features_IPF is float64; allowed: bfloat16"),
        ("features_IPF", zeros(1, 9, 5), "features_IPF has 9 patches an image; the placement is for 4"),
        ("features_IPF", zeros(2, 4, 5), "features_IPF has 2 images; the placement is for 1"),
        ("weight_1", zeros(7, 6), "weight_1 has 6 columns; the shuffled rows have 5"),
        ("weight_1", strided(7, 5), "weight_1 is not contiguous"),
        ("bias_1", zeros(6), "bias_1 has shape (6,); allowed: (7,)"),
        ("weight_2", meta(zeros(8, 7)), "weight_2 is on meta"),
        ("weight_2", zeros(8, 6), "weight_2 has shape (8, 6); allowed: (8, 7)"),
        ("bias_2", zeros(8, dtype=LONG), "bias_2 is int64; allowed: bfloat16"),
        ("norm", (zeros(5), zeros(4)), "norm[1] has shape (4,); allowed: (5,)"),
        ("eps", 0.0, "eps=0.0; it must be greater than 0"),
    ],
    sink_attention: [
        ("query_BASD", zeros(4, 6, 8), "query_BASD has shape (4, 6, 8); allowed: (B, A, S, D)"),
        ("query_BASD", zeros(1, 4, 6, 8, dtype=INT), "query_BASD is int32; allowed: bfloat16"),
        ("key_BQSD", zeros(1, 3, 6, 8), "its second axis must divide 4 heads"),
        ("value_BQSD", zeros(1, 2, 5, 8), "value_BQSD has shape (1, 2, 5, 8)"),
        ("value_BQSD", zeros(1, 2, 6, 8, dtype=BF16), "value_BQSD is bfloat16, query_BASD float32; they must be equal"),
        ("sinks_A", zeros(2), "sinks_A has shape (2,); allowed: (4,)"),
        ("sinks_A", zeros(4, dtype=LONG), "sinks_A is int64; allowed: bfloat16"),
        ("sinks_A", meta(zeros(4)), "sinks_A is on meta"),
        ("window", 0, "window=0; it must be greater than 0, or None"),
        ("scale", float("nan"), "scale=nan; it must be greater than 0 and finite"),
    ],
    PackedRows: [
        ("document_ids_BS", zeros(6, dtype=LONG), "document_ids_BS has shape (6,); allowed: (B, S)"),
        ("document_ids_BS", zeros(1, 6), "document_ids_BS is float32; allowed: int32, int64"),
        ("implementation", "fast", "implementation='fast'; allowed: reference, fused_cpu, flex"),
        ("branches", (zeros(1, 5), zeros(1, 6)), "branches[0] has shape (1, 5); allowed: (1, 6)"),
    ],
    cached_sink_attention: [
        ("query_NAD", zeros(2, 4), "query_NAD has shape (2, 4); allowed: (N, A, D)"),
        ("query_NAD", zeros(2, 4, 8, dtype=INT), "query_NAD is int32; allowed: bfloat16"),
        ("key_NQTD", zeros(2, 3, 5, 8), "key_NQTD has 3 groups; they must divide 4 heads"),
        ("key_NQTD", zeros(2, 2, 5, 8, dtype=BF16), "key_NQTD is bfloat16, query_NAD float32; they must be equal"),
        ("value_NQTD", zeros(2, 2, 4, 8), "value_NQTD has shape (2, 2, 4, 8); allowed: (2, 2, 5, 8)"),
        ("sinks_A", zeros(3), "sinks_A has shape (3,); allowed: (4,)"),
        ("unseen_NT", zeros(2, 5), "unseen_NT is float32; allowed: bool"),
        ("scale", 0.0, "scale=0.0; it must be greater than 0"),
    ],
    cross_entropy: [
        ("hidden_TH", zeros(4), "hidden_TH has shape (4,); allowed: (T, H)"),
        ("hidden_TH", zeros(4, 8, dtype=INT), "hidden_TH is int32; allowed: bfloat16"),
        ("hidden_TH", strided(4, 8), "hidden_TH is not contiguous"),
        ("weight_VH", zeros(9, 7), "weight_VH has shape (9, 7); allowed: (V, 8)"),
        ("weight_VH", zeros(9, 8, dtype=BF16), "weight_VH is bfloat16, hidden_TH float32; they must be equal"),
        ("weight_VH", meta(zeros(9, 8)), "weight_VH is on meta"),
        ("labels_T", zeros(4, dtype=INT), "labels_T is int32; allowed: int64"),
        ("labels_T", zeros(5, dtype=LONG), "labels_T has shape (5,); allowed: (4,)"),
        ("chunk_tokens", 0, "chunk_tokens=0; it must be greater than 0"),
        ("first_id", -1, "first_id=-1; it must not be negative"),
    ],
    clamped_swiglu: [
        ("gate_up_MG", zeros(4, 5), "pairs of gate and up"),
        ("gate_up_MG", zeros(4, 3, 2), "gate_up_MG has shape (4, 3, 2); allowed: (M, G)"),
        ("gate_up_MG", zeros(4, 6, dtype=INT), "gate_up_MG is int32; allowed: bfloat16"),
        ("gate_up_MG", strided(4, 6), "gate_up_MG is not contiguous"),
        ("limit", float("nan"), "limit=nan; it must be greater than 0"),
    ],
}
CASES = [(op, *case) for op, cases in REFUSED.items() for case in cases]


@pytest.mark.parametrize("op", SERVED, ids=lambda op: op.__name__)
def test_what_the_refusals_differ_from_is_served(op):
    op(**SERVED[op])
    assert op in REFUSED


@pytest.mark.parametrize(("op", "argument", "wrong", "said"), CASES, ids=[f"{c[0].__name__}: {c[3]}" for c in CASES])
def test_an_argument_that_is_not_served_is_named(op, argument, wrong, said):
    given = {**SERVED[op], argument: wrong}
    if argument == "side":
        given["fold"] = 2
    with pytest.raises(ValueError) as refused:
        op(**given)
    assert said in str(refused.value)


def test_experts_that_do_not_learn_are_checked_as_those_that_do():
    given = SERVED[routed.routed_mlp]
    w1, w2 = routed.plain(given["gate_up_EHG"]), routed.plain(given["down_EFH"])
    call = {"x_TH": given["x_TH"], "weights_TK": given["weights_TK"], "index": INDEX, "gate_up": w1, "down": w2,
            "gate_up_bias_EG": given["gate_up_bias_EG"], "down_bias_EH": given["down_bias_EH"],
            "limit": 7.0}  # fmt: skip
    for change, said in (
        ({"x_TH": zeros(4, 7)}, "x_TH has width 7, gate_up 8; they must be equal"),
        ({"x_TH": zeros(4, 8, dtype=WIDE)}, "x_TH is float64; allowed: bfloat16"),
        ({"down": routed.to_fp8(given["down_EFH"])}, "gate_up is plain, down fp8; they must be of one kind"),
        ({"down": routed.plain(zeros(3, 6, 8, dtype=BF16))}, "down is bfloat16, x_TH float32; they must be equal"),
        ({"gate_up_bias_EG": zeros(3, 11)}, "gate_up_bias_EG has shape (3, 11); allowed: (3, 12)"),
        ({"down_bias_EH": zeros(3, 8).requires_grad_()}, "down_bias_EH requires a gradient"),
        ({"limit": 0.0}, "limit=0.0; it must be greater than 0"),
    ):
        with pytest.raises(ValueError) as refused:
            routed.routed_mlp_frozen(**{**call, **change})
        assert said in str(refused.value)


def test_gradients_that_do_not_fit_the_rows_are_refused():
    given = {"a": zeros(4, 8), "b": zeros(ROWS, 12), "weights_TK": zeros(4, 2), "index": INDEX, "gather_a": True,
             "gather_b": False, "grad_EKN": zeros(3, 8, 12), "grad_bias_EN": zeros(3, 12),
             "accumulate": False}  # fmt: skip
    for change, said in (
        ({"a": zeros(5, 8)}, "a has shape (5, 8); allowed: (4, 8)"),
        ({"b": zeros(ROWS, 11)}, f"b has shape ({ROWS}, 11); allowed: ({ROWS}, 12)"),
        ({"b": zeros(ROWS, 12, dtype=BF16)}, "b is bfloat16, a float32; they must be equal"),
        ({"grad_EKN": zeros(8, 12)}, "grad_EKN has shape (8, 12); allowed: (E, K, N)"),
        ({"grad_bias_EN": zeros(3, 11)}, "grad_bias_EN has shape (3, 11); allowed: (3, 12)"),
        ({"grad_EKN": strided(3, 8, 12)}, "grad_EKN is not contiguous"),
    ):
        with pytest.raises(ValueError) as refused:
            routed.weight_grads(**{**given, **change})
        assert said in str(refused.value)


def test_a_tensor_on_another_gpu_than_the_current_one_is_refused(monkeypatch):
    """Triton would launch on the current one and read the other's memory."""
    knobs = pytest.importorskip("triton").knobs
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    here, there = (SimpleNamespace(is_cuda=True, device=torch.device("cuda", i)) for i in (0, 1))
    assert triton_refusal(here) is None
    assert triton_refusal(here, there) == "a tensor is on cuda:1, the current device is cuda:0"


def test_no_op_that_others_call_is_left_out():
    modules = (route, permute, mx, grouped, routed, projector)
    public = {
        value for module in modules for name, value in vars(module).items()
        if inspect.isfunction(value) and not name.startswith("_") and value.__module__.startswith(module.__name__[:22])
    }  # fmt: skip
    beside = {routed.routed_mlp_frozen, routed.weight_grads}
    no_ops = {"check", "choose", "triton_dtype", "sum_block", "payload_width", "experts_of", "runs"}
    missing = {f.__name__ for f in public - set(SERVED) - beside}
    assert not {name for name in missing - no_ops if not name.startswith("check_")}
