"""How the experts share the work, by imaging modality and by kind of token: router health under domain shift."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from megatron_medgpt.train.build import Parts
from megatron_medgpt.types import MODALITIES


def expert_metrics(parts: Parts) -> dict[str, object]:
    """Loads since the last call, over all ranks and layers; then counting starts anew. Collective.

    Returns:
        ``expert_load``: ``{"ct image": [share of routed tokens per expert]}``, averaged over layers.
        ``expert_entropy``: the same keys; 1 when all experts are used alike, 0 when one takes everything.
        ``router_balance_loss`` and ``router_z_loss`` per target, when the stage has these losses.
    """
    num_layers = parts.config.model.language.num_layers
    loads, losses = None, torch.zeros(num_layers, 2, dtype=torch.float64, device=parts.device)
    for model in parts.models:
        load_LCE = model.expert_load()
        if loads is None:
            loads = torch.zeros(num_layers, *load_LCE.shape[1:], dtype=torch.int64, device=parts.device)
        layers = slice(model.first_layer, model.first_layer + load_LCE.shape[0])
        loads[layers] += load_LCE
        losses[layers] += model.router_losses()
        model.reset_expert_load()
    assert loads is not None
    dist.all_reduce(loads)
    dist.all_reduce(losses)
    metrics: dict[str, object] = {"expert_load": {}, "expert_entropy": {}}
    shares_CE, used = _mean_shares(loads.cpu())
    for category in used:
        name = f"{MODALITIES[category // 2]} {'image' if category % 2 else 'text'}"
        metrics["expert_load"][name] = [round(x, 5) for x in shares_CE[category].tolist()]  # type: ignore[index]
        metrics["expert_entropy"][name] = round(_entropy(loads[:, category].cpu()), 5)  # type: ignore[index]
    return metrics


def _mean_shares(load_LCE: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """Share of every expert, averaged over layers, and the categories that had any token."""
    total_LC1 = load_LCE.sum(-1, keepdim=True).clamp(min=1)
    used = torch.nonzero(load_LCE.sum((0, 2))).flatten().tolist()
    return (load_LCE / total_LC1).mean(0), used


def _entropy(load_LE: torch.Tensor) -> float:
    """Mean over layers of the load's entropy as a share of the largest possible."""
    shares = load_LE / load_LE.sum(-1, keepdim=True).clamp(min=1)
    nats = -(shares * shares.clamp(min=1e-12).log()).sum(-1)
    return float(nats.mean() / math.log(max(load_LE.shape[-1], 2)))
