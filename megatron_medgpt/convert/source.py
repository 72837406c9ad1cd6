"""Published models by folder: what they are, which tensors are which, and the table that reads them.

gpt_oss              GptOssForCausalLM: plain or MXFP4
OpenAI's own         config.json without a model_type, ``block.N.*`` tensors
llava                the language model, the vision tower and the projector, under any of transformers' spellings
internvl(_chat)      the GPT-oss language model of InternVL3.5-GPT-OSS; its own tower and projector are not ours
clip, siglip         a vision tower, alone or in a full model
projector            a folder of ours with the projector alone
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.config.load import build
from megatron_medgpt.config.schema import LanguageConfig, ProjectorConfig, VisionConfig
from megatron_medgpt.convert.configuration import (
    language_from_original,
    language_from_published,
    vision_from_published,
)
from megatron_medgpt.convert.gpt_oss import Experts, experts_stored, gpt_oss_table, original_table
from megatron_medgpt.convert.llava import canonical_name
from megatron_medgpt.convert.safetensor import SafetensorsFolder, read_json
from megatron_medgpt.convert.stream import Renamed, Source
from megatron_medgpt.convert.table import Table
from megatron_medgpt.convert.vision import vision_table

LANGUAGE = "language_model."
VISION = "vision_tower.vision_model."
PROJECTOR = "multi_modal_projector."
_TOWER = re.compile(r"(?:model\.)?(?:vision_model\.)?(embeddings|encoder|pre_layrnorm|post_layernorm|head)\.")
PREPROCESSOR = "preprocessor_config.json"


@dataclass(frozen=True, slots=True)
class Published:
    """One opened folder. A part that it does not hold is None."""

    folder: Path
    kind: str
    config: Mapping[str, Any]
    language: Source | None = None
    language_config: LanguageConfig | None = None
    experts: Experts = "plain"
    vision: Source | None = None
    vision_config: VisionConfig | None = None
    projector: Source | None = None
    projector_config: ProjectorConfig = field(default_factory=ProjectorConfig)
    others: tuple[str, ...] = ()
    """Tensors that belong to none of the three."""

    def language_table(self, config: LanguageConfig, dtype: torch.dtype = torch.bfloat16) -> Table:
        """Rows from this folder's language tensors (named without any prefix) to ours."""
        if self.kind == "original":
            return original_table(config, "language.", experts=self.experts, dtype=dtype)
        return gpt_oss_table(config, "language.", experts=self.experts, dtype=dtype)

    def vision_table(self, config: VisionConfig) -> Table:
        return vision_table(config, "vision.")


def open_published(folder: Path) -> Published:
    """Open a folder; only headers and JSON are read.

    Raises:
        UsageError: it is not a model's folder, its files are damaged, or its model is none of those above.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; name a downloaded model's folder")
    values = read_json(folder / "config.json")
    files = SafetensorsFolder(folder)
    kind = values.get("model_type")
    if kind is None and any(name.startswith("block.0.") for name in files.names):
        return Published(
            folder, "original", values, language=files,
            language_config=language_from_original(values, f"{folder}/config.json"),
            experts=experts_stored(files.names),
        )  # fmt: skip
    if kind == "gpt_oss":
        return Published(
            folder, kind, values, language=files,
            language_config=language_from_published(values, f"{folder}/config.json"),
            experts=experts_stored(files.names),
        )  # fmt: skip
    if kind in ("llava", "internvl", "internvl_chat"):
        return _open_wrapper(folder, kind, values, files)
    if kind in ("clip", "clip_vision_model", "siglip", "siglip_vision_model"):
        return _open_tower(folder, kind, values, files)
    if kind == "medgpt_projector":
        shape = {name: values[name] for name in ("pixel_shuffle", "norm", "hidden_size") if name in values}
        config = build(ProjectorConfig, shape, f"{folder}/config.json")
        return Published(folder, kind, values, projector=files, projector_config=config)
    raise UsageError(
        f"{folder}: config.json has model_type={kind!r}; readable are gpt_oss, OpenAI's own files, llava, internvl, "
        "clip and siglip"
    )


def _open_wrapper(folder: Path, kind: str, values: Mapping[str, Any], files: SafetensorsFolder) -> Published:
    where = f"{folder}/config.json"
    text = values.get("text_config") or values.get("llm_config")
    if not isinstance(text, Mapping) or text.get("model_type", "gpt_oss") != "gpt_oss":
        raise UsageError(f"{where}: its language model is no gpt_oss model")
    language = _named(files, LANGUAGE)
    found = {
        "language": language,
        "language_config": language_from_published(text, f"{where} text_config"),
        "experts": experts_stored(language.names),
    }
    ours = [LANGUAGE]
    if kind == "llava":
        tower = values.get("vision_config")
        if not isinstance(tower, Mapping):
            raise UsageError(f"{where}: vision_config is missing")
        feature_layer = values.get("vision_feature_layer", -2)
        if not isinstance(feature_layer, int):
            raise UsageError(f"{where}: vision_feature_layer={feature_layer!r}; one layer is what our model takes")
        found["vision"] = _named(files, VISION)
        found["vision_config"] = vision_from_published(
            tower, _tower_kind(tower, where), where, preprocessor=_preprocessor(folder), feature_layer=feature_layer
        )
        found["projector"] = _named(files, PROJECTOR, keep=True)
        ours += [VISION, PROJECTOR]
    others = tuple(name for name in files.names if not canonical_name(name).startswith(tuple(ours)))
    return Published(folder, kind, values, others=others, **found)


def _open_tower(folder: Path, kind: str, values: Mapping[str, Any], files: SafetensorsFolder) -> Published:
    where = f"{folder}/config.json"
    tower = values.get("vision_config") if kind in ("clip", "siglip") else values
    if not isinstance(tower, Mapping):
        raise UsageError(f"{where}: vision_config is missing")

    def rename(name: str) -> str | None:
        found = _TOWER.match(name)
        return name[found.start(1) :] if found else None

    vision = Renamed(files, rename)
    others = tuple(name for name in files.names if rename(name) is None)
    config = vision_from_published(tower, kind.partition("_")[0], where, preprocessor=_preprocessor(folder))
    return Published(folder, kind, values, vision=vision, vision_config=config, others=others)


def _named(files: SafetensorsFolder, prefix: str, *, keep: bool = False) -> Renamed:
    """The tensors of one part by their canonical names, with or without the part's prefix."""

    def rename(name: str) -> str | None:
        name = canonical_name(name)
        if not name.startswith(prefix):
            return None
        return name if keep else name[len(prefix) :]

    return Renamed(files, rename)


def _tower_kind(tower: Mapping[str, Any], where: str) -> str:
    kind = str(tower.get("model_type", "")).partition("_")[0]
    if kind not in ("clip", "siglip"):
        raise UsageError(f"{where}: vision_config.model_type={tower.get('model_type')!r}; readable are clip and siglip")
    return kind


def _preprocessor(folder: Path) -> Mapping[str, Any] | None:
    path = folder / PREPROCESSOR
    return read_json(path) if path.is_file() else None
