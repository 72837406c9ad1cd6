"""One call for every implementation, and the masks of a micro-batch, made once and shared by all layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from medgpt_kernels.dispatch import (
    ANY_FLOAT,
    check,
    check_axes,
    check_dtype,
    check_positive,
    check_same_dtype,
    check_shape,
)
from medgpt_kernels.sink_attention import fused_cpu, reference

IMPLEMENTATIONS = ("reference", "fused_cpu", "flex")


def choose(name: str, device: torch.device) -> str:
    """Implementation that ``name`` (``auto`` or one of ``IMPLEMENTATIONS``) means on a device.

    Raises:
        ValueError: the named implementation cannot serve the device.
    """
    if name == "auto":
        return "flex" if device.type == "cuda" else "fused_cpu"
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"attention {name!r}; allowed: auto, {', '.join(IMPLEMENTATIONS)}")
    if name == "fused_cpu" and device.type != "cpu":
        raise ValueError(f"attention fused_cpu runs on a CPU, not on {device.type}; set it to auto, reference or flex")
    if name == "flex" and device.type == "cpu":
        raise ValueError("attention flex has no backward pass on a CPU; set it to auto, reference or fused_cpu")
    return name


class PackedRows:
    """Rows of packed documents as attention needs them. Masks are made when a layer first asks, then kept.

    Args:
        document_ids_BS: equal within a document, different between neighbours; on the device of the queries.
        implementation: one of ``IMPLEMENTATIONS``.
        branches: (branch ids, position ids), each (B, S), where documents fork (see ``reference.visible``).

    Raises:
        ValueError: names the argument and what is allowed.
    """

    def __init__(
        self, document_ids_BS: Tensor, implementation: str, branches: tuple[Tensor, Tensor] | None = None
    ):  # fmt: skip
        check_axes("document_ids_BS", document_ids_BS, "(B, S)")
        check_dtype("document_ids_BS", document_ids_BS, (torch.int32, torch.int64))
        check(
            implementation in IMPLEMENTATIONS,
            f"implementation={implementation!r}; allowed: {', '.join(IMPLEMENTATIONS)}",
        )
        for name, ids_BS in zip(("branches[0]", "branches[1]"), branches or ()):
            check_shape(name, ids_BS, tuple(document_ids_BS.shape))
        self.document_ids_BS = document_ids_BS
        self.branches = branches
        self.implementation = implementation
        self._masks: dict[tuple[int | None, torch.dtype], Any] = {}

    def mask(self, window: int | None, dtype: torch.dtype) -> Any:
        """Additive mask of a dtype (``fused_cpu``) or block mask (``flex``)."""
        key = (window, dtype if self.implementation == "fused_cpu" else torch.bool)
        if key not in self._masks:
            self._masks[key] = self._make(window, dtype)
        return self._masks[key]

    def _make(self, window: int | None, dtype: torch.dtype) -> Any:
        if self.implementation == "flex":
            from medgpt_kernels.sink_attention import flex  # importing it costs a second, and CPU runs never need it

            return flex.block_mask(self.document_ids_BS, window, self.branches)
        seen = reference.visible(self.document_ids_BS, window, self.branches)
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


def _check(query_BASD: Tensor, key_BQSD: Tensor, value_BQSD: Tensor, sinks_A: Tensor, rows: PackedRows) -> None:
    check_axes("query_BASD", query_BASD, "(B, A, S, D)")
    B, A, S, D = query_BASD.shape
    Q = key_BQSD.shape[1] if key_BQSD.dim() == 4 else 0
    check(Q > 0 and A % Q == 0, f"key_BQSD has shape {tuple(key_BQSD.shape)}; its second axis must divide {A} heads")
    for name, tensor in (("key_BQSD", key_BQSD), ("value_BQSD", value_BQSD)):
        check_shape(name, tensor, (B, Q, S, D))
    check_dtype("query_BASD", query_BASD, ANY_FLOAT)
    check_same_dtype("query_BASD", query_BASD=query_BASD, key_BQSD=key_BQSD, value_BQSD=value_BQSD)
    check_shape("sinks_A", sinks_A, (A,))
    check_dtype("sinks_A", sinks_A, ANY_FLOAT)
    check_shape("document_ids_BS", rows.document_ids_BS, (B, S))
    devices = {"key_BQSD": key_BQSD, "value_BQSD": value_BQSD, "sinks_A": sinks_A, "documents": rows.document_ids_BS}
    for name, tensor in devices.items():
        check(tensor.device == query_BASD.device, f"{name} is on {tensor.device}, query_BASD on {query_BASD.device}")


def sink_attention(
    query_BASD: Tensor, key_BQSD: Tensor, value_BQSD: Tensor, sinks_A: Tensor, rows: PackedRows,
    *, window: int | None, scale: float,
) -> Tensor:  # fmt: skip
    """Causal attention with sinks over packed documents.

    Args:
        query_BASD: (B, A, S, D); key and value (B, Q, S, D), A a multiple of Q, head a reading group a // (A / Q).
        sinks_A: one logit per head.
        window: positions a query sees, itself included; None for all before it.

    Returns:
        (B, A, S, D) in the dtype of the query.

    Raises:
        ValueError: shapes, dtypes or devices that are not served.
    """
    _check(query_BASD, key_BQSD, value_BQSD, sinks_A, rows)
    check(window is None or window > 0, f"window={window}; it must be greater than 0, or None")
    check_positive(scale=scale)
    if rows.implementation == "reference":
        return reference.sink_attention(
            query_BASD, key_BQSD, value_BQSD, sinks_A, rows.document_ids_BS, window=window, scale=scale,
            branches=rows.branches,
        )  # fmt: skip
    mask = rows.mask(window, query_BASD.dtype)
    if rows.implementation == "fused_cpu":
        return fused_cpu.sink_attention(query_BASD, key_BQSD, value_BQSD, sinks_A, mask, scale=scale)
    from medgpt_kernels.sink_attention import flex

    return flex.sink_attention(query_BASD, key_BQSD, value_BQSD, sinks_A, mask, scale=scale)
