"""Conversion as data: rows that pair one of our tensors with published ones, and the two ways through them.

Nothing is left over in either direction: a tensor that no row names, and a row whose tensor is missing, are errors.
What a published model holds and ours does not use is named by the table, and reported.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_medgpt.config.errors import WorkError
from megatron_medgpt.convert.layout import SAME, Move


@dataclass(frozen=True, slots=True)
class Row:
    """One of our tensors and the published ones it is made of."""

    ours: str
    published: tuple[str, ...]
    move: Move = SAME


@dataclass(frozen=True, slots=True)
class Constant:
    """A published tensor that our model does not hold and that changes nothing of what it computes."""

    published: str
    shape: tuple[int, ...]
    value: float


@dataclass(frozen=True, slots=True)
class Table:
    """The rows of a model."""

    rows: tuple[Row, ...]
    unused: tuple[str, ...] = ()
    """Regular expressions of published tensors that our model has no place for."""
    constants: tuple[Constant, ...] = ()
    """Written on the way out so that the published model is whole; the way in takes them for unused."""

    def __add__(self, other: Table) -> Table:
        return Table(self.rows + other.rows, self.unused + other.unused, self.constants + other.constants)

    def check_published(self, names: Iterable[str], where: str = "published model") -> list[str]:
        """The names that are not used.

        Raises:
            WorkError: a tensor is missing, or one is left over.
        """
        names = set(names)
        wanted = [name for row in self.rows for name in row.published]
        _refuse_missing(wanted, names, where)
        left = sorted(names - set(wanted))
        pattern = re.compile("|".join(self.unused) or r"(?!)")
        _refuse_leftover([name for name in left if not pattern.fullmatch(name)], where)
        return left

    def check_ours(self, names: Iterable[str], where: str = "checkpoint") -> None:
        """Raise WorkError when a tensor is missing, or one is left over."""
        names = set(names)
        _refuse_missing([row.ours for row in self.rows], names, where)
        _refuse_leftover(sorted(names - {row.ours for row in self.rows}), where)

    def to_ours(self, published: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Our tensors under our names, and the names of the published ones that are not used.

        Raises:
            WorkError: a tensor is missing, or one is left over.
        """
        left = self.check_published(published)
        return {row.ours: row.move.to_ours([published[name] for name in row.published]) for row in self.rows}, left

    def to_published(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The published tensors under their published names.

        Raises:
            WorkError: a tensor is missing, or one is left over.
        """
        self.check_ours(ours)
        return {
            name: tensor
            for row in self.rows
            for name, tensor in zip(row.published, row.move.to_published(ours[row.ours]))
        }


def _refuse_missing(wanted: Sequence[str], found: Iterable[str], where: str) -> None:
    missing = sorted(set(wanted) - set(found))
    if missing:
        raise WorkError(f"the {where} lacks {len(missing)} of {len(wanted)} tensors, the first: {missing[0]}")


def _refuse_leftover(left: Sequence[str], where: str) -> None:
    if left:
        raise WorkError(f"the {where} holds {len(left)} tensors that no row of the table names, the first: {left[0]}")
