"""Named model shapes. ``LANGUAGE``, ``VISION``: the public models and the small ones for tests and the demo."""

from __future__ import annotations

from dataclasses import replace

from megatron_medgpt.config.schema import LanguageConfig, VisionConfig

GPT_OSS_20B = LanguageConfig()
GPT_OSS_120B = replace(GPT_OSS_20B, num_layers=36, num_experts=128)

TINY = LanguageConfig(
    num_layers=4, hidden_size=64, num_attention_heads=8, num_query_groups=2, head_dim=16, num_experts=8,
    num_experts_per_token=2, expert_hidden_size=64, vocab_size=512, sliding_window=16, yarn_original_length=64,
    max_length=2048,
)  # fmt: skip
"""Every feature of GPT-oss at a size that a test runs in milliseconds; odd enough that layouts cannot be confused."""

CLIP_L_14_336 = VisionConfig()
SIGLIP_HALF = (0.5, 0.5, 0.5)
MEDSIGLIP_448 = VisionConfig(
    kind="siglip", num_layers=27, hidden_size=1152, num_attention_heads=16, mlp_hidden_size=4304, image_size_px=448,
    pretrained_size_px=448, patch_size_px=14, norm_eps=1e-6, feature_layer=-1, mean=SIGLIP_HALF, std=SIGLIP_HALF,
)  # fmt: skip
TINY_CLIP = VisionConfig(
    num_layers=3, hidden_size=48, num_attention_heads=4, mlp_hidden_size=96, image_size_px=56, pretrained_size_px=56,
)  # fmt: skip
TINY_SIGLIP = VisionConfig(
    kind="siglip", num_layers=3, hidden_size=48, num_attention_heads=4, mlp_hidden_size=88, image_size_px=56,
    pretrained_size_px=56, norm_eps=1e-6, feature_layer=-1, mean=SIGLIP_HALF, std=SIGLIP_HALF,
)  # fmt: skip

LANGUAGE = {"gpt-oss-20b": GPT_OSS_20B, "gpt-oss-120b": GPT_OSS_120B, "tiny": TINY}
VISION = {
    "clip-l-14-336": CLIP_L_14_336, "medsiglip-448": MEDSIGLIP_448, "tiny-clip": TINY_CLIP, "tiny-siglip": TINY_SIGLIP,
}  # fmt: skip
