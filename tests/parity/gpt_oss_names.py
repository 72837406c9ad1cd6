"""transformers' GPT-oss in this model's names and layouts, for comparing weights and gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_medgpt.config.schema import LanguageConfig

LAYER_NAMES = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.linear_proj.bias": "self_attn.o_proj.bias",
    "self_attention.core_attention.sinks": "self_attn.sinks",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.router.weight": "mlp.router.weight",
    "mlp.router.bias": "mlp.router.bias",
    "mlp.experts.gate_up": "mlp.experts.gate_up_proj",
    "mlp.experts.gate_up_bias": "mlp.experts.gate_up_proj_bias",
    "mlp.experts.down": "mlp.experts.down_proj",
    "mlp.experts.down_bias": "mlp.experts.down_proj_bias",
}
OUTER_NAMES = {
    "language.embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "language.decoder.final_layernorm.weight": "model.norm.weight",
    "language.output_layer.weight": "lm_head.weight",
}


def in_our_layout(published: dict[str, Tensor], config: LanguageConfig) -> dict[str, Tensor]:
    """Tensors (weights, or gradients) by our names. Every tensor of ``published`` must be used."""
    left = dict(published)
    ours = {name: left.pop(theirs) for name, theirs in OUTER_NAMES.items()}
    for layer in range(config.num_layers):
        mine, theirs = f"language.decoder.layers.{layer}.", f"model.layers.{layer}."
        for name, published_name in LAYER_NAMES.items():
            ours[mine + name] = left.pop(theirs + published_name)
        for kind in ("weight", "bias"):
            parts = [left.pop(f"{theirs}self_attn.{part}_proj.{kind}") for part in "qkv"]
            ours[f"{mine}self_attention.linear_qkv.{kind}"] = by_group(parts, config.num_query_groups)
    assert not left, sorted(left)
    return ours


def by_group(query_key_value: list[Tensor], num_groups: int) -> Tensor:
    """megatron-core stacks, group after group, the group's queries, its key and its value."""
    grouped = [part.unflatten(0, (num_groups, -1)) for part in query_key_value]
    return torch.cat(grouped, dim=1).flatten(0, 1)
