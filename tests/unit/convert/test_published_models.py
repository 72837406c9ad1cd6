"""The public models by their published names, shapes and configuration, without their weights."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megatron_medgpt.config.errors import UsageError, WorkError
from megatron_medgpt.config.presets import CLIP_L_14_336, GPT_OSS_20B, GPT_OSS_120B, MEDSIGLIP_448
from megatron_medgpt.convert.configuration import (
    language_from_original,
    language_from_published,
    vision_from_published,
)
from megatron_medgpt.convert.hf_to_megatron import plan_import
from megatron_medgpt.convert.mapped import TensorSpec
from megatron_medgpt.convert.safetensor import DTYPE_NAMES, read_json
from megatron_medgpt.convert.source import open_published
from tests.published_models import CLIP, SIGLIP, random_weights, write_folder, write_gpt_oss, write_tower

GPT_OSS_CONFIG = {
    "model_type": "gpt_oss", "num_hidden_layers": 24, "hidden_size": 2880, "num_attention_heads": 64,
    "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4,
    "intermediate_size": 2880, "vocab_size": 201088, "sliding_window": 128, "rms_norm_eps": 1e-05,
    "swiglu_limit": 7.0, "max_position_embeddings": 131072, "initializer_range": 0.02, "attention_bias": True,
    "hidden_act": "silu", "tie_word_embeddings": False, "initial_context_length": 4096, "rope_theta": 150000,
    "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "rope_type": "yarn", "truncate": False,
                     "original_max_position_embeddings": 4096},
    "layer_types": ["sliding_attention", "full_attention"] * 12, "attention_dropout": 0.0, "use_cache": True,
    "architectures": ["GptOssForCausalLM"], "quantization_config": {"quant_method": "mxfp4"},
}  # fmt: skip
"""openai/gpt-oss-20b ``config.json``."""

MODELS = {
    "gpt-oss-20b": (GPT_OSS_20B, 24, 32, 459, 13_761_264_768),
    "gpt-oss-120b": (GPT_OSS_120B, 36, 128, 687, 65_248_815_744),
}
"""Our preset; layers and experts; tensors and ``metadata.total_size`` of the public model.safetensors.index.json."""


def public_tensors(num_layers: int, num_experts: int) -> dict[str, TensorSpec]:
    """Names, shapes and dtypes of the public MXFP4 release."""
    bf16, packed, hidden, e = torch.bfloat16, torch.uint8, 2880, num_experts
    layer = {
        "input_layernorm.weight": ((hidden,), bf16), "post_attention_layernorm.weight": ((hidden,), bf16),
        "self_attn.q_proj.weight": ((4096, hidden), bf16), "self_attn.q_proj.bias": ((4096,), bf16),
        "self_attn.k_proj.weight": ((512, hidden), bf16), "self_attn.k_proj.bias": ((512,), bf16),
        "self_attn.v_proj.weight": ((512, hidden), bf16), "self_attn.v_proj.bias": ((512,), bf16),
        "self_attn.o_proj.weight": ((hidden, 4096), bf16), "self_attn.o_proj.bias": ((hidden,), bf16),
        "self_attn.sinks": ((64,), bf16), "mlp.router.weight": ((e, hidden), bf16), "mlp.router.bias": ((e,), bf16),
        "mlp.experts.gate_up_proj_blocks": ((e, 5760, 90, 16), packed),
        "mlp.experts.gate_up_proj_scales": ((e, 5760, 90), packed),
        "mlp.experts.gate_up_proj_bias": ((e, 5760), bf16),
        "mlp.experts.down_proj_blocks": ((e, 2880, 90, 16), packed),
        "mlp.experts.down_proj_scales": ((e, 2880, 90), packed), "mlp.experts.down_proj_bias": ((e, hidden), bf16),
    }  # fmt: skip
    found = {"model.embed_tokens.weight": ((201_088, hidden), bf16), "model.norm.weight": ((hidden,), bf16)}
    found["lm_head.weight"] = ((201_088, hidden), bf16)
    for number in range(num_layers):
        found.update({f"model.layers.{number}.{name}": spec for name, spec in layer.items()})
    return {name: TensorSpec(*spec) for name, spec in found.items()}


def _write_empty(folder, specs, config):
    """Files with the right headers whose content is a hole: no disk is used."""
    import json

    folder.mkdir()
    header, place = {}, 0
    for name, spec in specs.items():
        end = place + spec.num_bytes
        header[name] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": spec.shape, "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + place)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("model", MODELS)
def test_every_public_tensor_has_its_row_and_the_sizes_are_the_published_ones(tmp_path, model):
    preset, layers, experts, num_tensors, total_size = MODELS[model]
    specs = public_tensors(layers, experts)
    assert len(specs) == num_tensors
    assert sum(spec.num_bytes for spec in specs.values()) == total_size
    config = {
        **GPT_OSS_CONFIG, "num_hidden_layers": layers, "num_local_experts": experts,
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
    }  # fmt: skip
    folder = _write_empty(tmp_path / "m", specs, config)
    plan = plan_import(folder, new_vision="clip-l-14-336")
    assert plan.config.language == preset
    assert plan.config.vision == CLIP_L_14_336
    assert not plan.unused
    language = {n: s for n, s in plan.specs.items() if n.startswith("language.")}
    # Blocks and scales of 4.25 bits become 16 bits; everything else keeps its size.
    packed = sum(s.num_bytes for n, s in specs.items() if n.endswith(("_blocks", "_scales")))
    assert sum(s.num_bytes for s in language.values()) == total_size - packed + packed * 16 * 8 // 34
    kept = plan_import(folder, new_vision="clip-l-14-336", keep_packed=True)
    assert sum(s.num_bytes for n, s in kept.specs.items() if n.startswith("language.")) == total_size


@pytest.mark.parametrize("spelling", ["transformers 4", "transformers 5"])
def test_both_spellings_of_the_configuration_give_the_preset(spelling):
    values = dict(GPT_OSS_CONFIG)
    if spelling == "transformers 5":
        values["rope_parameters"] = {**values.pop("rope_scaling"), "rope_theta": values.pop("rope_theta")}
    assert language_from_published(values, "config.json") == GPT_OSS_20B


def test_openai_own_configuration_gives_the_preset():
    values = {
        "num_hidden_layers": 36, "num_experts": 128, "experts_per_token": 4, "vocab_size": 201088, "hidden_size": 2880,
        "intermediate_size": 2880, "swiglu_limit": 7.0, "head_dim": 64, "num_attention_heads": 64,
        "num_key_value_heads": 8, "sliding_window": 128, "initial_context_length": 4096, "rope_theta": 150000,
        "rope_scaling_factor": 32.0, "rope_ntk_alpha": 1, "rope_ntk_beta": 32,
    }  # fmt: skip
    assert language_from_original(values, "config.json") == GPT_OSS_120B


@pytest.mark.parametrize(
    "change",
    [
        {"attention_bias": False}, {"hidden_act": "gelu"}, {"tie_word_embeddings": True}, {"hidden_size": "2880"},
        {"layer_types": ["full_attention"] * 24}, {"rope_scaling": {"rope_type": "linear", "factor": 2}},
        {"rope_scaling": {**GPT_OSS_CONFIG["rope_scaling"], "truncate": True}}, {"num_key_value_heads": True},
    ],
    ids=str,
)  # fmt: skip
def test_a_configuration_that_our_model_does_not_compute_is_refused(change):
    with pytest.raises(UsageError, match=next(iter(change)).split("_scaling")[0]):
        language_from_published({**GPT_OSS_CONFIG, **change}, "config.json")


def test_public_towers_give_the_presets():
    clip = {
        "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "num_attention_heads": 16,
        "num_hidden_layers": 24, "patch_size": 14, "model_type": "clip_vision_model",
    }  # fmt: skip
    assert vision_from_published(clip, "clip", "") == CLIP_L_14_336
    siglip = {
        "hidden_size": 1152, "image_size": 448, "intermediate_size": 4304, "num_attention_heads": 16,
        "num_hidden_layers": 27, "patch_size": 14, "model_type": "siglip_vision_model",
    }  # fmt: skip
    assert vision_from_published(siglip, "siglip", "") == MEDSIGLIP_448


@pytest.mark.parametrize("config", [CLIP, SIGLIP], ids=["clip", "siglip"])
@pytest.mark.parametrize("full", [False, True], ids=["tower", "full model"])
def test_a_tower_is_found_alone_and_inside_a_full_model(tmp_path, config, full):
    weights = random_weights(config)
    language = write_gpt_oss(tmp_path / "l", config, weights)
    plan = plan_import(language, vision=write_tower(tmp_path / "v", config, weights, full=full))
    assert plan.config.vision == config.vision
    behind = config.vision.num_layers - (config.vision.num_layers + 1 + config.vision.feature_layer)
    assert len(plan.unused) == 16 * behind + 2 + 2 * full


def test_a_missing_tower_must_be_asked_for(tmp_path):
    language = write_gpt_oss(tmp_path / "l", CLIP, random_weights(CLIP))
    with pytest.raises(UsageError, match=r"--vision DIR.*--new-vision"):
        plan_import(language)
    with pytest.raises(UsageError, match="holds no CLIP or SigLIP"):
        plan_import(language, vision=language)
    with pytest.raises(UsageError, match="allowed: clip-l-14-336"):
        plan_import(language, new_vision="resnet")


@pytest.mark.parametrize(
    ("name", "tensor", "error", "message"),
    [
        ("model.layers.0.mlp.extra", torch.ones(1), WorkError, r"holds 1 tensors.*model\.layers\.0\.mlp\.extra"),
        ("model.norm.weight", None, WorkError, r"lacks 1 of.*model\.norm\.weight"),
        ("model.norm.weight", torch.ones(63), UsageError, r"shape \[63\], config.json makes it \[64\]"),
        ("model.norm.weight", torch.ones(64).int(), UsageError, "torch.int32"),
    ],
    ids=["unknown", "missing", "shape", "dtype"],
)
def test_a_tensor_that_does_not_fit_is_refused_by_name(tmp_path, name, tensor, error, message):
    folder = write_gpt_oss(tmp_path / "l", CLIP, random_weights(CLIP))
    found = open_published(folder).language
    tensors = {n: found.tensor(n) for n in found.names if n != name}
    tensors |= {} if tensor is None else {name: tensor}
    write_folder(tmp_path / "changed", tensors, read_json(folder / "config.json"))
    with pytest.raises(error, match=message):
        plan_import(tmp_path / "changed", new_vision="tiny-clip")


@pytest.mark.parametrize("values", [{"model_type": "llama"}, {}, {"model_type": "llava", "text_config": {}}], ids=str)
def test_another_models_folder_is_refused(tmp_path, values):
    folder = write_folder(tmp_path / "m", {"x": torch.ones(1)}, values)
    with pytest.raises(UsageError, match=r"model_type|no gpt_oss"):
        open_published(folder)


def test_the_language_model_of_internvl_is_taken_and_the_rest_is_reported(tmp_path):
    weights = random_weights(CLIP)
    language = open_published(write_gpt_oss(tmp_path / "l", CLIP, weights)).language
    for prefix, spelled in (("language_model.", str), ("", lambda n: n.replace("model.", "model.language_model.", 1))):
        tensors = {prefix + spelled(name): language.tensor(name) for name in language.names}
        tensors |= {"vision_model.embeddings.x": torch.ones(2), "mlp1.0.weight": torch.ones(2)}
        values = {"model_type": "internvl_chat", "llm_config": read_json(tmp_path / "l" / "config.json")}
        folder = write_folder(tmp_path / f"i{len(prefix)}", tensors, values)
        plan = plan_import(folder, new_vision="tiny-clip")
        assert plan.config.language == replace(CLIP.language)
        assert set(plan.unused) == {"vision_model.embeddings.x", "mlp1.0.weight"}


def test_sizes_are_counted_from_shapes():
    assert TensorSpec((3, 5), torch.bfloat16).num_bytes == math.prod((3, 5)) * 2
