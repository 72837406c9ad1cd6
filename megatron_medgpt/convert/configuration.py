"""``config.json`` of published models, read as data: known fields become our configuration, values that our model does
not compute are refused, everything else is left alone. Nothing in it chooses code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.config.presets import CLIP_L_14_336, SIGLIP_HALF
from megatron_medgpt.config.schema import LanguageConfig, VisionConfig

_MISSING = object()

_LANGUAGE = {
    "num_layers": ("num_hidden_layers", 36),
    "hidden_size": ("hidden_size", 2880),
    "num_attention_heads": ("num_attention_heads", 64),
    "num_query_groups": ("num_key_value_heads", 8),
    "head_dim": ("head_dim", 64),
    "num_experts": ("num_local_experts", 128),
    "num_experts_per_token": ("num_experts_per_tok", 4),
    "expert_hidden_size": ("intermediate_size", 2880),
    "vocab_size": ("vocab_size", 201_088),
    "sliding_window": ("sliding_window", 128),
    "norm_eps": ("rms_norm_eps", 1e-5),
    "swiglu_limit": ("swiglu_limit", 7.0),
    "max_length": ("max_position_embeddings", 131_072),
    "init_std": ("initializer_range", 0.02),
}
"""Ours: transformers' ``GptOssConfig`` name and its default, which a file may leave out."""

_LANGUAGE_FIXED = {
    "hidden_act": "silu", "attention_bias": True, "tie_word_embeddings": False, "swiglu_alpha": 1.702,
}  # fmt: skip
"""What our model computes whatever the file says; another value is another model."""

_ORIGINAL = {
    "num_layers": "num_hidden_layers", "hidden_size": "hidden_size", "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads", "head_dim": "head_dim", "num_experts": "num_experts",
    "num_experts_per_token": "experts_per_token", "expert_hidden_size": "intermediate_size",
    "vocab_size": "vocab_size", "sliding_window": "sliding_window", "rope_base": "rope_theta",
    "yarn_factor": "rope_scaling_factor", "yarn_original_length": "initial_context_length",
    "yarn_beta_fast": "rope_ntk_beta", "yarn_beta_slow": "rope_ntk_alpha",
}  # fmt: skip
"""Ours: OpenAI's name (openai/gpt-oss ``gpt_oss/torch/model.py``, ``ModelConfig``). beta and alpha are YaRN's fast and
slow turns."""

_VISION = {
    "num_layers": ("num_hidden_layers", 12, 12),
    "hidden_size": ("hidden_size", 768, 768),
    "num_attention_heads": ("num_attention_heads", 12, 12),
    "mlp_hidden_size": ("intermediate_size", 3072, 3072),
    "patch_size_px": ("patch_size", 32, 16),
    "norm_eps": ("layer_norm_eps", 1e-5, 1e-6),
}
"""Ours: transformers' name, default of ``CLIPVisionConfig``, default of ``SiglipVisionConfig``."""
_ACTIVATION = {"clip": "quick_gelu", "siglip": "gelu_pytorch_tanh"}


def language_from_published(values: Mapping[str, Any], where: str) -> LanguageConfig:
    """Our configuration of a ``gpt_oss`` section.

    Raises:
        UsageError: the section asks for something that GPT-oss does not have.
    """
    for name, expected in _LANGUAGE_FIXED.items():
        if values.get(name, expected) != expected:
            raise UsageError(f"{where}: {name}={values[name]!r}; GPT-oss has {expected!r}")
    found = {ours: _number(values, theirs, default, where) for ours, (theirs, default) in _LANGUAGE.items()}
    if "num_experts_per_tok" not in values and "experts_per_token" in values:
        found["num_experts_per_token"] = _number(values, "experts_per_token", 4, where)
    kinds = ["sliding_attention" if layer % 2 == 0 else "full_attention" for layer in range(found["num_layers"])]
    if values.get("layer_types", kinds) != kinds:
        raise UsageError(f"{where}: layer_types are not sliding and full in turn, which is what GPT-oss has")
    return LanguageConfig(**found, **_rope(values, where))


def language_from_original(values: Mapping[str, Any], where: str) -> LanguageConfig:
    """Our configuration of OpenAI's own ``config.json``."""
    found = {ours: _number(values, theirs, _MISSING, where) for ours, theirs in _ORIGINAL.items()}
    return LanguageConfig(**found, swiglu_limit=_number(values, "swiglu_limit", 7.0, where))


def vision_from_published(
    values: Mapping[str, Any], kind: str, where: str, *, preprocessor: Mapping[str, Any] | None = None,
    feature_layer: int | None = None,
) -> VisionConfig:  # fmt: skip
    """Our configuration of a ``clip_vision_model`` or ``siglip_vision_model`` section.

    Args:
        preprocessor: ``preprocessor_config.json`` when there is one, for mean and standard deviation.
        feature_layer: where the features are taken; LLaVA's -2 for CLIP and -1 for SigLIP when not given.
    """
    activation = values.get("hidden_act", _ACTIVATION[kind])
    if activation != _ACTIVATION[kind]:
        raise UsageError(f"{where}: hidden_act={activation!r}; {kind} has {_ACTIVATION[kind]!r}")
    column = 1 if kind == "clip" else 2
    found = {ours: _number(values, entry[0], entry[column], where) for ours, entry in _VISION.items()}
    size = _number(values, "image_size", 224, where)
    default = (CLIP_L_14_336.mean, CLIP_L_14_336.std) if kind == "clip" else (SIGLIP_HALF, SIGLIP_HALF)
    mean, std = (
        tuple(float(x) for x in (preprocessor or {}).get(name, values))
        for name, values in zip(("image_mean", "image_std"), default)
    )
    layer = feature_layer if feature_layer is not None else (-2 if kind == "clip" else -1)
    return VisionConfig(
        kind=kind, image_size_px=size, pretrained_size_px=size, mean=mean, std=std, feature_layer=layer, **found
    )


def _rope(values: Mapping[str, Any], where: str) -> dict[str, float]:
    """YaRN's numbers from ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (4)."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise UsageError(f"{where}: rope_parameters is {rope!r}; expected an object")
    kind, truncate = rope.get("rope_type", rope.get("type", "yarn")), rope.get("truncate", False)
    if kind != "yarn" or truncate is not False or rope.get("mscale") or rope.get("attention_factor"):
        raise UsageError(f"{where}: rope is {dict(rope)}; GPT-oss has yarn without truncation or further factors")
    base = rope.get("rope_theta", values.get("rope_theta", 150_000.0))
    fallback = values.get("initial_context_length", 4096)
    return {
        "rope_base": float(base),
        "yarn_factor": float(rope.get("factor", 32.0)),
        "yarn_beta_fast": float(rope.get("beta_fast", 32.0)),
        "yarn_beta_slow": float(rope.get("beta_slow", 1.0)),
        "yarn_original_length": int(rope.get("original_max_position_embeddings", fallback)),
    }


def _number(values: Mapping[str, Any], name: str, default: Any, where: str) -> Any:
    value = values.get(name, default)
    if value is _MISSING:
        raise UsageError(f"{where}: {name} is missing")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(f"{where}: {name}={value!r} is not a number")
    return value
