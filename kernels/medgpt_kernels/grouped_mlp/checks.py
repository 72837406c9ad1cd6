"""What the experts' functions refuse before any launch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from medgpt_kernels.dispatch import (
    ANY_FLOAT,
    FLOATS,
    check,
    check_axes,
    check_contiguous,
    check_devices,
    check_dtype,
    check_same_dtype,
    check_shape,
)
from medgpt_kernels.grouped_mlp.formats import KINDS
from medgpt_kernels.grouped_mlp.launch import Weights
from medgpt_kernels.route.rows import RowIndex


def check_projection(rows: dict[str, Tensor], weight: dict[str, Tensor], bias: dict[str, Tensor]) -> None:
    """One projection of all experts, (E, K, N) and (E, N), beside the rows that it multiplies; each with the name that
    it has in the function that was called."""
    (name, rows_MK), (weight_name, weight_EKN), (bias_name, bias_EN) = (
        next(iter(d.items())) for d in (rows, weight, bias)
    )
    check_axes(weight_name, weight_EKN, "(E, K, N)")
    check_shape(bias_name, bias_EN, (weight_EKN.shape[0], weight_EKN.shape[2]))
    check_dtype(name, rows_MK, ANY_FLOAT)
    check_same_dtype(name, **rows, **weight, **bias)
    check_devices(**rows, **weight, **bias)


def check_rows(name: str, rows_MI: Tensor, width: int, counts: Sequence[int], num_experts: int) -> None:
    """Rows sorted by expert, and how many each expert has."""
    check_axes(name, rows_MI, "(M, I)")
    check(rows_MI.shape[1] == width, f"{name} has width {rows_MI.shape[1]}; the weights multiply {width}")
    check(len(counts) == num_experts, f"counts has {len(counts)} entries; the weights are of {num_experts} experts")
    check(all(count >= 0 for count in counts), f"counts holds {min(counts, default=0)}; it must not be negative")
    check(sum(counts) == rows_MI.shape[0], f"counts add up to {sum(counts)}; {name} has {rows_MI.shape[0]} rows")


def check_pair(gate_up: dict[str, tuple[int, ...]], down: dict[str, tuple[int, ...]]) -> None:
    """Name and (E, K, N) of the two projections of a layer: they fit each other."""
    ((name, (E, hidden, pairs)),), ((down_name, sizes),) = gate_up.items(), down.items()
    check(pairs % 2 == 0, f"{name} has {pairs} columns; allowed: pairs of gate and up")
    check(sizes[0] == E, f"{down_name} holds {sizes[0]} experts; {name} {E}")
    wanted = (pairs // 2, hidden)
    check(sizes[1:] == wanted, f"{down_name} is {sizes[1:]}; {name} asks for {wanted}")


def check_tokens(x_TH: Tensor, weights_TK: Tensor, index: RowIndex, allowed: tuple[torch.dtype, ...]) -> None:
    check_axes("x_TH", x_TH, "(T, H)")
    check_dtype("x_TH", x_TH, allowed)
    check_dtype("weights_TK", weights_TK, (torch.float32,) if allowed is FLOATS else ANY_FLOAT)
    check(
        weights_TK.shape == index.token_row.shape,
        f"weights_TK has shape {tuple(weights_TK.shape)}; the index is for {tuple(index.token_row.shape)}",
    )
    T = x_TH.shape[0]
    check(weights_TK.shape[0] == T, f"x_TH has {T} tokens, weights_TK {weights_TK.shape[0]}")
    check(index.tile >= 16, f"index.tile={index.tile}; products need tiles of at least 16 rows")
    check_contiguous(
        **{"x_TH": x_TH, "weights_TK": weights_TK, "index": index.row_entry, "index.token_row": index.token_row}
    )


def check_stacks(
    x_TH: Tensor, index: RowIndex, stacks: Mapping[str, tuple[Tensor, tuple[int, int]]], biases: Mapping[str, Tensor]
) -> None:
    """Both projections by their names, each a tensor of all experts and its logical (K, N); and their biases."""
    (name, (first, sizes)), (down, (second, down_sizes)) = stacks.items()
    H, E = x_TH.shape[1], index.counts.shape[0]
    check(sizes[0] == H, f"x_TH has width {H}, {name} {sizes[0]}; they must be equal")
    check_pair({name: (first.shape[0], *sizes)}, {down: (second.shape[0], *down_sizes)})
    check(first.shape[0] == E, f"{name} holds {first.shape[0]} experts; the index {E}")
    for (bias_name, bias), width in zip(biases.items(), (sizes[1], H)):
        check_dtype(bias_name, bias, ANY_FLOAT if x_TH.dtype == torch.float64 else FLOATS)
        check_shape(bias_name, bias, (E, width))
    check_contiguous(**{"x_TH": x_TH, name: first, down: second, **biases})


def check_made(x_TH: Tensor, index: RowIndex, w1: Weights, b1: Tensor, w2: Weights, b2: Tensor) -> None:
    """Weights in the format that the products read."""
    check(w1.kind == w2.kind, f"gate_up is {w1.kind}, down {w2.kind}; they must be of one kind")
    for name, w in (("gate_up", w1), ("down", w2)):
        check(w.kind in KINDS, f"{name} is of kind {w.kind!r}; allowed: {', '.join(KINDS)}")
    stored = [w.stored(transposed=False) for w in (w1, w2)]
    if w1.kind == "plain":
        check_same_dtype("x_TH", x_TH=x_TH, gate_up=stored[0], down=stored[1])
    stacks = {"gate_up": (stored[0], w1.sizes), "down": (stored[1], w2.sizes)}
    check_stacks(x_TH, index, stacks, {"gate_up_bias_EG": b1, "down_bias_EH": b2})
