"""Documents laid out in rows: the last door before the model, where marks are counted against images.

Every check that needs the host is made here; the model trusts the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_medgpt.config.errors import UsageError, WorkError
from megatron_medgpt.data.pixels import PixelSource
from megatron_medgpt.types import IGNORE_INDEX, ImageSpan, MedBatch


@dataclass(frozen=True, slots=True, eq=False)
class Document:
    """One sample on its way into a row."""

    token_ids: np.ndarray
    """int (n,); an image is one mark."""
    target_spans_flat: np.ndarray
    """int (2k,): start, end, start, end ... of the targets in ``token_ids``."""
    image_keys: tuple[Hashable, ...] = ()
    """What the pixels of each mark are asked for with; equal keys are one image."""
    modality: int = 0
    sample_id: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowShape:
    """What collate must know to lay out rows."""

    sequence_length: int
    image_mark_id: int
    pad_id: int
    tokens_per_image: int


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a document came to lie: positions ``[start, end)`` of row ``row``."""

    row: int
    start: int
    end: int


def length_of(document: Document, tokens_per_image: int) -> int:
    """Positions that a document fills."""
    return document.token_ids.size + len(document.image_keys) * (tokens_per_image - 1)


def collate(
    rows: Sequence[Sequence[Document]],
    shape: RowShape,
    *,
    keep: tuple[int, int] | None = None,
    pixels: Callable[[list[Hashable]], Tensor] | None = None,
) -> MedBatch:
    """Lay documents out as one micro-batch.

    Args:
        rows: documents of each row, in order.
        keep: positions ``[first, end)`` that this tensor-parallel rank owns; only images that reach into them are
            listed and asked for. None is the whole row.
        pixels: gives float32 (I, 3, size, size) of the keys; None leaves the pixels out and lists the spans all the
            same (later pipeline stages count image tokens by them).

    Raises:
        WorkError: marks and images do not match, or a row is longer than the sequence: the shard is damaged.
    """
    size = (len(rows), shape.sequence_length)
    token_ids, labels = np.full(size, shape.pad_id, np.int64), np.full(size, IGNORE_INDEX, np.int64)
    positions, documents = np.zeros(size, np.int64), np.zeros(size, np.int32)
    modalities = np.full(size, -1, np.int8)
    number_of_key: dict[Hashable, int] = {}
    spans: list[ImageSpan] = []
    num_tokens = num_images = 0
    first_kept, end_kept = keep or (0, shape.sequence_length)
    for row, row_documents in enumerate(rows):
        end = 0
        for number, document in enumerate(row_documents):
            ids, targets, starts = _expand(document, shape)
            start, end = end, end + ids.size
            if end > shape.sequence_length:
                raise WorkError(f"a row needs {end} positions, the sequence has {shape.sequence_length}")
            token_ids[row, start:end] = ids
            labels[row, start : end - 1] = np.where(targets[1:], ids[1:], IGNORE_INDEX)
            positions[row, start:end] = np.arange(ids.size)
            documents[row, start:end] = number
            modalities[row, start:end] = document.modality
            num_tokens += ids.size
            num_images += len(document.image_keys)
            for offset, key in zip(starts, document.image_keys, strict=True):
                at = start + offset
                if at < end_kept and at + shape.tokens_per_image > first_kept:
                    image = number_of_key.setdefault(key, len(number_of_key))
                    spans.append(ImageSpan(row=row, start=at, image=image, num_tokens=shape.tokens_per_image))
        positions[row, end:] = np.arange(shape.sequence_length - end)
        documents[row, end:] = len(row_documents)
    return MedBatch(
        token_ids_BS=torch.from_numpy(token_ids), label_ids_BS=torch.from_numpy(labels),
        position_ids_BS=torch.from_numpy(positions), document_ids_BS=torch.from_numpy(documents),
        modality_ids_BS=torch.from_numpy(modalities),
        pixels_ICYX=None if pixels is None else pixels(list(number_of_key)), image_spans=tuple(spans),
        num_targets=int((labels != IGNORE_INDEX).sum()), num_tokens=num_tokens, num_images=num_images,
        num_documents=sum(map(len, rows)),
        sample_ids=tuple(document.sample_id for row in rows for document in row),
    )  # fmt: skip


def _expand(document: Document, shape: RowShape) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Token ids with every mark repeated for its image, which of them are targets, and where each image starts."""
    ids = document.token_ids
    marks = np.flatnonzero(ids == shape.image_mark_id)
    if marks.size != len(document.image_keys):
        raise WorkError(
            f"sample {document.sample_id} has {marks.size} image marks and {len(document.image_keys)} images; "
            "the shard is damaged, run medgpt inspect --verify"
        )
    targets = np.zeros(ids.size, bool)
    for start, end in document.target_spans_flat.reshape(-1, 2).tolist():
        targets[start:end] = True
    if marks.size == 0:
        return ids, targets, []
    repeats = np.ones(ids.size, np.int64)
    repeats[marks] = shape.tokens_per_image
    starts = marks + np.arange(marks.size) * (shape.tokens_per_image - 1)
    return np.repeat(ids, repeats), np.repeat(targets, repeats), starts.tolist()


def pack_documents(lengths: Sequence[int], sequence_length: int) -> list[list[int]]:
    """Rows of document numbers, best-fit-decreasing; for a handful of documents (evaluation), not for an epoch.

    Raises:
        UsageError: a document is longer than a row.
    """
    rows: list[list[int]] = []
    left: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[number] > sequence_length:
            raise UsageError(
                f"a document needs {lengths[number]} positions, the sequence has {sequence_length}; "
                f"set a sequence length of at least {lengths[number]}"
            )
        fitting = [row for row, free in enumerate(left) if free >= lengths[number]]
        row = min(fitting, key=lambda i: left[i], default=len(rows))
        if row == len(rows):
            rows.append([])
            left.append(sequence_length)
        rows[row].append(number)
        left[row] -= lengths[number]
    return rows


def batch_of_documents(
    documents: Sequence[tuple[np.ndarray, Sequence[tuple[int, int]], Sequence[bytes]]],
    *,
    shape: RowShape,
    source: PixelSource | None,
    num_rows: int | None = None,
    keep: tuple[int, int] | None = None,
    with_pixels: bool = True,
) -> tuple[MedBatch, list[Placement]]:
    """One micro-batch of given documents, for scoring: each is (token ids, target spans, encoded images).

    Documents with the same image bytes share one entry of ``pixels_ICYX``, so four options of a question encode their
    image once.

    Args:
        num_rows: rows of the batch, empty ones filled with padding; as many as the documents need when None.

    Returns:
        The batch, and where each document lies, in the order given. Its positions are
        ``batch.label_ids_BS[p.row, p.start : p.end]``.

    Raises:
        UsageError: the documents do not fit.
    """
    prepared = [
        Document(
            np.asarray(ids), np.asarray(spans, np.int64).reshape(-1), tuple(bytes(i) for i in images), 0, str(number)
        )
        for number, (ids, spans, images) in enumerate(documents)
    ]
    lengths = [length_of(document, shape.tokens_per_image) for document in prepared]
    rows = pack_documents(lengths, shape.sequence_length)
    if num_rows is not None:
        if len(rows) > num_rows:
            raise UsageError(
                f"{len(documents)} documents need {len(rows)} rows of {shape.sequence_length}, not {num_rows}"
            )
        rows += [[] for _ in range(num_rows - len(rows))]
    placements: list[Placement] = [Placement(0, 0, 0)] * len(documents)
    for row, numbers in enumerate(rows):
        end = 0
        for number in numbers:
            placements[number] = Placement(row, end, end + lengths[number])
            end += lengths[number]
    read = None
    if with_pixels and source is not None:

        def read(keys: list[Hashable]) -> Tensor:
            return source.read(keys, lambda key: ("encoded", np.frombuffer(key, np.uint8)))

    batch = collate([[prepared[i] for i in numbers] for numbers in rows], shape, keep=keep, pixels=read)
    return batch, placements
