"""What an op does not serve it refuses by the argument's name, before any launch."""

from __future__ import annotations

import pytest
import torch
from medgpt_kernels.clamped_swiglu.op import clamped_swiglu
from medgpt_kernels.cross_entropy.op import cross_entropy
from medgpt_kernels.permute import op as permute
from medgpt_kernels.projector import op as projector
from medgpt_kernels.route import op as route
from medgpt_kernels.sink_attention.op import PackedRows, sink_attention

HALF, LONG = torch.bfloat16, torch.int64


def zeros(*shape: int, dtype=torch.float32, device="cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


INDEX = route.index(zeros(4, 2, dtype=torch.int32) + torch.arange(2, dtype=torch.int32), 3, tile=16,
                    implementation="reference")  # fmt: skip
PLACES = projector.placement(range(4), range(4), num_images=1, side=2, fold=1)
ROUTE = {"x_TH": zeros(4, 8), "weight_EH": zeros(3, 8), "bias_E": zeros(3), "top_k": 2}
LOSSES = {"logits_TE": zeros(4, 3), "share_E": zeros(3), "kept_T": zeros(4), "num_tokens": torch.ones(())}
PROJECT = {"text_SBH": zeros(6, 1, 8), "features_IPF": zeros(1, 4, 5), "at": PLACES, "weight_1": zeros(7, 5),
           "bias_1": zeros(7), "weight_2": zeros(8, 7), "bias_2": zeros(8)}  # fmt: skip
ATTEND = {"query_BASD": zeros(1, 4, 6, 8), "key_BQSD": zeros(1, 2, 6, 8), "value_BQSD": zeros(1, 2, 6, 8),
          "sinks_A": zeros(4), "rows": PackedRows(zeros(1, 6, dtype=LONG), "reference"), "window": None,
          "scale": 1.0}  # fmt: skip
LOSS = {"hidden_TH": zeros(4, 8), "weight_VH": zeros(9, 8), "labels_T": zeros(4, dtype=LONG)}

REFUSED = [
    (route.route, ROUTE, {"x_TH": zeros(4, 8, dtype=torch.int32)}, "x_TH is int32; allowed: bfloat16"),
    (route.route, ROUTE, {"x_TH": zeros(2, 2, 8)}, "x_TH has shape (2, 2, 8); allowed: (T, H)"),
    (route.route, ROUTE, {"x_TH": zeros(8, 4).t()}, "x_TH is not contiguous"),
    (route.route, ROUTE, {"weight_EH": zeros(8)}, "weight_EH has shape (8,); allowed: (E, H)"),
    (route.route, ROUTE, {"weight_EH": zeros(3, 8, dtype=LONG)}, "weight_EH is int64; allowed: bfloat16"),
    (route.route, ROUTE, {"bias_E": zeros(3, device="meta")}, "bias_E is on meta, x_TH on cpu"),
    (route.route, ROUTE, {"norm_H": zeros(7)}, "norm_H has shape (7,); allowed: (8,)"),
    (route.losses, LOSSES, {"kept_T": zeros(5)}, "kept_T has shape (5,); allowed: (4,)"),
    (route.losses, LOSSES, {"share_E": zeros(4)}, "share_E has shape (4,); allowed: (3,)"),
    (route.index, {"experts_TK": zeros(4, 2, dtype=torch.int32), "num_experts": 3}, {"histogram": zeros(1, 3)},
     "histogram is torch.float32; allowed: int32"),
    (route.index, {"experts_TK": zeros(4, 2, dtype=torch.int32), "num_experts": 3},
     {"histogram": zeros(2, 3, dtype=torch.int32)}, "histogram has shape (2, 3); allowed: (1, 3)"),
    (permute.permute, {"x_TH": zeros(4, 8), "index": INDEX}, {"x_TH": zeros(5, 8)}, "x_TH has 5 rows"),
    (permute.permute, {"x_TH": zeros(4, 8), "index": INDEX}, {"x_TH": zeros(4, 8, device="meta")}, "index is on cpu"),
    (permute.pack_fp8, {"x_TH": zeros(4, 8), "index": INDEX}, {"x_TH": zeros(3, 8)}, "x_TH has 3 rows"),
    (permute.combine, {"rows_RH": zeros(INDEX.num_rows, 8), "weights_TK": None, "index": INDEX},
     {"rows_RH": zeros(4, 8)}, f"rows_RH has 4 rows; the index is for {INDEX.num_rows}"),
    (permute.combine, {"rows_RH": zeros(INDEX.num_rows, 8), "weights_TK": None, "index": INDEX},
     {"weights_TK": zeros(4, 3)}, "weights_TK has shape (4, 3); allowed: (4, 2)"),
    (permute.unpack_fp8, {"payload_RP": zeros(4, 144, dtype=torch.uint8), "hidden": 128, "dtype": HALF},
     {"dtype": torch.int8}, "dtype is torch.int8; allowed: bfloat16"),
    (projector.project_into, PROJECT, {"text_SBH": zeros(6, 8)}, "text_SBH has shape (6, 8); allowed: (S, B, H)"),
    (projector.project_into, PROJECT, {"bias_1": zeros(6)}, "bias_1 has shape (6,); allowed: (7,)"),
    (projector.project_into, PROJECT, {"bias_2": zeros(8, dtype=LONG)}, "bias_2 is torch.int64"),
    (projector.project_into, PROJECT, {"norm": (zeros(5), zeros(4))}, "norm[1] has shape (4,); allowed: (5,)"),
    (projector.project_into, PROJECT, {"weight_2": zeros(8, 7, device="meta")}, "weight_2 is on meta"),
    (sink_attention, ATTEND, {"query_BASD": zeros(4, 6, 8)}, "query_BASD has shape (4, 6, 8); allowed: (B, A, S, D)"),
    (sink_attention, ATTEND, {"key_BQSD": zeros(1, 3, 6, 8)}, "its second axis must divide 4 heads"),
    (sink_attention, ATTEND, {"value_BQSD": zeros(1, 2, 5, 8)}, "value_BQSD has shape (1, 2, 5, 8)"),
    (sink_attention, ATTEND, {"value_BQSD": zeros(1, 2, 6, 8, dtype=HALF)}, "value_BQSD is torch.bfloat16"),
    (sink_attention, ATTEND, {"sinks_A": zeros(2)}, "sinks_A has shape (2,); allowed: (4,)"),
    (sink_attention, ATTEND, {"sinks_A": zeros(4, device="meta")}, "sinks_A is on meta"),
    (cross_entropy, LOSS, {"hidden_TH": zeros(4)}, "hidden_TH has shape (4,); allowed: (T, H)"),
    (cross_entropy, LOSS, {"weight_VH": zeros(9, 7)}, "weight_VH has shape (9, 7)"),
    (cross_entropy, LOSS, {"labels_T": zeros(4, dtype=torch.int32)}, "labels_T is torch.int32; allowed: int64"),
    (clamped_swiglu, {"gate_up_MG": zeros(4, 6), "limit": 7.0}, {"gate_up_MG": zeros(4, 5)}, "pairs of gate and up"),
    (clamped_swiglu, {"gate_up_MG": zeros(4, 6), "limit": 7.0}, {"gate_up_MG": zeros(6, 4).t()}, "is not contiguous"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "given", "change", "said"), REFUSED, ids=[f"{r[0].__name__}: {r[3]}" for r in REFUSED])
def test_an_argument_that_is_not_served_is_named(op, given, change, said):
    op(**given)
    with pytest.raises(ValueError) as refused:
        op(**{**given, **change})
    assert said in str(refused.value)
