"""Image rows take the places of their marks in the text embeddings.

Everything here slices with plain integers known on the host, so nothing waits for the device. Under sequence
parallelism each tensor rank works on its own positions ``[first, first + S_local)`` and nothing is gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_medgpt.types import ImageSpan


@dataclass(frozen=True, slots=True)
class ImageRun:
    """Consecutive tokens of one image that lie inside a slice of the sequence."""

    row: int
    """Row of the micro-batch."""
    start: int
    """First position, counted from the start of the slice."""
    image: int
    offset: int
    """First token of the image that is used; more than 0 when the slice cuts the span."""
    length: int


def image_runs(spans: Sequence[ImageSpan], *, first: int, end: int) -> tuple[ImageRun, ...]:
    """The parts of ``spans`` that lie in the positions ``[first, end)``, in the order of the spans."""
    runs = []
    for span in spans:
        begin = max(span.start, first)
        stop = min(span.start + span.num_tokens, end)
        if begin < stop:
            runs.append(ImageRun(span.row, begin - first, span.image, begin - span.start, stop - begin))
    return tuple(runs)


def take_image_rows(features_IPF: Tensor, runs: Sequence[ImageRun]) -> Tensor:
    """Features of the runs, one after the other: (I, P, F) to (N, F), N the sum of the runs' lengths.

    Takes part in autograd also with no runs or no images. An image that several runs name receives the sum of their
    gradients.
    """
    num_images, num_tokens, _ = features_IPF.shape
    whole = tuple((i, 0, num_tokens) for i in range(num_images))
    if tuple((run.image, run.offset, run.length) for run in runs) == whole:
        return features_IPF.flatten(0, 1)  # every image once and whole, the common case, costs no copy
    return _TakeRows.apply(features_IPF, tuple(runs))


def merge_images(text_SBH: Tensor, rows_NH: Tensor, runs: Sequence[ImageRun]) -> Tensor:
    """Text embeddings with the image rows at the places of the runs.

    The gradient at those places goes to the rows (and is 0 for the text, so the mark's embedding does not learn);
    everywhere else it goes to the text.

    Args:
        text_SBH: embeddings of this rank's slice of the sequence, (S_local, B, H); not changed.
        rows_NH: projected rows of the runs, one run after the other, as ``take_image_rows`` orders them.
        runs: from ``image_runs`` for the same slice; they do not overlap.

    Returns:
        A tensor like ``text_SBH``.

    Raises:
        ValueError: the number of rows is not what the runs need.
    """
    needed = sum(run.length for run in runs)
    if rows_NH.shape[0] != needed:
        raise ValueError(f"{rows_NH.shape[0]} image rows for runs of {needed} tokens")
    return _Merge.apply(text_SBH, rows_NH, tuple(runs))


class _TakeRows(torch.autograd.Function):
    """Slices of the images. Plain slicing would build a full-size zero gradient for every run."""

    @staticmethod
    def forward(ctx, features_IPF: Tensor, runs: tuple[ImageRun, ...]) -> Tensor:
        ctx.runs, ctx.shape = runs, features_IPF.shape
        if not runs:
            return features_IPF.new_empty((0, features_IPF.shape[-1]))
        return torch.cat([features_IPF[run.image, run.offset : run.offset + run.length] for run in runs])

    @staticmethod
    def backward(ctx, grad_NF: Tensor):
        grad_IPF = grad_NF.new_zeros(ctx.shape)
        for run, grad in zip(ctx.runs, grad_NF.split([run.length for run in ctx.runs])):
            grad_IPF[run.image, run.offset : run.offset + run.length] += grad
        return grad_IPF, None


class _Merge(torch.autograd.Function):
    """One copy forward, one copy backward, however many runs; a chain of slice assignments would copy per run."""

    @staticmethod
    def forward(ctx, text_SBH: Tensor, rows_NH: Tensor, runs: tuple[ImageRun, ...]) -> Tensor:
        ctx.runs, ctx.rows_dtype = runs, rows_NH.dtype
        merged_SBH = text_SBH.clone()
        for run, rows in zip(runs, rows_NH.split([run.length for run in runs])):
            merged_SBH[run.start : run.start + run.length, run.row] = rows
        return merged_SBH

    @staticmethod
    def backward(ctx, grad_SBH: Tensor):
        grad_text, grad_rows = ctx.needs_input_grad[:2]
        places = [(slice(run.start, run.start + run.length), run.row) for run in ctx.runs]
        rows_NH = text_SBH = None
        if grad_rows:
            parts = [grad_SBH[place] for place in places]
            rows_NH = torch.cat(parts) if parts else grad_SBH.new_empty((0, grad_SBH.shape[-1]))
            rows_NH = rows_NH.to(ctx.rows_dtype)
        if grad_text:
            text_SBH = grad_SBH.clone() if places else grad_SBH
            for place in places:
                text_SBH[place] = 0
        return text_SBH, rows_NH, None
