"""The whole model as transformers knows it: ``LlavaForConditionalGeneration`` with GPT-oss text.

Names are the canonical ones of the llava-hf models, which transformers 4 and 5 and vLLM all read
(``language_model.model.*``, ``language_model.lm_head.weight``, ``multi_modal_projector.*``,
``vision_tower.vision_model.*``); ``canonical_name`` turns the spellings of a model in memory into them.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.config.schema import LanguageConfig, ModelConfig, VisionConfig
from megatron_medgpt.convert.gpt_oss import Experts, gpt_oss_table
from megatron_medgpt.convert.mxfp4 import ScaleRule
from megatron_medgpt.convert.table import Row, Table
from megatron_medgpt.convert.vision import vision_table

if TYPE_CHECKING:  # a second to import, for what an import of weights does not need
    from transformers import CLIPVisionConfig, GptOssConfig, LlavaConfig, SiglipVisionConfig

_SPELLINGS = (
    (re.compile(r"^model\.language_model\."), "language_model.model."),
    (re.compile(r"^lm_head\."), "language_model.lm_head."),
    (re.compile(r"^model\.(vision_tower|multi_modal_projector)\."), r"\1."),
    (re.compile(r"^vision_tower\.(?!vision_model\.)"), "vision_tower.vision_model."),
)


def canonical_name(name: str) -> str:
    """The canonical name of a tensor of a LLaVA model, whichever spelling it comes in."""
    for pattern, replacement in _SPELLINGS:
        name = pattern.sub(replacement, name)
    return name


def projector_table(*, norm: bool = False) -> Table:
    """Rows of the projector alone; the optional norm in front has InternVL's name."""
    modules = {"norm": "layer_norm"} if norm else {}
    modules |= {"linear_1": "linear_1", "linear_2": "linear_2"}
    return Table(
        tuple(
            Row(f"projector.{ours}.{leaf}", (f"multi_modal_projector.{theirs}.{leaf}",))
            for ours, theirs in modules.items()
            for leaf in ("weight", "bias")
        )
    )


def llava_table(config: ModelConfig, *, experts: Experts = "plain", rule: ScaleRule = "up") -> Table:
    """Rows of the whole model, ours as ``MedGPT`` names them.

    Args:
        experts: how the published experts are stored.
        rule: of the scales when MXFP4 is written.

    Raises:
        UsageError: the projector is of a shape that LLaVA does not have.
    """
    _require_llava_projector(config)
    vision = vision_table(config.vision, "vision.", "vision_tower.vision_model.")
    language = gpt_oss_table(config.language, "language.", "language_model.", experts=experts, rule=rule)
    return vision + projector_table() + language


def published_config(config: ModelConfig, image_token_id: int) -> LlavaConfig:
    """transformers' configuration of the model.

    Args:
        image_token_id: id of the image mark, a reserved id of the vocabulary.

    Raises:
        UsageError: the projector is of a shape that LLaVA does not have.
    """
    from transformers import LlavaConfig

    _require_llava_projector(config)
    vision = config.vision
    return LlavaConfig(
        text_config=published_language_config(config.language),
        vision_config=published_vision_config(vision),
        image_token_index=image_token_id,
        image_seq_length=config.tokens_per_image,
        vision_feature_layer=vision.feature_layer,
        vision_feature_select_strategy="default" if vision.kind == "clip" else "full",
        projector_hidden_act="gelu",
        multimodal_projector_bias=True,
        tie_word_embeddings=False,
    )


def published_language_config(language: LanguageConfig) -> GptOssConfig:
    """transformers' configuration of the language model."""
    from transformers import GptOssConfig

    config = GptOssConfig(
        num_hidden_layers=language.num_layers, hidden_size=language.hidden_size,
        num_attention_heads=language.num_attention_heads, num_key_value_heads=language.num_query_groups,
        head_dim=language.head_dim, num_local_experts=language.num_experts,
        num_experts_per_tok=language.num_experts_per_token, intermediate_size=language.expert_hidden_size,
        vocab_size=language.vocab_size, sliding_window=language.sliding_window, rms_norm_eps=language.norm_eps,
        swiglu_limit=language.swiglu_limit, max_position_embeddings=language.max_length,
        initializer_range=language.init_std, tie_word_embeddings=False,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": language.rope_base, "factor": language.yarn_factor,
            "beta_fast": language.yarn_beta_fast, "beta_slow": language.yarn_beta_slow, "truncate": False,
            "original_max_position_embeddings": language.yarn_original_length,
        },
    )  # fmt: skip
    config.architectures = ["GptOssForCausalLM"]  # vLLM picks the language model of a wrapper by it
    return config


def published_vision_config(vision: VisionConfig) -> CLIPVisionConfig | SiglipVisionConfig:
    """transformers' configuration of the vision encoder, at the resolution of its weights."""
    from transformers import CLIPVisionConfig, SiglipVisionConfig

    shape: dict[str, Any] = {
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.mlp_hidden_size,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_attention_heads,
        "image_size": vision.pretrained_size_px,
        "patch_size": vision.patch_size_px,
        "layer_norm_eps": vision.norm_eps,
    }
    if vision.kind == "clip":
        return CLIPVisionConfig(**shape, hidden_act="quick_gelu")
    return SiglipVisionConfig(**shape, hidden_act="gelu_pytorch_tanh")


def _require_llava_projector(config: ModelConfig) -> None:
    """Refuse every other projector: transformers 5.23 has no class for them that a ``config.json`` alone builds.

    InternVL's class has the norm and the shuffle but always builds its own tower: with a class token, which SigLIP
    lacks, and without a norm before the first layer, which CLIP has. LFM2-VL's shuffles, with or without a norm, but
    takes the features behind SigLIP's post-norm. Aya's and Cohere's gate; Idefics' and Mistral's have other layers.
    """
    projector = config.projector
    if projector.pixel_shuffle != 1 or projector.norm:
        raise UsageError(
            f"model.projector has pixel_shuffle={projector.pixel_shuffle} and norm={projector.norm}, which no class of "
            "transformers computes with a CLIP or SigLIP tower; train with pixel_shuffle=1 and norm=False, or export "
            "in parts (--part language, --part projector)"
        )
    if projector.hidden_size not in (None, config.language.hidden_size):
        raise UsageError(
            f"model.projector has hidden_size={projector.hidden_size}; LLaVA's layout knows only "
            f"{config.language.hidden_size}, the language model's (or not given)"
        )
