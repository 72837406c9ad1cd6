"""Where the gradients of a stack of expert weights go: to autograd, or straight into the optimizer's buffer.

A weight may carry ``main_grad``, its part of a buffer in which gradients of several micro-batches add up, and
``grad_added_to_main_grad``, False until something was written there since the buffer was cleared (the attributes of
megatron-core's DistributedDataParallel, 0.16.1 distributed_data_parallel.py:438). A direct sink stores there at the
first micro-batch and adds at the later ones, so that no gradient of the whole stack is ever made beside the buffer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medgpt_kernels.dispatch import check, check_contiguous


def is_direct(weight: Tensor) -> bool:
    """Does the weight have a buffer to write to?"""
    return getattr(weight, "main_grad", None) is not None and hasattr(weight, "grad_added_to_main_grad")


class GradSink:
    """Gradient of one stacked weight (E, ...), given expert by expert.

    Args:
        weight: the parameter itself, not a function of it.
        direct: write into ``weight.main_grad`` where it has one.

    Raises:
        ValueError: ``main_grad`` is not of the weight's shape, or not contiguous.
    """

    def __init__(self, weight: Tensor, *, direct: bool) -> None:
        self._weight = weight
        self.direct = direct and is_direct(weight)
        self.accumulate = self.direct and bool(weight.grad_added_to_main_grad)  # type: ignore[attr-defined]
        self.out: Tensor = weight.main_grad if self.direct else torch.empty_like(weight)  # type: ignore[attr-defined]
        check(
            self.out.shape == weight.shape,
            f"main_grad has shape {tuple(self.out.shape)}; allowed: {tuple(weight.shape)}",
        )
        check_contiguous(weight=weight, main_grad=self.out)
        self._idle = set(range(weight.shape[0]))

    def add_product(self, expert: int, rows_MK: Tensor, grad_MN: Tensor) -> None:
        """``rows^T @ grad``."""
        if self.accumulate or self.out.dtype != rows_MK.dtype:
            self.add(expert, rows_MK.t() @ grad_MN)
            return
        self._idle.discard(expert)
        torch.mm(rows_MK.t(), grad_MN, out=self.out[expert])

    def add(self, expert: int, grad: Tensor) -> None:
        self._idle.discard(expert)
        (self.out[expert].add_ if self.accumulate else self.out[expert].copy_)(grad)

    def finish(self) -> Tensor:
        """What autograd is given for the weight. With a direct sink nobody reads it; it must be there for the hooks
        that wait for it."""
        if not self.accumulate:
            for expert in self._idle:  # no rows, no gradient
                self.out[expert].zero_()
        return self.hand_over()

    def hand_over(self) -> Tensor:
        """``finish`` for one who has written all of ``out``."""
        if not self.direct:
            return self.out
        self._weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        return torch.empty_like(self._weight)
