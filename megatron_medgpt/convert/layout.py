"""Moves between a published tensor's layout and ours. Each has an inverse that returns the input bit for bit, but for
the quantising ones, whose inverse returns the values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_medgpt.config.schema import LanguageConfig
from megatron_medgpt.convert.mxfp4 import ScaleRule, dequantise, quantise


@dataclass(frozen=True, slots=True)
class Move:
    """One way to lay out tensors and the way back. Both also take meta tensors, which tell shapes."""

    name: str
    to_ours: Callable[[Sequence[Tensor]], Tensor]
    """Published tensors, in the order of the row, to ours."""
    to_published: Callable[[Tensor], Sequence[Tensor]]
    by_parts: bool = False
    """It treats every item of the first axis alone, so that a tensor can be moved part by part."""
    packs: bool = False
    """The published tensors are MXFP4 blocks and scales."""


SAME = Move("same", lambda tensors: tensors[0], lambda tensor: (tensor,), by_parts=True)

TRANSPOSED = Move(
    "last two axes exchanged",
    lambda tensors: tensors[0].transpose(-1, -2),
    lambda tensor: (tensor.transpose(-1, -2),),
    by_parts=True,
)
"""OpenAI's own files hold an expert's matrices as (outputs, inputs); transformers and we as (inputs, outputs)."""

STACKED = Move(
    "stacked q, k, v of equal height", lambda tensors: torch.cat(tuple(tensors)), lambda tensor: tensor.chunk(3)
)
"""The vision encoder's fused projection: the rows of the queries, then the keys', then the values'."""


def packed(dtype: torch.dtype = torch.bfloat16, rule: ScaleRule = "up") -> Move:
    """Experts in MXFP4: blocks (E, outputs, inputs / 32, 16) and scales to weights (E, inputs, outputs) and back."""
    return Move(
        "MXFP4, last two axes exchanged",
        lambda tensors: dequantise(tensors[0], tensors[1], dtype).transpose(-1, -2),
        lambda tensor: quantise(tensor.transpose(-1, -2).contiguous(), rule),
        by_parts=True,
        packs=True,
    )


def grouped_by_query_group(config: LanguageConfig) -> Move:
    """megatron-core's fused projection: for every query group its query heads, its key head, its value head.

    Source: megatron/core/transformer/attention.py, ``get_query_key_value_tensors`` ("[sq, b, ng, (np/ng + 2) * hn]").
    """
    groups, head = config.num_query_groups, config.head_dim
    queries = config.num_attention_heads // groups

    def to_ours(tensors: Sequence[Tensor]) -> Tensor:
        tail = tensors[0].shape[1:]
        parts = [part.reshape(groups, -1, head, *tail) for part in tensors]
        return torch.cat(parts, dim=1).reshape(-1, *tail)

    def to_published(tensor: Tensor) -> Sequence[Tensor]:
        tail = tensor.shape[1:]
        parts = tensor.reshape(groups, queries + 2, head, *tail).split((queries, 1, 1), dim=1)
        return tuple(part.reshape(-1, *tail) for part in parts)

    return Move("grouped by query group", to_ours, to_published)


def grouped_from_stacked(config: LanguageConfig) -> Move:
    """The same from one tensor that stacks all queries, all keys and all values (OpenAI's own files)."""
    grouped = grouped_by_query_group(config)
    heights = [heads * config.head_dim for heads in (config.num_attention_heads, *(config.num_query_groups,) * 2)]
    return Move(
        "grouped by query group, from stacked q, k, v",
        lambda tensors: grouped.to_ours(tensors[0].split(heights)),
        lambda tensor: (torch.cat(tuple(grouped.to_published(tensor))),),
    )
