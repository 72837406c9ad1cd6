"""Rows of the vision encoders: transformers' ``CLIPVisionModel`` and ``SiglipVisionModel``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_medgpt.config.schema import VisionConfig
from megatron_medgpt.convert.layout import STACKED, Move
from megatron_medgpt.convert.table import Constant, Row, Table
from megatron_medgpt.model.vision import num_layers_to_feature

_LAYER = {
    "attention_norm": "layer_norm1",
    "out": "self_attn.out_proj",
    "mlp_norm": "layer_norm2",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}


def vision_table(config: VisionConfig, ours: str = "", published: str = "") -> Table:
    """The table of an encoder; the two strings are put in front of the names of either side."""
    table = [("position_embedding", "embeddings.position_embedding.weight")]
    table += [("patch_embedding.weight", "embeddings.patch_embedding.weight")]
    if config.kind == "clip":
        table += [("class_embedding", "embeddings.class_embedding")]
        table += [(f"pre_norm.{leaf}", f"pre_layrnorm.{leaf}") for leaf in ("weight", "bias")]
    else:
        table += [("patch_embedding.bias", "embeddings.patch_embedding.bias")]
    rows = [Row(ours + name, (published + theirs,)) for name, theirs in table]
    num_layers = num_layers_to_feature(config)
    for layer in range(num_layers):
        here, there = f"{ours}layers.{layer}.", f"{published}encoder.layers.{layer}."
        for leaf in ("weight", "bias"):
            rows += [Row(f"{here}{name}.{leaf}", (f"{there}{theirs}.{leaf}",)) for name, theirs in _LAYER.items()]
            parts = tuple(f"{there}self_attn.{part}_proj.{leaf}" for part in "qkv")
            rows.append(Row(f"{here}qkv.{leaf}", parts, STACKED))
    behind = "|".join(str(layer) for layer in range(num_layers, config.num_layers)) or "(?!)"
    unused = (rf"encoder\.layers\.(?:{behind})\..*", r"post_layernorm\..*", r"head\..*", r"embeddings\.position_ids")
    prefix = published.replace(".", r"\.")
    constants = ()
    if num_layers == config.num_layers:
        # transformers' towers always have a post-norm; LLaVA takes the features in front of it. Ones and zeros, so
        # that nothing there looks trained.
        leaves = {"weight": 1.0, "bias": 0.0}
        constants = tuple(
            Constant(f"{published}post_layernorm.{leaf}", (config.hidden_size,), value)
            for leaf, value in leaves.items()
        )
    return Table(tuple(rows), tuple(prefix + pattern for pattern in unused), constants)


def at_run_size(config: VisionConfig) -> Move:
    """The position table at the resolution the model is run at, for exports; there is no way back from it."""
    has_class_token = config.kind == "clip"
    side, target = config.pretrained_size_px // config.patch_size_px, config.patches_per_side

    def to_published(table_PH: Tensor) -> tuple[Tensor]:
        class_1H, patches_PH = table_PH[:has_class_token], table_PH[has_class_token:]
        grid = patches_PH.view(1, side, side, -1).permute(0, 3, 1, 2).float()
        resized = F.interpolate(grid, size=(target, target), mode="bicubic", align_corners=False)
        return (torch.cat((class_1H, resized.flatten(2).transpose(1, 2)[0].to(table_PH.dtype))),)

    def to_ours(_: object) -> Tensor:
        raise NotImplementedError("a resized position table does not tell the one it was made from")

    return Move(f"position table from {side} to {target} patches a side", to_ours, to_published)
