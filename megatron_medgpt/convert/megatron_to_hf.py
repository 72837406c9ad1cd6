"""From a checkpoint of ours to a folder that transformers and vLLM load: streaming, in bf16, fp32 or MXFP4."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_medgpt.checkpoint.find import named_checkpoint, resolve_checkpoint
from megatron_medgpt.config.errors import UsageError, WorkError
from megatron_medgpt.config.load import build
from megatron_medgpt.config.schema import ModelConfig
from megatron_medgpt.convert.assets import write_assets
from megatron_medgpt.convert.gpt_oss import gpt_oss_table, is_packed, kept_packed
from megatron_medgpt.convert.layout import Move, packed
from megatron_medgpt.convert.llava import llava_table, projector_table
from megatron_medgpt.convert.mxfp4 import GROUP, QuantisationError, ScaleRule
from megatron_medgpt.convert.safetensor import SafetensorsWriter
from megatron_medgpt.convert.source import open_published
from megatron_medgpt.convert.stored import StoredCheckpoint
from megatron_medgpt.convert.stream import (
    Part,
    Source,
    cast,
    forget_part,
    read_part,
    run_parts,
    split_rows,
    staged_folder,
    to_published_specs,
)
from megatron_medgpt.convert.table import Row, Table
from megatron_medgpt.convert.vision import at_run_size

log = logging.getLogger(__name__)

Dtype = Literal["bf16", "fp32", "mxfp4"]
WhatPart = Literal["whole", "projector", "language"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "mxfp4": torch.bfloat16}
PARTS = ("whole", "projector", "language")
QUANTISATION_REPORT = "quantisation.json"


@dataclass(slots=True)
class ExportSummary:
    """What an export wrote."""

    out: Path
    num_tensors: int
    num_bytes: int
    quantisation: dict[str, QuantisationError] = field(default_factory=dict)
    """By our tensor names; empty unless MXFP4 was written."""
    num_experts_kept: int = 0
    """Expert matrices that were written byte for byte as published."""
    num_experts: int = 0


def export_hf(
    checkpoint: Path | str,
    out: Path | str,
    *,
    tokenizer: Path | str | None = None,
    dtype: Dtype = "bf16",
    part: WhatPart = "whole",
    scale_rule: ScaleRule = "up",
    original: Path | str | None = None,
    evaluation: Sequence[Mapping[str, Any]] | None = None,
    max_shard_bytes: int = 5_000_000_000,
    num_threads: int = 2,
    verify_content: bool = True,
) -> ExportSummary:
    """Write a checkpoint as ``LlavaForConditionalGeneration`` (or a part of it) into a new folder.

    The vision encoder is written up to the layer whose output is the feature (the checkpoint holds no further ones),
    with that layer named as ``vision_feature_layer``.

    Args:
        checkpoint: see ``checkpoint.find.resolve_checkpoint``.
        tokenizer: folder with tokenizer.json; not needed for ``part="projector"``.
        dtype: of the weights. ``mxfp4`` packs the experts and writes the rest in bfloat16.
        part: ``whole``; ``language``: the language model alone, as ``GptOssForCausalLM``; ``projector`` alone.
        scale_rule: see ``mxfp4.SCALE_RULES``.
        original: published model in MXFP4; experts whose values it already holds are written with its bytes.
        evaluation: evaluation results (files of ``medgpt eval``, read) for the model card.
        verify_content: compare every file with the checkpoint's manifest: those of tensors while they are read.

    Raises:
        UsageError: the checkpoint, the tokenizer or the options are not usable. Nothing was written.
        WorkError: tensors are missing or left over, the disk is full, weights are not finite. Nothing was published.
    """
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}; allowed: {', '.join(DTYPES)}")
    if part not in PARTS:
        raise UsageError(f"--part {part}; allowed: {', '.join(PARTS)}")
    if original is not None and dtype != "mxfp4":
        raise UsageError("--original gives the bytes of untouched MXFP4 experts; it needs --dtype mxfp4")
    named = named_checkpoint(checkpoint)
    path = named or resolve_checkpoint(checkpoint)  # which compares it with its manifest
    stored = StoredCheckpoint(path, verify_content=False)
    config = build(ModelConfig, stored.manifest.facts.model, "model")
    config = exported_config(config)
    table = export_table(config, part, dtype, scale_rule)
    if is_packed(stored.names):
        if dtype != "mxfp4" and part != "projector":
            raise UsageError(f"checkpoint {path} holds MXFP4 experts as they were published; add --dtype mxfp4")
        table = kept_packed(table)
    source = _only(stored, table, part)
    specs = to_published_specs(table.rows, table.constants, source, DTYPES[dtype])
    needed = sum(spec.num_bytes for spec in specs.values())
    summary = ExportSummary(Path(out), len(specs), needed)
    with staged_folder(Path(out), needed) as staging:
        writer = SafetensorsWriter(staging, specs, max_shard_bytes=max_shard_bytes)
        try:
            with stored.verified_meanwhile(num_threads) if verify_content and named else nullcontext():
                _write(table, source, writer, DTYPES[dtype], summary, _original(original, config), num_threads)
            writer.finish()
        finally:
            writer.abandon()
        write_assets(
            staging, config, part=part, dtype=dtype, tokenizer=tokenizer, evaluation=evaluation,
            facts=stored.manifest.facts, checkpoint=path, quantisation=summary.quantisation,
        )  # fmt: skip
        if summary.quantisation:
            _write_quantisation_report(staging, summary, scale_rule)
    log.info("exported %s (%d tensors, %.2f GB)", out, len(specs), needed / 1e9)
    return summary


def exported_config(config: ModelConfig) -> ModelConfig:
    """The model as it is published: cut behind its feature layer, with positions for the size it is run at."""
    vision = config.vision
    built = vision.num_layers + 1 + vision.feature_layer
    return replace(config, vision=replace(vision, num_layers=built, feature_layer=-1))


def export_table(config: ModelConfig, part: WhatPart, dtype: Dtype, rule: ScaleRule = "up") -> Table:
    """Rows of what is written.

    Raises:
        UsageError: the experts' widths are not whole MXFP4 groups.
    """
    language = config.language
    if dtype == "mxfp4" and (language.hidden_size % GROUP or language.expert_hidden_size % GROUP):
        raise UsageError(
            f"MXFP4 shares a scale among {GROUP} values; hidden_size={language.hidden_size} and "
            f"expert_hidden_size={language.expert_hidden_size} must be multiples of it; use --dtype bf16"
        )
    experts = "mxfp4" if dtype == "mxfp4" else "plain"
    if part == "language":
        return gpt_oss_table(language, "language.", experts=experts, rule=rule)
    if part == "projector":
        return projector_table(norm=config.projector.norm)
    table = llava_table(config, experts=experts, rule=rule)
    vision = config.vision
    if vision.image_size_px == vision.pretrained_size_px:
        return table
    position = "vision.position_embedding"
    rows = (replace(row, move=at_run_size(vision)) if row.ours == position else row for row in table.rows)
    return replace(table, rows=tuple(rows))


def _only(stored: StoredCheckpoint, table: Table, part: WhatPart) -> Source:
    """The checkpoint, checked to be what the table describes; parts that were not asked for may be there."""
    prefix = {"whole": "", "language": "language.", "projector": "projector."}[part]
    table.check_ours([name for name in stored.names if name.startswith(prefix)], f"checkpoint {stored.path}")
    return stored


def _original(original: Path | str | None, config: ModelConfig) -> tuple[Source, dict[str, Row]] | None:
    if original is None:
        return None
    published = open_published(Path(original))
    if published.language is None or published.experts != "mxfp4":
        raise UsageError(f"{original} holds no MXFP4 experts; --original wants the published MXFP4 model")
    rows = {row.ours: row for row in published.language_table(config.language).rows if row.move.packs}
    return published.language, rows


def _write(
    table: Table,
    source: Source,
    writer: SafetensorsWriter,
    dtype: torch.dtype,
    summary: ExportSummary,
    original: tuple[Source, dict[str, Row]] | None,
    num_threads: int,
) -> None:
    lock = threading.Lock()

    def work(part: Part) -> None:
        row = part.row
        (tensor,) = read_part(part, source, (row.ours,))
        if row.move.packs:
            outputs, error, kept = _pack(row.move, tensor, _published_part(part, original))
            with lock:
                total = summary.quantisation.setdefault(row.ours, QuantisationError())
                total.merge(error)
                summary.num_experts += tensor.shape[0]
                summary.num_experts_kept += kept
        else:
            outputs = [cast(moved, dtype) for moved in row.move.to_published(tensor)]
            if not all(_is_finite(output) for output in outputs):
                raise WorkError(f"checkpoint tensor {row.ours} is not finite in {dtype}; it is not exported")
        for name, output in zip(row.published, outputs):
            writer.write(name, part.first if row.move.by_parts else 0, output)
        forget_part(part, source, (row.ours,))

    run_parts(
        split_rows(table.rows, source, lambda row: (row.ours,)), work, num_threads=num_threads, what="export",
    )  # fmt: skip
    for constant in table.constants:
        writer.write(constant.published, 0, torch.full(constant.shape, constant.value, dtype=dtype))


def _is_finite(tensor: Tensor) -> bool:
    """By the two ends, which a NaN takes with it: 0.06 CPU seconds a GB of bfloat16, a sum in float32 takes 1.2."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(bool(torch.isfinite(end)) for end in tensor.aminmax())


def _published_part(part: Part, original: tuple[Source, dict[str, Row]] | None) -> list[Tensor] | None:
    if original is None or part.row.ours not in original[1]:
        return None
    source, rows = original
    return [source.tensor(name, part.first, part.end) for name in rows[part.row.ours].published]


def _pack(
    move: Move, tensor: Tensor, published: Sequence[Tensor] | None
) -> tuple[list[Tensor], QuantisationError, int]:
    """Quantise some experts, expert by expert; those that the published bytes stand for keep these bytes."""
    exact = packed(torch.float32)
    outputs: list[list[Tensor]] = []
    error, kept = QuantisationError(), 0
    for number, expert in enumerate(tensor):
        same = None if published is None else [part[number : number + 1] for part in published]
        if same is not None and torch.equal(exact.to_ours(same)[0].to(expert.dtype), expert):
            outputs.append(same)
            kept += 1
        else:
            outputs.append(list(move.to_published(expert[None])))
        error.add(expert, exact.to_ours(outputs[-1])[0])
    return [torch.cat(leaf) for leaf in zip(*outputs)], error, kept


def _write_quantisation_report(folder: Path, summary: ExportSummary, rule: str) -> None:
    rows = {
        name: {"relative_error": error.relative, "max_error": error.max_error, "num_values": error.num_values}
        for name, error in sorted(summary.quantisation.items())
    }
    content = {
        "scale_rule": rule, "num_expert_matrices": summary.num_experts,
        "num_kept_byte_for_byte": summary.num_experts_kept, "tensors": rows,
    }  # fmt: skip
    (folder / QUANTISATION_REPORT).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
