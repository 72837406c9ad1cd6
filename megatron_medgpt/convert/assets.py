"""What stands beside the weights of an export: configuration, processor, tokenizer, chat template, model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megatron_medgpt.checkpoint.manifest import CheckpointFacts
from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.config.schema import ModelConfig, VisionConfig
from megatron_medgpt.convert.card import write_card
from megatron_medgpt.convert.llava import published_config
from megatron_medgpt.convert.mxfp4 import QuantisationError
from megatron_medgpt.data.text import IMAGE_TOKEN, IMAGE_TOKEN_IN_GPT_OSS, Tokenizer, write_tokenizer_settings

_EXTRA_END_TOKENS = ("<|call|>",)
"""Control tokens that end an answer besides ``<|return|>`` and ``<|endoftext|>``, where the tokenizer has them."""


def write_assets(
    folder: Path, config: ModelConfig, *, part: str, dtype: str, tokenizer: Path | str | None,
    evaluation: Sequence[Mapping[str, Any]] | None, facts: CheckpointFacts, checkpoint: Path,
    quantisation: Mapping[str, QuantisationError],
) -> None:  # fmt: skip
    """Write every file but the weights.

    Raises:
        UsageError: no tokenizer is known, or it does not fit the model.
    """
    card = {"dtype": dtype, "evaluation": evaluation, "facts": facts, "quantisation": quantisation}
    if part == "projector":
        alone = {"model_type": "medgpt_projector", "projector_hidden_act": "gelu", **asdict(config.projector)}
        _write_json(folder / "config.json", alone)
        write_card(folder, config, part=part, **card)
        return
    source = _tokenizer_folder(tokenizer, checkpoint)
    loaded = Tokenizer.load(source)
    if loaded.vocab_size > config.language.vocab_size:
        raise UsageError(
            f"tokenizer {source} has ids up to {loaded.vocab_size - 1}, the model's vocabulary ends at "
            f"{config.language.vocab_size - 1}; give the tokenizer the model was trained with"
        )
    _write_tokenizer(folder, source)
    ends = _end_ids(folder, loaded)
    _write_json(folder / "config.json", config_json(config, part=part, dtype=dtype, tokenizer=loaded))
    generation = {"do_sample": False, "eos_token_id": ends, "pad_token_id": loaded.pad_id}
    _write_json(folder / "generation_config.json", generation)
    if part == "whole":
        write_processor(folder, config.vision)
    write_card(folder, config, part=part, **card)


def config_json(config: ModelConfig, *, part: str, dtype: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """``config.json`` of an export.

    Rotary numbers are written in transformers 5's spelling and in 4's, which vLLM's older lines read.
    """
    vision = replace(config.vision, pretrained_size_px=config.vision.image_size_px)
    values = published_config(replace(config, vision=vision), tokenizer.image_mark_id).to_diff_dict()
    text = values["text_config"]
    rope = dict(text["rope_parameters"])
    text["rope_theta"] = rope.pop("rope_theta")
    text["rope_scaling"] = rope
    text["pad_token_id"], text["eos_token_id"] = tokenizer.pad_id, tokenizer.return_id
    names = {"fp32": "float32"}
    dtype_name = names.get(dtype, "bfloat16")
    text["dtype"] = dtype_name
    if vision.kind == "siglip":
        values["vision_config"]["vision_use_head"] = False
    values.update(architectures=["LlavaForConditionalGeneration"], dtype=dtype_name)
    result = text if part == "language" else values
    if dtype == "mxfp4":
        kept = ["self_attn", "mlp.router", "embed_tokens", "lm_head", "vision_tower", "multi_modal_projector"]
        # Both: transformers looks at the whole model's, vLLM's GPT-oss loader at its own section's.
        for section in (text, result):
            section["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    result["transformers_version"] = values["transformers_version"]
    return result


def write_processor(folder: Path, vision: VisionConfig) -> None:
    """The image processor that does what training did: pad to a square with the mean colour, resize, normalise.

    Never a centre crop: it cuts the sides off images that are not square.
    """
    size = {"height": vision.image_size_px, "width": vision.image_size_px}
    images = {
        "image_processor_type": "LlavaImageProcessor", "processor_class": "LlavaProcessor", "do_convert_rgb": True,
        "do_pad": True, "do_resize": True, "size": size, "resample": 3, "do_center_crop": False,
        # LlavaProcessor counts image tokens by the crop size, also where nothing is cropped.
        "crop_size": size, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": list(vision.mean), "image_std": list(vision.std),
    }  # fmt: skip
    clip = vision.kind == "clip"
    _write_json(folder / "preprocessor_config.json", images)
    processor = {
        "processor_class": "LlavaProcessor", "patch_size": vision.patch_size_px, "image_token": IMAGE_TOKEN,
        "vision_feature_select_strategy": "default" if clip else "full", "num_additional_image_tokens": int(clip),
    }  # fmt: skip
    _write_json(folder / "processor_config.json", processor)


def _tokenizer_folder(tokenizer: Path | str | None, checkpoint: Path) -> Path:
    """The folder given, or the one beside the checkpoint, or the one that the run names."""
    if tokenizer is not None:
        return Path(tokenizer)
    run = checkpoint.absolute().parent.parent / "run.yaml"
    if run.is_file():
        from megatron_medgpt.config.load import read_yaml

        named = read_yaml(run).get("tokenizer")
        if isinstance(named, str):
            return Path(named)
    raise UsageError(f"no tokenizer is known for {checkpoint}; name its folder with --tokenizer")


def _write_tokenizer(folder: Path, source: Path) -> None:
    """Copy tokenizer.json and name the image mark in it, which GPT-oss keeps among its reserved tokens."""
    path = source / "tokenizer.json" if source.is_dir() else source
    content = json.loads(path.read_bytes())
    names = {token.get("content") for token in content.get("added_tokens", ())}
    if IMAGE_TOKEN in names or IMAGE_TOKEN in content["model"].get("vocab", {}):
        shutil.copyfile(path, folder / "tokenizer.json")
    else:
        for token in content["added_tokens"]:
            if token["content"] == IMAGE_TOKEN_IN_GPT_OSS:
                token["content"] = IMAGE_TOKEN
        vocabulary = content["model"].get("vocab", {})
        if IMAGE_TOKEN_IN_GPT_OSS in vocabulary:
            vocabulary[IMAGE_TOKEN] = vocabulary.pop(IMAGE_TOKEN_IN_GPT_OSS)
        (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    write_tokenizer_settings(folder)


def _end_ids(folder: Path, tokenizer: Tokenizer) -> list[int]:
    content = json.loads((folder / "tokenizer.json").read_bytes())
    ids = {token["content"]: token["id"] for token in content.get("added_tokens", ())}
    return [tokenizer.return_id, tokenizer.pad_id, *(ids[name] for name in _EXTRA_END_TOKENS if name in ids)]


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
