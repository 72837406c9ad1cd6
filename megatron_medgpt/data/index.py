"""The .bin/.idx file pair of megatron-core's indexed datasets: written here, checked here, mapped here.

Layout of ``.idx`` (little endian; megatron/core/datasets/indexed_dataset.py): ``MMIDIDX\\0\\0``, uint64 version 1,
uint8 dtype code, uint64 number of sequences, uint64 number of document boundaries, int32 lengths (in items), int64 byte
pointers, int64 document boundaries. ``.bin`` holds the sequences back to back.

megatron-core's own reader opens these files and its builder writes the same bytes (both tested). It is not used here
for two reasons: it takes a length, pointer or dtype that was damaged and returns other bytes without a word (measured
on 0.16.1: six of nine faults silent), and importing it costs 5 s, which ``medgpt ingest`` and its workers need not pay.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np

from megatron_medgpt.config.errors import WorkError

MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPE_CODES = {1: np.dtype("uint8"), 4: np.dtype("<i4")}
_BLOCK = 1 << 20
"""Sequences checked at a time: opening 3e7 of them needs 16 MiB, not 480."""


class IndexedWriter:
    """Writes one .bin/.idx pair; nothing is complete before ``close``."""

    def __init__(self, prefix: Path, dtype: str) -> None:
        self.prefix = prefix
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self._lengths: list[int] = []
        self._boundaries = [0]
        self._bin = open(f"{prefix}.bin", "wb")  # noqa: SIM115 - closed by ``close``

    @property
    def num_sequences(self) -> int:
        return len(self._lengths)

    def add(self, items: np.ndarray | bytes) -> None:
        """Append one sequence."""
        array = np.frombuffer(items, np.uint8) if isinstance(items, bytes) else np.asarray(items)
        self._bin.write(np.ascontiguousarray(array, self.dtype).data)
        self._lengths.append(array.size)

    def end_document(self) -> None:
        """Close a document: it holds the sequences added since the last call."""
        self._boundaries.append(len(self._lengths))

    def close(self) -> None:
        """Write the index and flush both files to the disk."""
        lengths = np.asarray(self._lengths, "<i4")
        pointers = np.zeros(lengths.size, "<i8")
        np.cumsum(lengths[:-1].astype(np.int64) * self.dtype.itemsize, out=pointers[1:])
        code = next(code for code, dtype in _DTYPE_CODES.items() if dtype == self.dtype)
        with open(f"{self.prefix}.idx", "wb") as idx:
            idx.write(_HEADER.pack(MAGIC, 1, code, lengths.size, len(self._boundaries)))
            for array in (lengths, pointers, np.asarray(self._boundaries, "<i8")):
                idx.write(array.tobytes())
            idx.flush()
            os.fsync(idx.fileno())
        self._bin.flush()
        os.fsync(self._bin.fileno())
        self._bin.close()


class IndexedFile:
    """A checked, memory-mapped .bin/.idx pair. ``file[i]`` is sequence i, a read-only view.

    Raises:
        WorkError: a file is missing or its structure is not consistent (every length, pointer and boundary is checked).
    """

    def __init__(self, prefix: Path, dtype: str) -> None:
        self.prefix = prefix
        self.dtype = np.dtype(dtype).newbyteorder("<")
        try:
            # A plain view: slicing np.memmap itself takes ten times as long.
            raw = np.memmap(f"{prefix}.idx", np.uint8, "r").view(np.ndarray)
            size_bytes = os.path.getsize(f"{prefix}.bin")
        except (OSError, ValueError) as error:
            raise WorkError(f"{prefix.name}: cannot be opened ({error}); restore the file or ingest again") from error
        if raw.size < _HEADER.size:
            self._damaged("the index is shorter than its header")
        magic, version, code, num_sequences, num_boundaries = _HEADER.unpack(raw[: _HEADER.size].tobytes())
        if magic != MAGIC or version != 1 or _DTYPE_CODES.get(code) != self.dtype:
            self._damaged(f"the index is not version 1 of {self.dtype}")
        if raw.size != _HEADER.size + 12 * num_sequences + 8 * num_boundaries:
            self._damaged(f"the index has {raw.size} bytes, not what its {num_sequences} sequences need")
        at = _HEADER.size
        self.lengths = raw[at : at + 4 * num_sequences].view("<i4")
        at += 4 * num_sequences
        self.pointers = raw[at : at + 8 * num_sequences].view("<i8")
        self.boundaries = raw[at + 8 * num_sequences :].view("<i8")
        self._check(size_bytes)
        self.items = np.empty(0, self.dtype)
        if size_bytes:
            self.items = np.memmap(f"{prefix}.bin", self.dtype, "r").view(np.ndarray)

    def _damaged(self, what: str) -> None:
        raise WorkError(f"{self.prefix.name}: {what}; the file is damaged, restore it or ingest again")

    def _check(self, size_bytes: int) -> None:
        end = 0
        for first in range(0, self.lengths.size, _BLOCK):
            lengths = self.lengths[first : first + _BLOCK].astype(np.int64) * self.dtype.itemsize
            if lengths.min() < 0:
                self._damaged("a sequence has a negative length")
            ends = end + np.cumsum(lengths)
            if not np.array_equal(self.pointers[first : first + _BLOCK], ends - lengths):
                self._damaged("a pointer does not follow from the lengths")
            end = int(ends[-1])
        if end != size_bytes:
            self._damaged(f"the index needs {end} bytes of data, the .bin file has {size_bytes}")
        boundaries = self.boundaries
        if boundaries.size == 0 or boundaries[0] != 0 or boundaries[-1] != self.lengths.size:
            self._damaged("the document boundaries do not cover the sequences")
        if (np.diff(boundaries) < 0).any():
            self._damaged("the document boundaries are not in order")

    def __len__(self) -> int:
        return self.lengths.size

    def __getitem__(self, number: int) -> np.ndarray:
        start = int(self.pointers[number]) // self.dtype.itemsize
        return self.items[start : start + int(self.lengths[number])]
