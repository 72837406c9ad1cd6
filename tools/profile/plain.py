"""The other side of the benchmark: the same model in plain transformers, eager, with torch's AdamW."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LlavaForConditionalGeneration
from workload import Workload

from megatron_medgpt.convert.llava import canonical_name, published_config
from megatron_medgpt.types import MedBatch

LEARNING_RATE = 1e-3
CLIP_GRAD_NORM = 1.0
BETAS = (0.9, 0.95)


class PlainSide:
    """A training step as a plain loop writes it: gradient accumulation, clipping, AdamW.

    Args:
        experts: transformers' experts implementation (``eager`` loops over the experts, ``grouped_mm`` is torch's
            grouped matrix product).
    """

    def __init__(self, workload: Workload, experts: str):
        torch.manual_seed(0)
        config = published_config(workload.model, workload.image_mark_id)
        self.model = LlavaForConditionalGeneration._from_config(
            config, attn_implementation="eager", dtype=torch.float32
        ).train()
        self.model.model.language_model.set_experts_implementation(experts)
        _draw_experts(self.model, workload.model.language.init_std)
        # As the Trainer of transformers chooses by default: AdamW, fused.
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=0.0, fused=True
        )

    def weights(self) -> dict[str, torch.Tensor]:
        """A copy of every tensor under its canonical name."""
        return {canonical_name(name): tensor.clone() for name, tensor in self.model.state_dict().items()}

    def step(self, batches: Sequence[MedBatch]) -> tuple[float, float]:
        """One optimizer step; returns the mean loss of the targets and the gradient's norm before clipping."""
        num_targets = sum(batch.num_targets for batch in batches)
        self.optimizer.zero_grad()
        loss_sum = 0.0
        for batch in batches:
            output = self.model(
                input_ids=batch.token_ids_BS, pixel_values=batch.pixels_ICYX, position_ids=batch.position_ids_BS,
                labels=batch.label_ids_BS, shift_labels=batch.label_ids_BS, num_items_in_batch=num_targets,
                use_cache=False,
            )  # fmt: skip
            output.loss.backward()
            loss_sum += output.loss.item()
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_GRAD_NORM)
        self.optimizer.step()
        return loss_sum, grad_norm.item()


def _draw_experts(model: torch.nn.Module, std: float) -> None:
    """Give routers and experts weights that differ, so that all experts are chosen as they are in training."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mlp.router.weight" in name or ".mlp.experts." in name:
                parameter.normal_(std=std)
