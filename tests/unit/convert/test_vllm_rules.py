"""An export as vLLM reads it, as far as its published rules tell without running it.

The rules (vllm-project/vllm, ``vllm/model_executor/models``): ``llava.py`` (weight mapper, tower up to the feature
layer without its post-norm, pixels of ``vision_config.image_size``), ``gpt_oss.py`` (weight mapper, YaRN fields,
``quantization_config`` of its own section), ``clip.py`` and ``siglip.py`` (parameters, image tokens), ``utils.py``
(how a mapper is applied). They are written down here as data; nothing of vLLM is imported.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_medgpt.config.schema import ModelConfig
from megatron_medgpt.convert.megatron_to_hf import export_hf
from megatron_medgpt.convert.safetensor import SafetensorsFolder, read_json
from tests.published_models import CLIP, SIGLIP, random_weights, write_checkpoint
from tests.small_data import small_tokenizer

LLAVA_PREFIXES = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "lm_head.": "language_model.lm_head.",
}
GPT_OSS_PARTS = {".self_attn.": ".attn."}
GPT_OSS_SUFFIXES = {
    ".embed_tokens.weight": ".embedding.weight",
    ".gate_up_proj_blocks": ".w13_weight", ".down_proj_blocks": ".w2_weight",
    ".gate_up_proj_scales": ".w13_weight_scale", ".down_proj_scales": ".w2_weight_scale",
    ".gate_up_proj": ".w13_weight", ".down_proj": ".w2_weight",
    ".gate_up_proj_bias": ".w13_bias", ".down_proj_bias": ".w2_bias",
}  # fmt: skip
STACKED = {".q_proj.": ".qkv_proj.", ".k_proj.": ".qkv_proj.", ".v_proj.": ".qkv_proj."}
"""One fused parameter for three tensors, in the language model and in both towers."""


def _replaced(name: str, pairs: dict[str, str]) -> str:
    for old, new in pairs.items():
        name = name.replace(old, new)
    return name


def vllm_name(name: str) -> str:
    """Parameter of vLLM's model that a tensor of a LLaVA folder goes to."""
    for old, new in LLAVA_PREFIXES.items():
        if name.startswith(old):
            name = new + name[len(old) :]
    if name.startswith("language_model."):
        name = _replaced(name, GPT_OSS_PARTS)
        for old, new in GPT_OSS_SUFFIXES.items():
            if name.endswith(old):
                name = name[: -len(old)] + new
    return _replaced(name, STACKED)


def vllm_parameters(config: ModelConfig, num_tower_layers: int, *, packed: bool) -> set[str]:
    """Parameters that vLLM builds and wants filled."""
    both = ("weight", "bias")
    names = {f"multi_modal_projector.linear_{n}.{leaf}" for n in (1, 2) for leaf in both}
    names |= {f"language_model.{name}.weight" for name in ("model.embedding", "model.norm", "lm_head")}
    for layer in range(config.language.num_layers):
        here = f"language_model.model.layers.{layer}."
        names |= {here + f"{norm}.weight" for norm in ("input_layernorm", "post_attention_layernorm")}
        names |= {
            here + f"{linear}.{leaf}" for linear in ("attn.qkv_proj", "attn.o_proj", "mlp.router") for leaf in both
        }
        names |= {here + "attn.sinks"}
        experts = ["w13_weight", "w2_weight", "w13_bias", "w2_bias"]
        experts += ["w13_weight_scale", "w2_weight_scale"] if packed else []
        names |= {here + f"mlp.experts.{leaf}" for leaf in experts}
    tower = "vision_tower.vision_model."
    names |= {tower + f"embeddings.{leaf}.weight" for leaf in ("patch_embedding", "position_embedding")}
    if config.vision.kind == "clip":
        names |= {tower + "embeddings.class_embedding"} | {tower + f"pre_layrnorm.{leaf}" for leaf in both}
    else:
        names |= {tower + "embeddings.patch_embedding.bias"}
    for layer in range(num_tower_layers):
        modules = ("self_attn.qkv_proj", "self_attn.out_proj", "layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2")
        names |= {tower + f"encoder.layers.{layer}.{module}.{leaf}" for module in modules for leaf in both}
    return names


@pytest.fixture(scope="module", params=["clip", "siglip"])
def exports(request, tmp_path_factory):
    """(configuration, {dtype: exported folder}) for both towers; SigLIP is run at another size than its own."""
    config = CLIP if request.param == "clip" else replace(SIGLIP, vision=replace(SIGLIP.vision, image_size_px=84))
    folder = tmp_path_factory.mktemp(request.param)
    small_tokenizer(folder / "tokenizer")
    checkpoint = write_checkpoint(folder / "checkpoint", config, random_weights(config))
    for dtype in ("bf16", "mxfp4"):
        export_hf(checkpoint, folder / dtype, tokenizer=folder / "tokenizer", dtype=dtype)
    return config, {dtype: folder / dtype for dtype in ("bf16", "mxfp4")}


@pytest.mark.parametrize("dtype", ["bf16", "mxfp4"])
def test_every_tensor_has_its_parameter_in_vllm_and_every_parameter_its_tensor(exports, dtype):
    config, folders = exports
    values = read_json(folders[dtype] / "config.json")
    feature, layers = values["vision_feature_layer"], values["vision_config"]["num_hidden_layers"]
    built = layers + feature + 1 if feature < 0 else feature
    found = {}
    for name in SafetensorsFolder(folders[dtype]).names:
        found.setdefault(vllm_name(name), []).append(name)
    unused = {name for name in found if ".post_layernorm." in name}  # vLLM leaves these two out by name
    assert unused == {f"vision_tower.vision_model.post_layernorm.{leaf}" for leaf in ("weight", "bias")}
    assert found.keys() - unused == vllm_parameters(config, built, packed=dtype == "mxfp4")
    assert all(len(names) == (3 if ".qkv_proj." in name else 1) for name, names in found.items())


@pytest.mark.parametrize("dtype", ["bf16", "mxfp4"])
def test_shapes_are_the_ones_that_vllms_gpt_oss_loader_cuts(exports, dtype):
    """It views packed blocks as (E, 2 * inner, -1) and (E, -1, inner / 2) and takes plain ones as (E, in, out)."""
    config, folders = exports
    files, language = SafetensorsFolder(folders[dtype]), config.language
    here, experts = "language_model.model.layers.0.mlp.experts.", language.num_experts
    hidden, inner = language.hidden_size, language.expert_hidden_size
    if dtype == "bf16":
        assert files.spec(here + "gate_up_proj").shape == (experts, hidden, 2 * inner)
        assert files.spec(here + "down_proj").shape == (experts, inner, hidden)
    else:
        assert files.tensor(here + "gate_up_proj_blocks").reshape(experts, 2 * inner, -1).shape[-1] == hidden // 2
        assert files.tensor(here + "down_proj_blocks").reshape(experts, -1, inner // 2).shape[1] == hidden
        assert files.spec(here + "gate_up_proj_scales").dtype == torch.uint8


@pytest.mark.parametrize("dtype", ["bf16", "mxfp4"])
def test_the_configuration_has_every_field_that_vllm_reads(exports, dtype):
    config, folders = exports
    values = read_json(folders[dtype] / "config.json")
    assert values["architectures"] == ["LlavaForConditionalGeneration"]
    assert values["projector_hidden_act"] == "gelu" and values["multimodal_projector_bias"] is True
    assert isinstance(values["vision_feature_layer"], int)
    text = values["text_config"]
    assert text["architectures"] == ["GptOssForCausalLM"]  # which class the language model becomes
    assert text["rope_theta"] == config.language.rope_base
    for name in ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"):
        assert text["rope_scaling"][name] == text["rope_parameters"][name]
    packed = {"quant_method": "mxfp4"}
    for section in (values, text):  # GptOssModel.load_weights asks its own section, the engine the whole model's
        stated = section.get("quantization_config", {})
        assert {"quant_method": stated.get("quant_method")} == (packed if dtype == "mxfp4" else {"quant_method": None})


def test_image_tokens_counted_by_vllm_are_the_processors_and_ours(exports):
    """By ``CLIPEncoderInfo`` and ``SiglipEncoderInfo``, after the select strategy."""
    config, folders = exports
    values, vision = read_json(folders["bf16"] / "config.json"), None
    vision = values["vision_config"]
    side = vision["image_size"] // vision["patch_size"]
    encoder = side**2 + (vision["model_type"] == "clip_vision_model")
    counted = encoder - {"default": 1, "full": 0}[values["vision_feature_select_strategy"]]
    assert counted == values["image_seq_length"] == config.tokens_per_image
    pixels = read_json(folders["bf16"] / "preprocessor_config.json")
    assert pixels["size"] == pixels["crop_size"] == {"height": vision["image_size"], "width": vision["image_size"]}
    processor = read_json(folders["bf16"] / "processor_config.json")
    assert processor["patch_size"] == vision["patch_size"]
    assert processor["vision_feature_select_strategy"] == values["vision_feature_select_strategy"]
