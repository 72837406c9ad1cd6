"""Does a Hugging Face folder hold the same model as a checkpoint? Every tensor is compared, then what both compute."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_medgpt.checkpoint.find import resolve_checkpoint
from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.config.load import build
from megatron_medgpt.config.schema import ModelConfig
from megatron_medgpt.convert.gpt_oss import is_packed, kept_packed
from megatron_medgpt.convert.layout import Move, packed
from megatron_medgpt.convert.llava import projector_table
from megatron_medgpt.convert.logits import (
    Comparison,
    compare_logits,
    layout_from_text,
    make_prompts,
    open_transformers,
    our_logits,
    transformers_logits,
    world_size_of,
)
from megatron_medgpt.convert.megatron_to_hf import QUANTISATION_REPORT, exported_config
from megatron_medgpt.convert.mxfp4 import SCALE_RULES
from megatron_medgpt.convert.safetensor import read_json
from megatron_medgpt.convert.source import Published, open_published
from megatron_medgpt.convert.stored import StoredCheckpoint
from megatron_medgpt.convert.stream import Part, Source, read_part, run_parts, split_rows
from megatron_medgpt.convert.table import Table
from megatron_medgpt.convert.vision import at_run_size
from megatron_medgpt.parallel.plan import make_layout

_NOT_COMPARED = ("init_std", "image_size_px", "pretrained_size_px", "num_layers", "feature_layer", "max_length")
"""Fields that change no logit of a prompt, or that an export states in another way (see ``exported_config``)."""


@dataclass(slots=True)
class VerifyReport:
    """What was compared and what differed."""

    num_tensors: int = 0
    num_values: int = 0
    different: list[str] = field(default_factory=list)
    """Tensors, by our names, whose values are not equal in the narrower of the two dtypes."""
    configuration: list[str] = field(default_factory=list)
    """Fields whose values differ."""
    comparisons: list[Comparison] = field(default_factory=list)
    unused: tuple[str, ...] = ()
    quantised_by: str | None = None
    """Scale rule under which MXFP4 was compared."""

    @property
    def passed(self) -> bool:
        return not self.different and not self.configuration and all(c.within_bound for c in self.comparisons)

    def describe(self) -> str:
        """A table for a person."""
        lines = [f"tensors    {self.num_tensors} compared ({self.num_values:,} values), {len(self.different)} differ"]
        lines += [f"  differs  {name}" for name in self.different[:20]]
        lines += [f"  differs  configuration {text}" for text in self.configuration]
        if self.quantised_by:
            lines.append(f"           experts through MXFP4 with the scale rule {self.quantised_by!r}")
        if self.comparisons:
            header = ("logits", "positions", "cosine", "max |d|", "argmax", "KL", "")
            rows = [header] + [
                (
                    c.name, str(c.num_positions), f"{c.cosine:.9f}", f"{c.max_difference:.2e}",
                    f"{100 * c.argmax_agreement:.2f} %", f"{c.kl:.2e}", "ok" if c.within_bound else "OUTSIDE THE BOUND",
                )
                for c in self.comparisons
            ]  # fmt: skip
            widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
            lines += ["  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in rows]
        lines.append("equal" if self.passed else "NOT EQUAL")
        return "\n".join(lines)


def verify(
    checkpoint: Path | str, hf: Path | str, *, layouts: Sequence[str] = ("single",), images: bool | None = None,
    logits: bool = True, vision: Path | str | None = None, num_threads: int = 2, seed: int = 0,
) -> VerifyReport:  # fmt: skip
    """Compare a checkpoint with a Hugging Face folder.

    Args:
        checkpoint: see ``checkpoint.find.resolve_checkpoint``.
        hf: a LLaVA export, or a GPT-oss folder (then the language model alone is compared).
        layouts: in which ours is run, e.g. ``single``, ``tp2-ep2``; each starts its own ranks.
        images: also prompt with images; where the folder has a vision tower when not given.
        logits: False compares tensors and configuration only (models that do not fit into memory).
        vision: also compare the tower with this published one.
        seed: of the prompts.

    Raises:
        UsageError: a folder is not usable, or the model cannot be split as a layout says.
        WorkError: tensors are missing or left over.
    """
    path = resolve_checkpoint(checkpoint)
    stored = StoredCheckpoint(path, num_threads=num_threads)
    config = build(ModelConfig, stored.manifest.facts.model, "model")
    for parallel in map(layout_from_text, layouts):  # before hours of comparing
        make_layout(parallel, config, world_size_of(parallel))
    published = open_published(Path(hf))
    report = VerifyReport(quantised_by=_scale_rule(published))
    _compare_configuration(config, published, report)
    tables = _tables(config, published, open_published(Path(vision)) if vision is not None else None, report)
    packed_experts = is_packed(stored.names)
    for table, source in tables:
        table = kept_packed(table) if packed_experts else table
        _compare_tensors(table, source, stored, report, num_threads)
    if logits and not report.configuration:
        _compare_logits(path, config, published, layouts, images, seed, report)
    return report


def _compare_configuration(config: ModelConfig, published: Published, report: VerifyReport) -> None:
    pairs: list[tuple[str, Any, Any]] = [("language", config.language, published.language_config)]
    if published.vision_config is not None:
        pairs.append(("vision", config.vision, published.vision_config))
        ours, theirs = (exported_config(replace(config, vision=v)).vision for v in (config.vision, pairs[1][2]))
        for name in ("num_layers", "image_size_px"):
            if getattr(ours, name) != getattr(theirs, name):
                report.configuration.append(f"vision.{name}: {getattr(ours, name)} and {getattr(theirs, name)}")
    if published.projector is not None:
        # Its width is checked by the tensors' shapes.
        pairs.append(("projector", replace(config.projector, hidden_size=None), published.projector_config))
    for section, ours, theirs in pairs:
        if theirs is None:
            continue
        for item in dataclasses.fields(ours):
            mine, other = getattr(ours, item.name), getattr(theirs, item.name)
            skipped = item.name in _NOT_COMPARED and not (section == "language" and item.name == "num_layers")
            if mine != other and not skipped:
                report.configuration.append(f"{section}.{item.name}: {mine} and {other}")


def _tables(
    config: ModelConfig, published: Published, tower: Published | None, report: VerifyReport
) -> list[tuple[Table, Source]]:
    """Tables from the folder's tensors to ours, with nothing left over."""
    found: list[tuple[Table, Source]] = []
    unused: list[str] = list(published.others)
    if published.language is not None:
        table = published.language_table(config.language, torch.float32)
        unused += table.check_published(published.language.names, str(published.folder))
        found.append((table, published.language))
    for folder in (published, tower):
        if folder is not None and folder.vision is not None and folder.vision_config is not None:
            # Its own number of layers decides what is left over; ours decides which are compared.
            vision = replace(folder.vision_config, num_layers=max(folder.vision_config.num_layers, 1))
            built = exported_config(config).vision
            vision = replace(vision, feature_layer=built.num_layers - 1 - vision.num_layers)
            table = folder.vision_table(vision)
            unused += table.check_published(folder.vision.names, str(folder.folder))
            found.append((table, folder.vision))
    if published.projector is not None:
        table = projector_table(norm=published.projector_config.norm)
        unused += table.check_published(published.projector.names, str(published.folder))
        found.append((table, published.projector))
    if not found:
        raise UsageError(f"{published.folder} holds nothing that a checkpoint holds")
    report.unused = tuple(unused)
    return found


def _compare_tensors(
    table: Table, source: Source, stored: StoredCheckpoint, report: VerifyReport, num_threads: int
) -> None:
    missing = [row.ours for row in table.rows if row.ours not in stored.names]
    if missing:
        raise UsageError(f"checkpoint {stored.path} lacks {len(missing)} tensors, the first: {missing[0]}")
    different: set[str] = set()
    rule = report.quantised_by

    def work(part: Part) -> None:
        row = part.row
        expected = row.move.to_ours(read_part(part, source, row.published))
        bounds = (part.first, part.end) if row.move.by_parts else ()
        found = stored.tensor(row.ours, *bounds)
        if row.move.packs and rule is not None:
            found = _through_mxfp4(packed(torch.float32, rule), found)
        if found.shape != expected.shape and row.ours == "vision.position_embedding":
            found = _resized(found, stored)
        if not _equal(found, expected):
            different.add(row.ours)
        stored.forget(row.ours, *bounds)
        for name in row.published:
            source.forget(name, *bounds)

    parts = list(split_rows(table.rows, source, lambda row: row.published))
    run_parts(parts, work, num_threads=num_threads, what="verify")
    report.num_tensors += len(table.rows)
    report.num_values += sum(torch.Size(stored.spec(row.ours).shape).numel() for row in table.rows)
    report.different += sorted(different)


def _through_mxfp4(move: Move, experts: Tensor) -> Tensor:
    return torch.cat([move.to_ours(list(move.to_published(expert[None]))) for expert in experts])


def _resized(table_PH: Tensor, stored: StoredCheckpoint) -> Tensor:
    config = build(ModelConfig, stored.manifest.facts.model, "model")
    return at_run_size(config.vision).to_published(table_PH)[0]


def _equal(one: Tensor, two: Tensor) -> bool:
    """Equal in the narrower dtype of the two, where a cast on the way made the only difference."""
    if one.shape != two.shape:
        return False
    narrow = one.dtype if one.dtype.itemsize <= two.dtype.itemsize else two.dtype
    return torch.equal(one.to(narrow), two.to(narrow))


def _compare_logits(
    path: Path, config: ModelConfig, published: Published, layouts: Sequence[str], images: bool | None, seed: int,
    report: VerifyReport,
) -> None:  # fmt: skip
    if published.kind not in ("llava", "gpt_oss"):
        raise UsageError(
            f"{published.folder} is a {published.kind} folder, whose logits transformers does not give; add --no-logits"
        )
    has_tower = published.vision is not None
    if images and not has_tower:
        raise UsageError(f"--images: {published.folder} has no vision tower")
    images = has_tower if images is None else images
    mark = published.config.get("image_token_index", published.config.get("image_token_id"))
    mark = config.language.vocab_size - 1 if mark is None else int(mark)
    prompts = make_prompts(config, mark, images=images, seed=seed)
    expected = transformers_logits(open_transformers(published.folder, images=has_tower), prompts)
    assert published.language is not None
    head = next(name for name in published.language.names if name.endswith("lm_head.weight"))
    stored_as = str(published.language.spec(head).dtype).removeprefix("torch.")
    for name in layouts:
        found = our_logits(
            path, config, prompts, layout_from_text(name), weights_as=stored_as, experts_as=report.quantised_by
        )
        report.comparisons.append(compare_logits(name, found, expected))


def _scale_rule(published: Published) -> str | None:
    """The rule that MXFP4 was written with: an export of ours says so, public weights are kept by the first."""
    if published.experts != "mxfp4":
        return None
    path = published.folder / QUANTISATION_REPORT
    rule = read_json(path).get("scale_rule") if path.is_file() else SCALE_RULES[0]
    if rule not in SCALE_RULES:
        raise UsageError(f"{path}: scale_rule={rule!r}; allowed: {', '.join(SCALE_RULES)}")
    return rule
