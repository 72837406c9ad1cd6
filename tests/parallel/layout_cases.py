"""The layouts that are compared, and the rows that all of them train on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from megatron_medgpt.config.presets import TINY, TINY_CLIP
from megatron_medgpt.config.schema import ModelConfig, ParallelConfig, ProjectorConfig
from megatron_medgpt.types import IGNORE_INDEX, ImageSpan, MedBatch

MODEL = ModelConfig(language=TINY, vision=replace(TINY_CLIP, num_layers=2), projector=ProjectorConfig(norm=True))
LENGTH = 64
NUM_ROWS = 4
"""Rows of one optimizer step, one per micro-batch."""


@dataclass(frozen=True)
class Case:
    """One layout, one experiment on it."""

    world_size: int
    parallel: ParallelConfig
    mutation: str = "none"
    recompute: str = "none"


def case(world_size: int, mutation: str = "none", recompute: str = "none", **degrees) -> Case:
    return Case(world_size, ParallelConfig(**degrees), mutation, recompute)


CASES = {
    "one process": case(1),
    "one process, recomputed": case(1, recompute="layer"),
    "TP2": case(2, tensor=2),
    "TP2, recomputed": case(2, tensor=2, recompute="layer"),
    "PP2": case(2, pipeline=2),
    "PP2 uneven": case(2, pipeline=2, layers_per_stage=(1, 3)),
    "PP2 interleaved": case(2, pipeline=2, virtual_pipeline=2),
    "PP2 interleaved, recomputed": case(2, pipeline=2, virtual_pipeline=2, recompute="layer"),
    "EP2": case(2, expert=2),
    "DP2": case(2),
    "TP2 EP2": case(2, tensor=2, expert=2),
    "TP2 EP2 DP2": case(4, tensor=2, expert=2),
    "TP2 DP2": case(4, tensor=2),
    "PP2 EP2": case(4, pipeline=2, expert=2),
    "TP2 PP2": case(4, tensor=2, pipeline=2),
    "TP2 PP2 EP2": case(4, tensor=2, pipeline=2, expert=2),
    "TP2 PP2 EP2 interleaved": case(4, tensor=2, pipeline=2, virtual_pipeline=2, expert=2, recompute="layer"),
    "EP4": case(4, expert=4),
}
STEPPED = ("one process", "TP2 EP2", "PP2 uneven", "DP2", "TP2 PP2 EP2")
"""Cases that also take optimizer steps."""
MUTANTS = {
    "a dropped all-reduce over the tensor group": case(2, "drop_all_reduce", tensor=2),
    "a dropped all-reduce over the data group": case(2, "drop_data_all_reduce"),
    "a bias added on every tensor rank": case(2, "double_bias", tensor=2),
    "an expert index shifted by one": case(2, "shift_expert", expert=2),
}


def row(number: int) -> MedBatch:
    """Row ``number`` as a micro-batch: two or three documents, 0 to 2 images, some padding.

    Odd rows have no image. With two data ranks that take alternate rows, one of them sees no image at all.
    """
    generator = torch.Generator().manual_seed(1000 + number)
    cut = 20 + 3 * number
    documents = torch.zeros(LENGTH, dtype=torch.int32)
    documents[cut:], documents[60:] = 1, 2
    positions = torch.cat([torch.arange(cut), torch.arange(60 - cut), torch.arange(LENGTH - 60)])
    tokens = torch.randint(0, TINY.vocab_size, (LENGTH,), generator=generator)
    labels = tokens.roll(-1)
    labels[torch.rand(LENGTH, generator=generator) < 0.4] = IGNORE_INDEX
    labels[[cut - 1, *range(59, LENGTH)]] = IGNORE_INDEX
    modality = torch.where(documents == 2, -1, 1 + number % 3).to(torch.int8)
    # One image lies across the middle of the row, where two tensor ranks meet; even rows have one or two.
    starts = () if number % 2 else ((24,) if number % 4 else (2, 30))
    spans = tuple(
        ImageSpan(row=0, start=start, image=image, num_tokens=MODEL.tokens_per_image)
        for image, start in enumerate(starts)
    )
    for span in spans:
        labels[span.start : span.start + span.num_tokens] = IGNORE_INDEX
    return MedBatch(
        token_ids_BS=tokens[None],
        label_ids_BS=labels[None],
        position_ids_BS=positions[None],
        document_ids_BS=documents[None],
        modality_ids_BS=modality[None],
        pixels_ICYX=torch.randn(len(starts), 3, 56, 56, generator=generator, dtype=torch.float64),
        image_spans=spans,
        num_targets=int((labels != IGNORE_INDEX).sum()),
    )


def own_part(batch: MedBatch, *, first: int, end: int, dtype: torch.dtype) -> MedBatch:
    """What a tensor rank that owns the positions ``[first, end)`` is given: only the images that reach into them."""
    kept = [span for span in batch.image_spans if span.start < end and span.start + span.num_tokens > first]
    images = [span.image for span in kept]
    spans = tuple(replace(span, image=place) for place, span in enumerate(kept))
    pixels = batch.pixels_ICYX[images].to(dtype) if images else None
    return replace(batch, image_spans=spans, pixels_ICYX=pixels)
