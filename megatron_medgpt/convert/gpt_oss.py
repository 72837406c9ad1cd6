"""Rows of the language model: transformers' ``GptOssForCausalLM`` and OpenAI's own files.

transformers keeps the experts' matrices as (inputs, outputs) with gate and up interleaved, and so do we: they are not
moved at all. In MXFP4, and in OpenAI's files, they lie the other way round.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

import torch

from megatron_medgpt.config.schema import LanguageConfig
from megatron_medgpt.convert.layout import SAME, TRANSPOSED, Move, grouped_by_query_group, grouped_from_stacked, packed
from megatron_medgpt.convert.mxfp4 import ScaleRule
from megatron_medgpt.convert.table import Row, Table

_ENDS = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.linear_proj.bias": "self_attn.o_proj.bias",
    "self_attention.core_attention.sinks": "self_attn.sinks",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.router.weight": "mlp.router.weight",
    "mlp.router.bias": "mlp.router.bias",
    "mlp.experts.gate_up_bias": "mlp.experts.gate_up_proj_bias",
    "mlp.experts.down_bias": "mlp.experts.down_proj_bias",
}
_EXPERTS = {"mlp.experts.gate_up": "mlp.experts.gate_up_proj", "mlp.experts.down": "mlp.experts.down_proj"}

_ORIGINAL_ENDS = {
    "embedding.word_embeddings.weight": "embedding.weight",
    "decoder.final_layernorm.weight": "norm.scale",
    "output_layer.weight": "unembedding.weight",
}
_ORIGINAL_LAYER = {
    "input_layernorm.weight": "attn.norm.scale",
    "self_attention.linear_proj.weight": "attn.out.weight",
    "self_attention.linear_proj.bias": "attn.out.bias",
    "self_attention.core_attention.sinks": "attn.sinks",
    "pre_mlp_layernorm.weight": "mlp.norm.scale",
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.router.bias": "mlp.gate.bias",
    "mlp.experts.gate_up_bias": "mlp.mlp1_bias",
    "mlp.experts.down_bias": "mlp.mlp2_bias",
}
_ORIGINAL_EXPERTS = {"mlp.experts.gate_up": "mlp.mlp1_weight", "mlp.experts.down": "mlp.mlp2_weight"}

Experts = Literal["plain", "mxfp4"]


def gpt_oss_table(
    config: LanguageConfig, ours: str = "", published: str = "", *, experts: Experts = "plain",
    dtype: torch.dtype = torch.bfloat16, rule: ScaleRule = "up",
) -> Table:  # fmt: skip
    """The table of a language model; the two strings are put in front of the names of either side.

    Args:
        experts: how the published experts are stored.
        dtype: that MXFP4 becomes.
        rule: of the scales when MXFP4 is written.
    """
    rows = [Row(ours + name, (published + theirs,)) for name, theirs in _ENDS.items()]
    grouped = grouped_by_query_group(config)
    for layer in range(config.num_layers):
        here, there = f"{ours}decoder.layers.{layer}.", f"{published}model.layers.{layer}."
        rows += [Row(here + name, (there + theirs,)) for name, theirs in _LAYER.items()]
        rows += _expert_rows(here, there, _EXPERTS, packed(dtype, rule) if experts == "mxfp4" else SAME, "_")
        for leaf in ("weight", "bias"):
            parts = tuple(f"{there}self_attn.{part}_proj.{leaf}" for part in "qkv")
            rows.append(Row(f"{here}self_attention.linear_qkv.{leaf}", parts, grouped))
    return Table(tuple(rows))


def original_table(
    config: LanguageConfig, ours: str = "", *, experts: Experts = "mxfp4", dtype: torch.dtype = torch.bfloat16
) -> Table:
    """The table of OpenAI's own files (openai/gpt-oss ``gpt_oss/torch/weights.py``, ``original/`` in the releases)."""
    rows = [Row(ours + name, (theirs,)) for name, theirs in _ORIGINAL_ENDS.items()]
    grouped = grouped_from_stacked(config)
    for layer in range(config.num_layers):
        here, there = f"{ours}decoder.layers.{layer}.", f"block.{layer}."
        rows += [Row(here + name, (there + theirs,)) for name, theirs in _ORIGINAL_LAYER.items()]
        move = packed(dtype) if experts == "mxfp4" else TRANSPOSED
        rows += _expert_rows(here, there, _ORIGINAL_EXPERTS, move, ".")
        for leaf in ("weight", "bias"):
            rows.append(Row(f"{here}self_attention.linear_qkv.{leaf}", (f"{there}attn.qkv.{leaf}",), grouped))
    return Table(tuple(rows))


def experts_stored(names: Iterable[str]) -> Experts:
    """How a published model stores its experts, by its tensors' names."""
    return "mxfp4" if any(name.endswith(("_proj_blocks", "_weight.blocks")) for name in names) else "plain"


_PACKED_LEAVES = ("blocks", "scales")


def kept_packed(table: Table) -> Table:
    """The table with MXFP4 blocks and scales as they are, under our names with these endings."""
    rows: list[Row] = []
    for row in table.rows:
        if row.move.packs:
            rows += [Row(f"{row.ours}_{leaf}", (name,)) for leaf, name in zip(_PACKED_LEAVES, row.published)]
        else:
            rows.append(row)
    return replace(table, rows=tuple(rows))


def is_packed(names: Iterable[str]) -> bool:
    """Does a checkpoint of ours hold its experts in MXFP4?"""
    return any(".experts." in name and name.endswith("_blocks") for name in names)


def _expert_rows(here: str, there: str, names: dict[str, str], move: Move, before: str) -> list[Row]:
    def published(theirs: str) -> tuple[str, ...]:
        leaves = tuple(before + leaf for leaf in ("blocks", "scales")) if move.packs else ("",)
        return tuple(there + theirs + leaf for leaf in leaves)

    return [Row(here + name, published(theirs), move) for name, theirs in names.items()]
