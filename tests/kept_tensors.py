"""What autograd really keeps for the backward pass of a small model, counted by storage."""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_medgpt.config.presets import TINY, TINY_CLIP
from megatron_medgpt.config.schema import KernelConfig, LanguageConfig, ModelConfig, ParallelConfig
from megatron_medgpt.parallel import groups as world
from megatron_medgpt.parallel.plan import make_layout
from megatron_medgpt.types import IGNORE_INDEX, MedBatch

LENGTH, TARGETS = 256, 64
SHAPE = replace(TINY, hidden_size=96, expert_hidden_size=160)
DTYPES = {2: torch.bfloat16, 4: torch.float32}


class Kept:
    """Adds up the storages that autograd saves, parameters left out."""

    def __init__(self, *modules: torch.nn.Module):
        self._parameters = {p.untyped_storage().data_ptr() for module in modules for p in module.parameters()}
        self._storages: dict[int, torch.UntypedStorage] = {}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._parameters:
            self._storages[storage.data_ptr()] = storage
        return tensor

    @property
    def num_bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._storages.values())


def kept_by_chunk(
    num_layers: int, bytes_per_value: int, recompute: str = "none", kernels: KernelConfig | None = None,
    shape: LanguageConfig = SHAPE,
) -> int:  # fmt: skip
    """Of the loss of one row without images, through a model in one chunk."""
    from megatron_medgpt.model.build import build_model

    model = ModelConfig(language=replace(shape, num_layers=num_layers), vision=TINY_CLIP)
    layout = make_layout(ParallelConfig(), model, 1)
    world.destroy_groups()
    chunk = build_model(
        model, layout=layout, groups=world.build_groups(layout), dtype=DTYPES[bytes_per_value], recompute=recompute,
        kernels=kernels,
    )[0].train()  # fmt: skip
    labels = torch.full((1, LENGTH), IGNORE_INDEX)
    labels[0, :TARGETS] = 5
    batch = MedBatch(
        token_ids_BS=torch.randint(0, shape.vocab_size, (1, LENGTH)), label_ids_BS=labels,
        position_ids_BS=torch.arange(LENGTH)[None], document_ids_BS=torch.zeros(1, LENGTH, dtype=torch.int32),
        modality_ids_BS=torch.zeros(1, LENGTH, dtype=torch.int8), num_targets=TARGETS, num_tokens=LENGTH,
    )  # fmt: skip
    kept = Kept(chunk)
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
        chunk(batch)
    return kept.num_bytes
