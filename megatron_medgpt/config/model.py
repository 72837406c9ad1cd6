"""Section ``model``: the shapes of the language model, the vision encoder and the projector between them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_medgpt.config.checks import not_negative, positive, require


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """Shape of a GPT-oss language model. The defaults are GPT-oss 20B (openai/gpt-oss ``gpt_oss/torch/model.py``)."""

    num_layers: int = 24
    hidden_size: int = 2880
    num_attention_heads: int = 64
    num_query_groups: int = 8
    head_dim: int = 64
    num_experts: int = 32
    num_experts_per_token: int = 4
    expert_hidden_size: int = 2880
    vocab_size: int = 201_088
    sliding_window: int = 128
    """Positions a token sees on the windowed layers (0, 2, 4, ...), itself included."""
    norm_eps: float = 1e-5
    swiglu_limit: float = 7.0
    rope_base: float = 150_000.0
    yarn_factor: float = 32.0
    yarn_original_length: int = 4096
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    max_length: int = 131_072
    init_std: float = 0.02

    def __post_init__(self) -> None:
        positive(
            "model.language",
            num_layers=self.num_layers, hidden_size=self.hidden_size, num_attention_heads=self.num_attention_heads,
            num_query_groups=self.num_query_groups, head_dim=self.head_dim, num_experts=self.num_experts,
            num_experts_per_token=self.num_experts_per_token, expert_hidden_size=self.expert_hidden_size,
            vocab_size=self.vocab_size, sliding_window=self.sliding_window, norm_eps=self.norm_eps,
            swiglu_limit=self.swiglu_limit, yarn_factor=self.yarn_factor,
            yarn_original_length=self.yarn_original_length, yarn_beta_fast=self.yarn_beta_fast,
            yarn_beta_slow=self.yarn_beta_slow, max_length=self.max_length,
        )  # fmt: skip
        not_negative("model.language", init_std=self.init_std)
        require(self.rope_base > 1, f"model.language.rope_base is {self.rope_base}; it must be greater than 1")
        require(
            self.num_attention_heads % self.num_query_groups == 0,
            f"model.language.num_query_groups={self.num_query_groups} does not divide "
            f"num_attention_heads={self.num_attention_heads}",
        )
        require(self.head_dim % 2 == 0, f"model.language.head_dim={self.head_dim} must be even (rotary halves)")
        require(
            self.num_experts_per_token <= self.num_experts,
            f"model.language.num_experts_per_token={self.num_experts_per_token} exceeds num_experts={self.num_experts}",
        )


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Shape of a vision encoder. The defaults are CLIP ViT-L/14-336; ``kind: siglip`` is SigLIP so400m (MedSigLIP)."""

    kind: Literal["clip", "siglip"] = "clip"
    num_layers: int = 24
    hidden_size: int = 1024
    num_attention_heads: int = 16
    mlp_hidden_size: int = 4096
    image_size_px: int = 336
    """Resolution the model is run at."""
    pretrained_size_px: int = 336
    """Resolution of the position table in the weights; interpolated (bicubic) where it differs from the one above."""
    patch_size_px: int = 14
    norm_eps: float = 1e-5
    feature_layer: int = -2
    """Which hidden state is the feature: -1 the last layer's output before any post-norm, -2 the one before it."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self) -> None:
        require(self.kind in ("clip", "siglip"), f"model.vision.kind={self.kind!r}; allowed: clip, siglip")
        positive(
            "model.vision",
            num_layers=self.num_layers, hidden_size=self.hidden_size, num_attention_heads=self.num_attention_heads,
            mlp_hidden_size=self.mlp_hidden_size, patch_size_px=self.patch_size_px, norm_eps=self.norm_eps,
            std=min(self.std),
        )  # fmt: skip
        require(
            self.hidden_size % self.num_attention_heads == 0,
            f"model.vision.num_attention_heads={self.num_attention_heads} does not divide "
            f"hidden_size={self.hidden_size}",
        )
        for name in ("image_size_px", "pretrained_size_px"):
            size = getattr(self, name)
            require(
                size >= self.patch_size_px,
                f"model.vision.{name}={size} is smaller than one patch of {self.patch_size_px} px",
            )
        require(
            -self.num_layers - 1 <= self.feature_layer <= -1,
            f"model.vision.feature_layer={self.feature_layer}; allowed: -1 to {-self.num_layers - 1}",
        )

    @property
    def patches_per_side(self) -> int:
        return self.image_size_px // self.patch_size_px


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """LLaVA's two-layer GELU MLP from encoder features to the language model's hidden size."""

    pixel_shuffle: int = 1
    """2 folds every 2x2 patches into one image token (four times fewer tokens)."""
    norm: bool = False
    """LayerNorm over the (shuffled) row in front of the first layer, as InternVL's projector has it. LLaVA's layout has
    neither norm nor pixel shuffle, so such a projector is exported alone (``--part projector``)."""
    hidden_size: int | None = None
    """Width between the two layers; the language model's hidden size when not given."""

    def __post_init__(self) -> None:
        require(self.pixel_shuffle in (1, 2), f"model.projector.pixel_shuffle={self.pixel_shuffle}; allowed: 1, 2")
        if self.hidden_size is not None:
            positive("model.projector", hidden_size=self.hidden_size)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    language: LanguageConfig = field(default_factory=LanguageConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)

    def __post_init__(self) -> None:
        side, fold = self.vision.patches_per_side, self.projector.pixel_shuffle
        require(
            side % fold == 0,
            f"model.projector.pixel_shuffle={fold} does not divide the encoder's {side} patches a side; set it to 1",
        )

    @property
    def tokens_per_image(self) -> int:
        """Positions of the sequence that one image becomes."""
        return (self.vision.patches_per_side // self.projector.pixel_shuffle) ** 2
