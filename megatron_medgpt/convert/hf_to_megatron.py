"""From published weights to one checkpoint that every layout loads: streaming, whatever the model's size."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch.utils.serialization import config as serialization_config

from megatron_medgpt.checkpoint.manifest import CheckpointFacts
from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.config.presets import VISION
from megatron_medgpt.config.schema import ModelConfig, ProjectorConfig, VisionConfig
from megatron_medgpt.convert.gpt_oss import kept_packed
from megatron_medgpt.convert.llava import projector_table
from megatron_medgpt.convert.mapped import TensorSpec
from megatron_medgpt.convert.source import Published, open_published
from megatron_medgpt.convert.store import CheckpointWriter
from megatron_medgpt.convert.stored import stored_key
from megatron_medgpt.convert.stream import (
    Part,
    Source,
    TensorsInMemory,
    amount,
    cast,
    forget_part,
    read_part,
    run_parts,
    split_rows,
    staged_folder,
    to_ours_specs,
)
from megatron_medgpt.convert.table import Row
from megatron_medgpt.model.projector import Projector
from megatron_medgpt.model.vision import build_vision

log = logging.getLogger(__name__)

DTYPES = {"same": None, "bf16": torch.bfloat16, "fp32": torch.float32}
_ARCHIVE_BYTES = 2048
"""More than a ``torch.save`` archive and its alignment take besides the elements."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows that one source serves."""

    rows: tuple[Row, ...]
    source: Source
    origin: str


@dataclass(frozen=True, slots=True)
class ImportPlan:
    """What an import will read and write; made from headers and JSON alone."""

    config: ModelConfig
    pieces: tuple[_Piece, ...]
    specs: dict[str, TensorSpec]
    dtype: torch.dtype | None
    origins: dict[str, str]
    """Where each of language, vision and projector comes from."""
    unused: tuple[str, ...] = ()
    """Published tensors that our model has no place for."""
    sources: dict[str, str] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        return sum(spec.num_bytes for spec in self.specs.values())

    def describe(self) -> str:
        """A few lines for a person."""
        lines = [f"{name:<10} {origin}" for name, origin in self.origins.items()]
        lines.append(f"{'tensors':<10} {len(self.specs)} ({amount(self.num_bytes)}) in the checkpoint")
        if self.unused:
            shown = ", ".join(self.unused[:3]) + (", ..." if len(self.unused) > 3 else "")
            lines.append(f"{'unused':<10} {len(self.unused)} published tensors: {shown}")
        return "\n".join(lines)


def plan_import(
    language: Path | str, *, vision: Path | str | None = None, new_vision: str | None = None,
    projector: Path | str | None = None, dtype: str = "same", feature_layer: int | None = None,
    image_size_px: int | None = None, pixel_shuffle: int = 1, projector_norm: bool = False, keep_packed: bool = False,
    seed: int = 1234,
) -> ImportPlan:  # fmt: skip
    """Open the folders, pair every tensor, and refuse what is missing or left over.

    Args:
        language: GPT-oss (transformers' or OpenAI's layout, MXFP4 or plain), or a LLaVA folder, which then also gives
            tower and projector, or InternVL3.5-GPT-OSS, of which the language model is taken.
        vision: CLIP or SigLIP, a tower or the full model.
        new_vision: preset of an encoder with random weights, to be trained from nothing.
        projector: a projector that was exported alone. A new one has random weights, drawn from ``seed``.
        dtype: ``same`` keeps each tensor's own (MXFP4 becomes bfloat16), or cast everything to ``bf16`` or ``fp32``.
        feature_layer: of the encoder; -2 for CLIP and -1 for SigLIP when not given.
        image_size_px: the encoder is to be run at; its own when not given.
        pixel_shuffle, projector_norm: of a new projector.
        keep_packed: leave MXFP4 experts packed in the checkpoint.

    Raises:
        UsageError: a folder is not usable, or a part is given twice or not at all.
        WorkError: tensors are missing or left over.
    """
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}; allowed: {', '.join(DTYPES)}")
    opened = open_published(Path(language))
    if opened.language is None or opened.language_config is None:
        raise UsageError(f"--language {language} is a {opened.kind} model; it holds no GPT-oss language model")
    whole = opened.vision is not None and vision is None and new_vision is None
    if whole and feature_layer is not None:
        raise UsageError(f"--feature-layer {feature_layer}: {language} states its own; give it with --vision alone")
    tower = opened if whole else _tower(vision, new_vision)
    vision_config = tower.vision_config if tower else VISION[str(new_vision)]
    vision_config = _adjusted(vision_config, feature_layer, image_size_px)
    given = open_published(Path(projector)) if projector is not None else opened if whole else None
    if given is not None and (pixel_shuffle != 1 or projector_norm):
        option = "--projector-norm" if projector_norm else f"--pixel-shuffle {pixel_shuffle}"
        raise UsageError(f"{option} shapes a new projector, and {given.folder} gives one; leave it out")
    shape = (
        ProjectorConfig(pixel_shuffle=pixel_shuffle, norm=projector_norm) if given is None else given.projector_config
    )
    config = ModelConfig(language=opened.language_config, vision=vision_config, projector=shape)
    unpacked = DTYPES[dtype] or torch.bfloat16
    language_table = opened.language_table(config.language, unpacked)
    if keep_packed:
        if opened.experts != "mxfp4":
            raise UsageError(f"--keep-packed: {opened.folder} holds no MXFP4 experts")
        language_table = kept_packed(language_table)
    pieces = [_Piece(language_table.rows, opened.language, f"{language} ({_kind(opened)})")]
    language_table.check_published(opened.language.names, str(language))
    unused = list(opened.others)
    head = next(row for row in language_table.rows if row.ours == "language.output_layer.weight")
    made = DTYPES[dtype] or opened.language.spec(head.published[0]).dtype  # of what is new
    pieces.append(_vision_piece(tower, config.vision, new_vision, seed, made, unused))
    pieces.append(_projector_piece(given, config, seed, made))
    specs: dict[str, TensorSpec] = {}
    for piece in pieces:
        specs.update(to_ours_specs(piece.rows, piece.source, DTYPES[dtype]))
    _check_shapes(config, specs, keep_packed)
    if dtype == "same":
        specs = _one_dtype_a_stack(specs)
    return ImportPlan(
        config=config, pieces=tuple(pieces), specs=specs, dtype=DTYPES[dtype], unused=tuple(unused),
        origins=dict(zip(("language", "vision", "projector"), (piece.origin for piece in pieces))),
        sources={str(folder): _fingerprint(Path(folder)) for folder in (language, vision, projector) if folder},
    )  # fmt: skip


def import_hf(plan: ImportPlan, out: Path | str, *, num_threads: int = 2) -> Path:
    """Write the checkpoint that a plan describes.

    Raises:
        UsageError: ``out`` exists.
        WorkError: the disk is full, or a source holds values that are not finite (MXFP4 scale 255).
    """
    out = Path(out)
    needed = plan.num_bytes + _ARCHIVE_BYTES * (len(plan.specs) + plan.num_bytes // (8 << 20))
    # The manifest has a sha256 of every byte, and torch reads no archive's CRC-32: a pass for nothing. Once around all
    # threads, since the setting is the process's.
    with staged_folder(out, needed) as staging, serialization_config.patch("save.compute_crc32", False):
        writer = CheckpointWriter(staging, plan.specs)
        try:
            for piece in plan.pieces:
                _write(piece, plan, writer, num_threads)
            facts = CheckpointFacts(
                step=0, stage_name="import", stage_end=True, model=asdict(plan.config),
                extra={"origins": plan.origins, "sources": plan.sources},
            )  # fmt: skip
            writer.finish(facts)
        finally:
            writer.abandon()
    log.info("imported %s (%d tensors, %.2f GB)", out, len(plan.specs), plan.num_bytes / 1e9)
    return out


def _write(piece: _Piece, plan: ImportPlan, writer: CheckpointWriter, num_threads: int) -> None:
    def work(part: Part) -> None:
        tensors = read_part(part, piece.source, part.row.published)
        spec = plan.specs[part.row.ours]
        moved = cast(part.row.move.to_ours(tensors), spec.dtype)
        writer.write(part.row.ours, part.first if part.row.move.by_parts else 0, moved)
        forget_part(part, piece.source, part.row.published)

    run_parts(
        split_rows(piece.rows, piece.source, lambda row: row.published), work, num_threads=num_threads, what="import",
    )  # fmt: skip


def _tower(vision: Path | str | None, new_vision: str | None) -> Published | None:
    if (vision is None) == (new_vision is None):
        raise UsageError(
            "the language model comes without a vision tower: name one with --vision DIR, or have a new one with "
            f"random weights with --new-vision {'|'.join(VISION)}"
        )
    if vision is None:
        if new_vision not in VISION:
            raise UsageError(f"--new-vision {new_vision}; allowed: {', '.join(VISION)}")
        return None
    tower = open_published(Path(vision))
    if tower.vision is None:
        raise UsageError(f"--vision {vision} is a {tower.kind} model; it holds no CLIP or SigLIP vision tower")
    return tower


def _adjusted(config: VisionConfig | None, feature_layer: int | None, image_size_px: int | None) -> VisionConfig:
    assert config is not None
    return replace(
        config,
        feature_layer=config.feature_layer if feature_layer is None else feature_layer,
        image_size_px=config.image_size_px if image_size_px is None else image_size_px,
    )


def _vision_piece(
    tower: Published | None, config: VisionConfig, new_vision: str | None, seed: int, dtype: torch.dtype,
    unused: list[str],
) -> _Piece:  # fmt: skip
    if tower is None or tower.vision is None:
        encoder = build_vision(config, dtype, seed=seed)
        return _new_piece("vision.", dict(encoder.named_parameters()), f"new {new_vision}, random weights, seed {seed}")
    table = tower.vision_table(config)
    unused += table.check_published(tower.vision.names, str(tower.folder))
    unused += [name for name in tower.others if name not in unused]
    return _Piece(table.rows, tower.vision, f"{tower.folder} ({config.kind}, features of layer {config.feature_layer})")


def _projector_piece(given: Published | None, config: ModelConfig, seed: int, dtype: torch.dtype) -> _Piece:
    if given is None:
        made = Projector(config, dtype, seed=seed + 1)
        return _new_piece("projector.", dict(made.named_parameters()), f"new, random weights, seed {seed + 1}")
    if given.projector is None:
        raise UsageError(f"--projector {given.folder} is a {given.kind} model; it holds no projector")
    table = projector_table(norm=given.projector_config.norm)
    table.check_published(given.projector.names, str(given.folder))
    return _Piece(table.rows, given.projector, str(given.folder))


def _new_piece(prefix: str, parameters: dict[str, torch.nn.Parameter], origin: str) -> _Piece:
    tensors = {prefix + name: parameter.detach() for name, parameter in parameters.items()}
    return _Piece(tuple(Row(name, (name,)) for name in tensors), TensorsInMemory(tensors), origin)


def _one_dtype_a_stack(specs: dict[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Where the layers of one parameter differ in dtype, all take the widest: they are one tensor in the file."""
    widest: dict[str, torch.dtype] = {}
    for name, spec in specs.items():
        key = stored_key(name)[0]
        widest[key] = torch.promote_types(widest.get(key, spec.dtype), spec.dtype)
    return {name: TensorSpec(spec.shape, widest[stored_key(name)[0]]) for name, spec in specs.items()}


def _check_shapes(config: ModelConfig, specs: dict[str, TensorSpec], keep_packed: bool) -> None:
    """Compare every shape with the one that our model of this configuration has."""
    for name, shape in model_shapes(config).items():
        if keep_packed and name not in specs:
            continue
        if name in specs and specs[name].shape != shape:
            raise UsageError(
                f"tensor {name} has shape {list(specs[name].shape)}, config.json makes it {list(shape)}; "
                "weights and configuration are of two models"
            )
        if name in specs and not specs[name].dtype.is_floating_point:  # packed ones have other names
            raise UsageError(f"tensor {name} is {specs[name].dtype}; weights are floating point or MXFP4")


def model_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of our model, by our names."""
    language = config.language
    hidden, inner, experts = language.hidden_size, language.expert_hidden_size, language.num_experts
    heads = language.num_attention_heads * language.head_dim
    fused = heads + 2 * language.num_query_groups * language.head_dim
    ends = {
        "embedding.word_embeddings.weight": (language.vocab_size, hidden),
        "output_layer.weight": (language.vocab_size, hidden), "decoder.final_layernorm.weight": (hidden,),
    }  # fmt: skip
    layer = {
        "input_layernorm.weight": (hidden,), "pre_mlp_layernorm.weight": (hidden,),
        "self_attention.linear_qkv.weight": (fused, hidden), "self_attention.linear_qkv.bias": (fused,),
        "self_attention.linear_proj.weight": (hidden, heads), "self_attention.linear_proj.bias": (hidden,),
        "self_attention.core_attention.sinks": (language.num_attention_heads,),
        "mlp.router.weight": (experts, hidden), "mlp.router.bias": (experts,),
        "mlp.experts.gate_up": (experts, hidden, 2 * inner), "mlp.experts.gate_up_bias": (experts, 2 * inner),
        "mlp.experts.down": (experts, inner, hidden), "mlp.experts.down_bias": (experts, hidden),
    }  # fmt: skip
    shapes = {f"language.{name}": shape for name, shape in ends.items()}
    for number in range(language.num_layers):
        shapes.update({f"language.decoder.layers.{number}.{name}": shape for name, shape in layer.items()})
    nowhere = torch.device("meta")
    for prefix, module in (
        ("vision.", build_vision(config.vision, device=nowhere)),
        ("projector.", Projector(config, device=nowhere)),
    ):
        shapes.update({prefix + name: tuple(parameter.shape) for name, parameter in module.named_parameters()})
    return shapes


def _kind(opened: Published) -> str:
    return opened.kind + (", MXFP4 experts" if opened.experts == "mxfp4" else "")


def _fingerprint(folder: Path) -> str:
    """sha256 over names, sizes and headers' worth of the weight files: tells one download from another at no cost."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as stream:
            digest.update(f"{path.name} {path.stat().st_size}\n".encode() + stream.read(1 << 20))
    return digest.hexdigest()
