"""The options of a question as branches of one text: picture and question are read once, whatever the options.

A tree is a row of tokens. Its trunk is what all options share, without the last token; each branch begins with that
token, so that it predicts the branch's own first token, and goes on with the option. Positions of a branch continue the
trunk's, and it sees the trunk and itself alone (``MedBatch.branch_ids_BS``): the losses are those of each option's text
by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_medgpt.data.collate import Document, RowShape, collate
from megatron_medgpt.data.pixels import PixelSource
from megatron_medgpt.evaluate.documents import Scored, pixel_reader
from megatron_medgpt.types import MedBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class Tree:
    """Some options of one question, in the order of the question. An image is one mark."""

    token_ids: np.ndarray
    """int (n,): trunk, branch, branch, ..."""
    branch_ids: np.ndarray
    """int32 (n,): 0 on the trunk, 1, 2, ... on the branches."""
    targets: tuple[tuple[int, int], ...]
    """Half-open ``[start, end)`` of the scored tokens of every branch, in ``token_ids``."""
    length: int
    """Positions, images counted in full."""


def trees_of(documents: Sequence[Scored], *, image_mark_id: int, tokens_per_image: int, longest: int) -> list[Tree]:
    """As few trees as hold the options of one question, none longer than ``longest``; none when an option cannot fit.

    Args:
        documents: the text of each option with its one scored span (``documents.option_documents``).
    """
    trunk_size = _shared(documents)
    trunk = documents[0][0][:trunk_size]
    trunk_length = trunk_size + int((trunk == image_mark_id).sum()) * (tokens_per_image - 1)
    trees: list[list[Scored]] = [[]]
    used = trunk_length
    for document in documents:
        branch_length = document[0].size - trunk_size
        if trunk_length + branch_length > longest:
            return []
        if used + branch_length > longest:
            trees.append([])
            used = trunk_length
        trees[-1].append(document)
        used += branch_length
    return [_tree(trunk, trunk_length, members) for members in trees]


def _shared(documents: Sequence[Scored]) -> int:
    """Tokens of the trunk: what all options begin with, and no token that predicts or is scored."""
    first = documents[0][0]
    size = min(spans[0][0] for _, spans in documents) - 1
    for ids, _ in documents[1:]:
        apart = np.flatnonzero(ids[:size] != first[:size])
        size = int(apart[0]) if apart.size else size
    return size


def _tree(trunk: np.ndarray, trunk_length: int, members: Sequence[Scored]) -> Tree:
    ids, numbers, targets = [trunk], [np.zeros(trunk.size, np.int32)], []
    end = trunk.size
    for number, (document, spans) in enumerate(members, 1):
        branch = document[trunk.size :]
        ids.append(branch)
        numbers.append(np.full(branch.size, number, np.int32))
        targets.append((end + spans[0][0] - trunk.size, end + spans[0][1] - trunk.size))
        end += branch.size
    return Tree(
        token_ids=np.concatenate(ids), branch_ids=np.concatenate(numbers), targets=tuple(targets),
        length=trunk_length + end - trunk.size,
    )  # fmt: skip


def batch_of_trees(
    rows: Sequence[tuple[Tree, tuple[bytes, ...]]], *, num_rows: int, shape: RowShape, source: PixelSource | None,
    keep: tuple[int, int] | None,
) -> MedBatch:  # fmt: skip
    """One micro-batch of ``num_rows`` rows with a tree and its encoded picture in each, the others padding.

    Args:
        source: gives the pixels; None leaves them out.
    """
    documents = []
    for tree, pictures in rows:
        num_marks = int((tree.token_ids == shape.image_mark_id).sum())
        documents.append(
            [Document(tree.token_ids, np.asarray(tree.targets, np.int64).reshape(-1), pictures * num_marks)]
        )
    documents += [[] for _ in range(num_rows - len(rows))]
    batch = collate(documents, shape, keep=keep, pixels=None if source is None else pixel_reader(source))
    positions_BS, branches_BS = batch.position_ids_BS.clone(), torch.zeros_like(batch.document_ids_BS)
    for row, (tree, _) in enumerate(rows):
        widths = _widths(tree, shape)
        branches_BS[row, : tree.length] = torch.from_numpy(np.repeat(tree.branch_ids, widths))
        positions_BS[row, : tree.length] = torch.from_numpy(_positions(tree, widths))
    return replace(batch, position_ids_BS=positions_BS, branch_ids_BS=branches_BS)


def loss_spans(tree: Tree, shape: RowShape) -> list[tuple[int, int]]:
    """Half-open positions of a tree's row at which the losses of each branch stand: one before its targets."""
    starts = np.concatenate([[0], np.cumsum(_widths(tree, shape))])
    return [(int(starts[start]) - 1, int(starts[end]) - 1) for start, end in tree.targets]


def _widths(tree: Tree, shape: RowShape) -> np.ndarray:
    """Positions that each token fills."""
    return np.where(tree.token_ids == shape.image_mark_id, shape.tokens_per_image, 1)


def _positions(tree: Tree, widths: np.ndarray) -> np.ndarray:
    """(length,) int64: 0, 1, ... on the trunk; on every branch what follows the trunk."""
    branch_widths = np.bincount(tree.branch_ids, weights=widths).astype(np.int64)
    first = np.minimum(np.arange(branch_widths.size), 1) * branch_widths[0]
    return np.concatenate([start + np.arange(width) for start, width in zip(first, branch_widths)])
