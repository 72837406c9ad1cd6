"""The data and the shapes of the step benchmark, the same for both sides."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from megatron_medgpt.config.presets import TINY, TINY_CLIP
from megatron_medgpt.config.schema import LanguageConfig, ModelConfig
from megatron_medgpt.recipes.demo import MODEL as DEMO
from megatron_medgpt.types import IGNORE_INDEX, ImageSpan, MedBatch

SMALL = LanguageConfig(
    num_layers=6, hidden_size=384, num_attention_heads=12, num_query_groups=4, head_dim=32, num_experts=16,
    num_experts_per_token=4, expert_hidden_size=384, vocab_size=8192, sliding_window=64, yarn_original_length=512,
    max_length=4096,
)  # fmt: skip
SMALL_CLIP = replace(
    TINY_CLIP, num_layers=6, hidden_size=256, num_attention_heads=8, mlp_hidden_size=1024, image_size_px=112,
    pretrained_size_px=112,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One optimizer step: ``micro_batches`` of ``rows`` rows, each one document of ``length`` tokens."""

    name: str
    model: ModelConfig
    length: int
    rows: int
    micro_batches: int
    images_per_row: int = 1

    @property
    def tokens_per_step(self) -> int:
        return self.length * self.rows * self.micro_batches

    @property
    def image_mark_id(self) -> int:
        return self.model.language.vocab_size - 1


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            name="tiny", model=ModelConfig(language=TINY, vision=TINY_CLIP), length=128, rows=4, micro_batches=2
        ),
        Workload(name="demo", model=DEMO, length=512, rows=4, micro_batches=2, images_per_row=8),
        Workload(
            name="small", model=ModelConfig(language=SMALL, vision=SMALL_CLIP), length=512, rows=2, micro_batches=2
        ),
    )
}  # fmt: skip
"""``tiny`` is all overhead, ``demo`` the model of ``medgpt demo``, ``small`` mostly matrix products."""


def make_batches(workload: Workload, step: int) -> list[MedBatch]:
    """The micro-batches of a step: in every row first the images with a little text between, then targets."""
    generator = torch.Generator().manual_seed(1000 + step)
    return [_make_batch(workload, generator) for _ in range(workload.micro_batches)]


def _make_batch(workload: Workload, generator: torch.Generator) -> MedBatch:
    rows, length = workload.rows, workload.length
    size, num_tokens = workload.model.vision.image_size_px, workload.model.tokens_per_image
    num_images = rows * workload.images_per_row
    tokens = torch.randint(0, workload.image_mark_id, (rows, length), generator=generator)
    spans = []
    for image in range(num_images):
        row, place = divmod(image, workload.images_per_row)
        start = 4 + place * (num_tokens + 4)
        tokens[row, start : start + num_tokens] = workload.image_mark_id
        spans.append(ImageSpan(row=row, start=start, image=image, num_tokens=num_tokens))
    labels = torch.full_like(tokens, IGNORE_INDEX)
    prompt = 4 + workload.images_per_row * (num_tokens + 4)
    labels[:, prompt:-1] = tokens[:, prompt + 1 :]
    labels[labels == workload.image_mark_id] = IGNORE_INDEX
    return MedBatch(
        token_ids_BS=tokens,
        label_ids_BS=labels,
        position_ids_BS=torch.arange(length).expand(rows, length).contiguous(),
        document_ids_BS=torch.zeros(rows, length, dtype=torch.int32),
        modality_ids_BS=torch.ones(rows, length, dtype=torch.int8),
        pixels_ICYX=torch.randn(num_images, 3, size, size, generator=generator),
        image_spans=tuple(spans),
        num_targets=int((labels != IGNORE_INDEX).sum()),
        num_tokens=rows * length,
        num_images=num_images,
        num_documents=rows,
        sample_ids=tuple(f"row-{row}" for row in range(rows)),
    )
