"""Cross entropy of all logits at once, in plain torch; gradients by autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def cross_entropy(hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Loss of every token, (T,), at least fp32; 0 where the label is ``ignore_index``."""
    logits_TV = (hidden_TH @ weight_VH.t()).to(torch.promote_types(hidden_TH.dtype, torch.float32))
    is_target_T = labels_T != ignore_index
    target_T = logits_TV.gather(1, torch.where(is_target_T, labels_T, torch.zeros_like(labels_T))[:, None])[:, 0]
    return torch.where(is_target_T, torch.logsumexp(logits_TV, -1) - target_T, torch.zeros_like(target_T))
