"""Floating-point operations of the model, by arithmetic. No torch.

A multiply-add counts two. Backward is counted as twice the forward where parameters learn. Attention is counted for
causal documents of the given length; on the windowed layers a token sees at most the window.
"""

from __future__ import annotations

from megatron_medgpt.config.schema import LanguageConfig, ModelConfig, VisionConfig


def language_flops_per_token(config: LanguageConfig, document_length: int) -> float:
    """Forward FLOPs of one token, head included (the active experts only)."""
    h, d, a, q = config.hidden_size, config.head_dim, config.num_attention_heads, config.num_query_groups
    projections = 2 * h * d * (a + 2 * q) + 2 * a * d * h
    experts = config.num_experts_per_token * 2 * 3 * h * config.expert_hidden_size
    router = 2 * h * config.num_experts
    mean_full = (document_length + 1) / 2
    window = min(config.sliding_window, document_length)
    mean_window = window - window * (window - 1) / (2 * document_length)
    windowed_layers = (config.num_layers + 1) // 2
    scores = 4 * a * d * (windowed_layers * mean_window + (config.num_layers - windowed_layers) * mean_full)
    return config.num_layers * (projections + experts + router) + scores + 2 * h * config.vocab_size


def vision_flops_per_image(config: VisionConfig) -> float:
    """Forward FLOPs of one image through the layers that are run."""
    num_layers = config.num_layers + 1 + config.feature_layer
    p, h = config.patches_per_side**2 + (config.kind == "clip"), config.hidden_size
    layer = 2 * p * (4 * h * h + 2 * h * config.mlp_hidden_size) + 4 * p * p * h
    return num_layers * layer + 2 * p * h * 3 * config.patch_size_px**2


def projector_flops_per_image(config: ModelConfig) -> float:
    fold, h = config.projector.pixel_shuffle**2, config.language.hidden_size
    middle = config.projector.hidden_size or h
    return 2 * config.tokens_per_image * (config.vision.hidden_size * fold * middle + middle * h)


def training_flops(
    config: ModelConfig, *, num_tokens: float, num_images: float, document_length: int, frozen: tuple[str, ...] = (),
    target_share: float = 1.0,
) -> float:  # fmt: skip
    """FLOPs of forward and backward over ``num_tokens`` positions and ``num_images`` images.

    A frozen encoder has no backward. A frozen language model still passes gradients down to the projector, so it
    costs one backward (inputs) instead of two (inputs and weights); so do frozen experts. Only positions that are
    targets (``target_share``) go through the head.
    """
    c = config.language
    experts = c.num_layers * c.num_experts_per_token * 6.0 * c.hidden_size * c.expert_hidden_size
    head = 2.0 * c.hidden_size * c.vocab_size
    dense = language_flops_per_token(c, document_length) - experts - head
    dense_passes, expert_passes = (2.0 if name in frozen else 3.0 for name in ("language", "experts"))
    language = dense_passes * (dense + target_share * head) + expert_passes * experts
    encoder = 1.0 if "encoder" in frozen else 3.0
    return (
        language * num_tokens
        + encoder * num_images * vision_flops_per_image(config.vision)
        + 3.0 * num_images * projector_flops_per_image(config)
    )
