"""The likeliest next token where the vocabulary is split over tensor ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def likeliest(logits_NV: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Token ids (N,) int64 of the greatest logits, the lowest id of equal ones; the same on every rank of ``group``.

    Args:
        logits_NV: this rank's slice of the vocabulary, slices in the order of the ranks.
    """
    best_N, ids_N = logits_NV.max(dim=-1)
    if group.size() == 1:
        return ids_N
    ids_N = ids_N + group.rank() * logits_NV.shape[1]
    all_best = [torch.empty_like(best_N) for _ in range(group.size())]
    all_ids = [torch.empty_like(ids_N) for _ in range(group.size())]
    dist.all_gather(all_best, best_N, group=group)
    dist.all_gather(all_ids, ids_N, group=group)
    winner_1N = torch.stack(all_best).argmax(dim=0, keepdim=True)
    return torch.stack(all_ids).gather(0, winner_1N)[0]
