"""What our modules keep for the backward pass, in bytes, by arithmetic. No torch.

Each term is one tensor that autograd holds; ``tests/unit/parallel/test_activations`` adds up the tensors that a real
chunk saves and compares. Sizes are per rank: ``tokens`` is a micro-batch, ``local`` the slice of it that a tensor rank
holds between the layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_medgpt.config.schema import LanguageConfig, ModelConfig, VisionConfig

WIDE = 4
"""Norms, router and loss compute in fp32 at least."""
ATTENTION = ("flex", "fused_cpu")


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Sizes of one micro-batch that memory and time depend on."""

    tokens: int
    targets: int
    """Only rows with a target go through the head."""
    images: float
    """Images of the micro-batch; a tensor rank encodes its share."""
    rows: int = 1


def layer_bytes(
    c: LanguageConfig, batch: MicroBatch, *, bytes_per_value: int, tensor: int, attention: str = "flex",
    routed_share: float = 1.0,
) -> int:  # fmt: skip
    """One decoder layer without recomputation.

    Args:
        routed_share: rows that this rank's experts receive, over the mean of the ranks.
    """
    b, tokens, local = bytes_per_value, batch.tokens, batch.tokens / tensor
    heads, groups = c.num_attention_heads * c.head_dim / tensor, c.num_query_groups * c.head_dim / tensor
    norms = 2 * local * (2 * WIDE * c.hidden_size + WIDE)  # input in fp32, normalised in fp32, 1 / rms
    attention_in = local * c.hidden_size * b  # linear_qkv keeps its slice and gathers again
    if attention == "flex":
        # query and key rotated; the value, a view that keeps all of linear_qkv's output; output without and with sink
        core = tokens * b * (heads + groups + (heads + 2 * groups) + 2 * heads)
        core += tokens * c.num_attention_heads / tensor * (WIDE + b)  # log-sum-exp, share of the sink
    else:
        core = tokens * b * 4 * heads  # query, key and value repeated for every head, output
        core += tokens * c.num_attention_heads / tensor * WIDE
    routing = local * (c.hidden_size * b + c.num_experts * (1 + b))  # router input; map and weights by expert
    routing += local * c.num_experts_per_token * (8 + WIDE + 8)  # chosen ids, their softmax, order of the rows
    routed = local * c.num_experts_per_token * routed_share
    # permuted rows, gate and up before the activation, activated, output before its weight, weight
    experts = routed * b * (c.hidden_size + 2 * c.expert_hidden_size + c.expert_hidden_size + c.hidden_size + 1)
    return int(norms + attention_in + core + routing + experts)


def layer_input_bytes(c: LanguageConfig, batch: MicroBatch, *, bytes_per_value: int, tensor: int) -> int:
    """What is left of a layer that recomputes itself."""
    return int(batch.tokens / tensor * c.hidden_size * bytes_per_value)


def head_bytes(c: LanguageConfig, batch: MicroBatch, *, bytes_per_value: int, tensor: int) -> int:
    """Final norm, head and loss: kept from the forward to the backward pass of the last stage."""
    local, b = batch.tokens / tensor, bytes_per_value
    norm = local * (2 * WIDE * c.hidden_size + WIDE)
    gathered = 0.0 if tensor == 1 else batch.tokens * c.hidden_size * b
    logits = batch.targets * (c.hidden_size * b + c.vocab_size / tensor * b + 2 * WIDE + 3 * 8)
    return int(norm + gathered + logits)


def loss_peak_bytes(c: LanguageConfig, batch: MicroBatch, *, bytes_per_value: int, tensor: int) -> int:
    """What the loss needs for a moment on top: the gradient of the logits in fp32, its copy in the model's dtype and a
    temporary of the exponential."""
    return int(batch.targets * (c.vocab_size / tensor) * (2 * WIDE + bytes_per_value))


def vision_bytes(model: ModelConfig, batch: MicroBatch, *, bytes_per_value: int, tensor: int, frozen: bool) -> int:
    """Encoder and projector for the images of one tensor rank. A frozen encoder keeps nothing."""
    v, b, images = model.vision, bytes_per_value, batch.images / tensor
    rows = images * model.tokens_per_image
    width_in = v.hidden_size * model.projector.pixel_shuffle**2
    middle = model.projector.hidden_size or model.language.hidden_size
    norm = width_in + 2 * WIDE / b if model.projector.norm else 0  # its input beside its output; mean and deviation
    projector = rows * b * (norm + width_in + 2 * middle)  # features, before and after the GELU
    if frozen:
        return int(projector)
    places = v.patches_per_side**2 + (v.kind == "clip")
    num_layers = v.num_layers + 1 + v.feature_layer
    pixels = 3 * v.image_size_px**2 * b
    pre_norm = places * (v.hidden_size + 2) * b if v.kind == "clip" else 0
    layers = num_layers * places * (_vision_layer_values(v) * b + WIDE * v.num_attention_heads)
    return int(projector + images * (pixels + pre_norm + layers))


def _vision_layer_values(v: VisionConfig) -> int:
    """Values per place: inputs, outputs and statistics of two norms, q, k, v, attention output, MLP."""
    activation = 3 if v.kind == "clip" else 2  # x * sigmoid(1.702 x) keeps x, the sigmoid and the product
    return 2 * (2 * v.hidden_size + 2) + 4 * v.hidden_size + activation * v.mlp_hidden_size
