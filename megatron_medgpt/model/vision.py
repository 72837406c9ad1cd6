"""The vision encoder: CLIP's and SigLIP's vision transformer up to the layer whose output is the feature.

Sources of the architecture: transformers ``models/clip/modeling_clip.py`` and ``models/siglip/modeling_siglip.py``
(checked against both in tests/parity). What differs between the two:

    clip    class token in front of the patches, norm before the first layer, no patch bias, x * sigmoid(1.702 x)
    siglip  patches only, no norm before the first layer, patch bias, GELU by tanh

Layers behind the feature layer and the post-norm do not touch the features and are not built: they would be parameters
without gradient. Attention is bidirectional (megatron-core's local ViT spec was causal until 0.18, issue 1791).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_medgpt.config.schema import VisionConfig
from megatron_medgpt.model.replicated import ReplicatedModule

NUM_CHANNELS = 3


def num_layers_to_feature(config: VisionConfig) -> int:
    """Layers that are built. Hidden state 0 is the input of the first layer, hidden state n the output of layer n."""
    return config.num_layers + 1 + config.feature_layer


class VisionLayer(nn.Module):
    """Pre-norm transformer layer with one fused projection for queries, keys and values (rows stacked q, k, v)."""

    def __init__(self, config: VisionConfig, dtype: torch.dtype):
        super().__init__()
        made = {"dtype": dtype, "device": "meta"}
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.quick_gelu = config.kind == "clip"
        self.attention_norm = nn.LayerNorm(width, eps=config.norm_eps, **made)
        self.qkv = nn.Linear(width, 3 * width, **made)
        self.out = nn.Linear(width, width, **made)
        self.mlp_norm = nn.LayerNorm(width, eps=config.norm_eps, **made)
        self.fc1 = nn.Linear(width, config.mlp_hidden_size, **made)
        self.fc2 = nn.Linear(config.mlp_hidden_size, width, **made)

    def forward(self, hidden_IPH: Tensor) -> Tensor:
        num_images, num_places, width = hidden_IPH.shape
        heads = (num_images, num_places, 3, self.num_heads, width // self.num_heads)
        query_IAPD, key_IAPD, value_IAPD = self.qkv(self.attention_norm(hidden_IPH)).view(heads).permute(2, 0, 3, 1, 4)
        mixed_IAPD = F.scaled_dot_product_attention(query_IAPD, key_IAPD, value_IAPD)
        hidden_IPH = hidden_IPH + self.out(mixed_IAPD.transpose(1, 2).reshape(num_images, num_places, width))
        inner = self.fc1(self.mlp_norm(hidden_IPH))
        inner = inner * torch.sigmoid(1.702 * inner) if self.quick_gelu else F.gelu(inner, approximate="tanh")
        return hidden_IPH + self.fc2(inner)


class VisionEncoder(ReplicatedModule):
    """Pixels to one feature per patch.

    Parameters: ``patch_embedding.{weight,bias}`` (Hv, C, patch, patch), ``class_embedding`` (Hv,),
    ``position_embedding`` (places, Hv; the class token's row first), ``pre_norm.*``, ``layers.N.*``.

    Args:
        config: shape of the encoder; ``feature_layer`` chooses the hidden state.
        dtype: of parameters and features.
        seed: of the random initial weights.
        recompute: keep only each layer's input and compute the rest again in the backward pass.
        tp_group: see ``ReplicatedModule``.
    """

    def __init__(
        self,
        config: VisionConfig,
        dtype: torch.dtype = torch.float32,
        *,
        seed: int = 0,
        device: torch.device | None = None,
        recompute: bool = False,
        tp_group: torch.distributed.ProcessGroup | None = None,
    ):
        super().__init__(tp_group)
        made = {"dtype": dtype, "device": "meta"}
        self.config = config
        self.recompute = recompute
        has_class_token = config.kind == "clip"
        patch, width = config.patch_size_px, config.hidden_size
        self.num_layers_unused = config.num_layers - num_layers_to_feature(config)
        """Layers of the published encoder that lie behind the feature layer and are not built."""
        self.pretrained_side = config.pretrained_size_px // patch
        num_places = self.pretrained_side**2 + has_class_token
        self.patch_embedding = nn.Conv2d(NUM_CHANNELS, width, patch, patch, bias=not has_class_token, **made)
        self.class_embedding = nn.Parameter(torch.empty(width, **made)) if has_class_token else None
        self.position_embedding = nn.Parameter(torch.empty(num_places, width, **made))
        self.pre_norm = nn.LayerNorm(width, eps=config.norm_eps, **made) if has_class_token else None
        self.layers = nn.ModuleList(VisionLayer(config, dtype) for _ in range(num_layers_to_feature(config)))
        self.finish(seed=seed, device=device)

    def forward(self, pixels_ICYX: Tensor) -> Tensor:
        """Features of every patch, row by row from the top left; no row for the class token.

        Args:
            pixels_ICYX: float, normalised, ``image_size_px`` square; I may be 0, and then the features still hang on
                the parameters, which get gradients of zero.

        Returns:
            features_IPH: (I, patches_per_side ** 2, Hv) in the encoder's dtype. Carries no graph when every parameter
            is frozen.

        Raises:
            ValueError: the images have another size than the configuration says.
        """
        size_px = self.config.image_size_px
        if pixels_ICYX.shape[1:] != (NUM_CHANNELS, size_px, size_px):
            raise ValueError(f"images are {tuple(pixels_ICYX.shape[1:])}; the encoder wants (3, {size_px}, {size_px})")
        weight = self.patch_embedding.weight
        patches_IPH = self.patch_embedding(pixels_ICYX.to(weight.dtype)).flatten(2).transpose(1, 2)
        hidden_IPH = self._with_positions(patches_IPH)
        recompute = self.recompute and torch.is_grad_enabled() and hidden_IPH.requires_grad
        for layer in self.layers:
            if recompute:
                # No dropout anywhere, so no random state to put back.
                hidden_IPH = checkpoint(layer, hidden_IPH, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden_IPH = layer(hidden_IPH)
        return hidden_IPH if self.class_embedding is None else hidden_IPH[:, 1:]

    def _with_positions(self, patches_IPH: Tensor) -> Tensor:
        positions_PH = self.position_embedding
        if self.class_embedding is None:
            return patches_IPH + self._at_run_size(positions_PH)
        class_I1H = (self.class_embedding + positions_PH[0]).expand(patches_IPH.shape[0], 1, -1)
        hidden_IPH = torch.cat((class_I1H, patches_IPH + self._at_run_size(positions_PH[1:])), dim=1)
        return self.pre_norm(hidden_IPH)

    def _at_run_size(self, positions_PH: Tensor) -> Tensor:
        """The table at the resolution of the run: bicubic, corners not aligned, not antialiased, like transformers."""
        table_side, side = self.pretrained_side, self.config.patches_per_side
        if side == table_side:
            return positions_PH
        table_1HYX = positions_PH.view(1, table_side, table_side, -1).permute(0, 3, 1, 2)
        exact = torch.promote_types(positions_PH.dtype, torch.float32)  # a bf16 kernel would round every partial sum
        table_1HYX = F.interpolate(table_1HYX.to(exact), size=(side, side), mode="bicubic", align_corners=False)
        return table_1HYX.flatten(2).transpose(1, 2)[0].to(positions_PH.dtype)

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Weights by fan-in; outputs that add to the residual stream shrunk by its depth; biases 0, norms 1."""

        def draw(weight: Tensor, std: float) -> None:
            nn.init.normal_(weight, std=std, generator=generator)

        width, depth = self.config.hidden_size, max(1, len(self.layers))
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        draw(self.patch_embedding.weight, self.patch_embedding.weight[0].numel() ** -0.5)
        if self.patch_embedding.bias is not None:
            nn.init.zeros_(self.patch_embedding.bias)
        draw(self.position_embedding, 0.02)
        if self.class_embedding is not None:
            draw(self.class_embedding, width**-0.5)
        for layer in self.layers:
            for linear in (layer.qkv, layer.fc1):
                draw(linear.weight, linear.in_features**-0.5)
            for linear in (layer.out, layer.fc2):
                draw(linear.weight, (2 * depth * linear.in_features) ** -0.5)
            for linear in (layer.qkv, layer.fc1, layer.out, layer.fc2):
                nn.init.zeros_(linear.bias)


def build_vision(
    config: VisionConfig,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    device: torch.device | None = None,
    recompute: bool = False,
    tp_group: torch.distributed.ProcessGroup | None = None,
) -> VisionEncoder:
    """The encoder of a configuration; see ``VisionEncoder``."""
    return VisionEncoder(config, dtype, seed=seed, device=device, recompute=recompute, tp_group=tp_group)
