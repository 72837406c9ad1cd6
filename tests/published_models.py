"""Small models in the layouts of the public ones, and checkpoints of ours, written without building a model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_medgpt.checkpoint.manifest import CheckpointFacts
from megatron_medgpt.config.presets import TINY, TINY_CLIP, TINY_SIGLIP
from megatron_medgpt.config.schema import ModelConfig
from megatron_medgpt.convert.gpt_oss import gpt_oss_table, original_table
from megatron_medgpt.convert.hf_to_megatron import model_shapes
from megatron_medgpt.convert.llava import published_config, published_vision_config
from megatron_medgpt.convert.mapped import TensorSpec
from megatron_medgpt.convert.safetensor import SafetensorsWriter
from megatron_medgpt.convert.store import CheckpointWriter
from megatron_medgpt.convert.vision import vision_table

LANGUAGE = replace(TINY, num_layers=2)
CLIP = ModelConfig(language=LANGUAGE, vision=TINY_CLIP)
SIGLIP = ModelConfig(language=LANGUAGE, vision=TINY_SIGLIP)


def random_weights(config: ModelConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Weights of our model by our names, of a size that lets every one of them be seen in the logits."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in model_shapes(config).items():
        drawn = torch.randn(shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            drawn = 1 + 0.1 * drawn
        elif len(shape) > 1 and not name.endswith("_bias"):
            fan_in = shape[-2] if ".experts." in name else math.prod(shape[1:]) if "patch" in name else shape[-1]
            drawn = drawn * fan_in**-0.5
        else:
            drawn = 0.3 * drawn
        found[name] = drawn.to(dtype)
    return found


def on_mxfp4_grid(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with experts that MXFP4 holds exactly."""
    from megatron_medgpt.convert.layout import packed

    move = packed(torch.float32)
    return {
        name: move.to_ours(list(move.to_published(tensor))).contiguous().to(tensor.dtype)
        if name.endswith((".experts.gate_up", ".experts.down"))
        else tensor
        for name, tensor in weights.items()
    }


def write_checkpoint(folder: Path, config: ModelConfig, weights: Mapping[str, Tensor]) -> Path:
    """A checkpoint of ours with these weights."""
    folder.mkdir(parents=True)
    writer = CheckpointWriter(folder, {name: TensorSpec.of(tensor) for name, tensor in weights.items()})
    for name, tensor in weights.items():
        writer.write(name, 0, tensor)
    writer.finish(CheckpointFacts(step=3, stage_name="align", model=asdict(config)))
    return folder


def write_folder(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], *, max_shard_bytes: int = 1 << 40
) -> Path:
    """A published folder of these tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = SafetensorsWriter(
        folder, {n: TensorSpec.of(t) for n, t in tensors.items()}, max_shard_bytes=max_shard_bytes
    )
    for name, tensor in tensors.items():
        writer.write(name, 0, tensor)
    writer.finish()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _language_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights.items() if name.startswith("language.")}


def write_gpt_oss(
    folder: Path, config: ModelConfig, weights: Mapping[str, Tensor], *, experts: str = "plain", **options: Any
) -> Path:
    """The language model as transformers publishes it."""
    values = published_config(config, config.language.vocab_size - 1).to_diff_dict()["text_config"]
    if experts == "mxfp4":
        values["quantization_config"] = {"quant_method": "mxfp4"}
    table = gpt_oss_table(config.language, "language.", experts=experts)
    return write_folder(folder, table.to_published(_language_weights(weights)), values, **options)


def write_original(folder: Path, config: ModelConfig, weights: Mapping[str, Tensor], *, experts: str = "mxfp4") -> Path:
    """The language model as OpenAI publishes it."""
    language = config.language
    values = {
        "num_hidden_layers": language.num_layers, "num_experts": language.num_experts,
        "experts_per_token": language.num_experts_per_token, "vocab_size": language.vocab_size,
        "hidden_size": language.hidden_size, "intermediate_size": language.expert_hidden_size,
        "swiglu_limit": language.swiglu_limit, "head_dim": language.head_dim,
        "num_attention_heads": language.num_attention_heads, "num_key_value_heads": language.num_query_groups,
        "sliding_window": language.sliding_window, "initial_context_length": language.yarn_original_length,
        "rope_theta": language.rope_base, "rope_scaling_factor": language.yarn_factor,
        "rope_ntk_alpha": language.yarn_beta_slow, "rope_ntk_beta": language.yarn_beta_fast,
    }  # fmt: skip
    table = original_table(language, "language.", experts=experts)
    return write_folder(folder, table.to_published(_language_weights(weights)), values)


def write_tower(folder: Path, config: ModelConfig, weights: Mapping[str, Tensor], *, full: bool = False) -> Path:
    """The vision tower, alone or inside a full CLIP or SigLIP model, with the layers that lie behind the feature."""
    vision = config.vision
    table = vision_table(vision, "vision.", "vision_model.")
    tensors = table.to_published({n: t for n, t in weights.items() if n.startswith("vision.")})
    built = vision.num_layers + 1 + vision.feature_layer
    for name in [n for n in tensors if f".layers.{built - 1}." in n]:
        for layer in range(built, vision.num_layers):
            tensors[name.replace(f".layers.{built - 1}.", f".layers.{layer}.")] = tensors[name] + 1
    for leaf in ("weight", "bias"):
        tensors[f"vision_model.post_layernorm.{leaf}"] = torch.rand(vision.hidden_size)
    values = published_vision_config(vision).to_diff_dict()
    if full:
        tensors["logit_scale"] = torch.ones(())
        tensors["text_model.final_layer_norm.weight"] = torch.ones(4)
        values = {"model_type": vision.kind, "vision_config": values, "text_config": {}}
    return write_folder(folder, tensors, values)
