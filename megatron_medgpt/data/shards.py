"""Dataset folders: the format of ARCHITECTURE 5.6 and its reader (``shard_writer`` writes it).

    dataset.json                 counts, tokenizer fingerprint, store, shards with size and sha256 of every file
    shard-NNNNN.text.{bin,idx}   int32, one document of three sequences per sample:
                                 token ids | target spans as start, end, start, end ... |
                                 [modality, number of images, first image of the sample in this shard, store kind,
                                 body part, view, laterality] (the last three not in schema 1)
    shard-NNNNN.image.{bin,idx}  uint8, one sequence per image: JPEG or PNG bytes, or a pixel record (see ``stored``)
    shard-NNNNN.ids              33 bytes per sample: 32 hexadecimal digits and a line feed
    rejects.jsonl                what was refused and why, by record number
    tokenizer.json               a copy of the tokenizer that made the token ids

An empty .bin cannot be memory-mapped, so a shard without images has no image files, and one without samples no files.
Several samples may name the same image. Everything here is numpy and files: no torch, no pickle.
"""

from __future__ import annotations

import os
import re
import resource
import sys
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_medgpt.config.errors import UsageError, WorkError
from megatron_medgpt.data.index import IndexedFile
from megatron_medgpt.data.manifest import ShardFacts, read_manifest
from megatron_medgpt.data.stored import FACT_NAMES, NUM_FACTS, PIXEL_HEADER, StoredSample, header_of

_ID_BYTES = 33
_ID = re.compile(rb"[0-9a-f]{32}\n")
_MOST_OPEN_SHARDS = 8192
"""Five mapped files each; Linux allows a process 65,530 mappings (vm.max_map_count)."""
_MAPS_OF_A_SHARD = 5
_OTHER_FILES = 512
_MOST_OPEN_FILES = 256
"""Pixel files; many systems allow a process 1024 open files."""


def _check_sizes(folder: Path, facts: ShardFacts) -> None:
    for name, expected in facts.files.items():
        try:
            found = os.stat(folder / name).st_size
        except OSError as error:
            raise WorkError(f"{folder.name}/{name} is missing; restore it or ingest again") from error
        if found != expected["bytes"]:
            raise WorkError(
                f"{folder.name}/{name} has {found} bytes, not {expected['bytes']}; restore it or ingest again"
            )


def _numbers(array: np.ndarray) -> memoryview:
    """An array of int32 or int64 that gives single numbers in a third of the time."""
    return memoryview(array.view(np.uint8)).cast("q" if array.itemsize == 8 else "i")


class _Shard:
    """One open shard, its structure checked."""

    def __init__(self, folder: Path, facts: ShardFacts) -> None:
        self.name = f"{folder.name}/{facts.name}"
        self.text = IndexedFile(folder / f"{facts.name}.text", "int32")
        self.image = IndexedFile(folder / f"{facts.name}.image", "uint8") if facts.num_images else None
        self.ids = np.memmap(folder / f"{facts.name}.ids", f"S{_ID_BYTES}", "r").view(np.ndarray)
        self.num_facts = int(self.text.lengths[2]) if len(self.text) > 2 else 0
        self._check(facts, folder)
        self._items, self._lengths = _numbers(self.text.items), _numbers(self.text.lengths)
        self._pointers = _numbers(self.text.pointers)
        self.num_images = self._meta(1)
        self.token_lengths = self.text.lengths[0::3]

    def _check(self, facts: ShardFacts, folder: Path) -> None:
        at = f"{folder.name}/{facts.name}"
        whole = (
            len(self.text) == 3 * facts.num_samples
            and np.array_equal(self.text.boundaries, np.arange(0, len(self.text) + 1, 3))
            and len(self.ids) == facts.num_samples
            and (0 if self.image is None else len(self.image)) == facts.num_images
            and self.num_facts in NUM_FACTS
            and (self.text.lengths[2::3] == self.num_facts).all()
            and (self.text.lengths[1::3] % 2 == 0).all()
        )
        if not whole:
            raise WorkError(f"{at}: its samples are not token ids, target spans and facts; restore it or ingest again")
        count, first = self._meta(1), self._meta(2)
        if (
            any(self._is_off(place, names) for place, names in FACT_NAMES.values() if place < self.num_facts)
            or ((count < 0) | (first < 0)).any()
            or (first.astype(np.int64) + count > facts.num_images).any()
        ):
            raise WorkError(
                f"{at}: a sample names an image, modality or body part that is not there; restore it or ingest again"
            )

    def _is_off(self, place: int, names: Sequence[str]) -> bool:
        values = self._meta(place)
        return bool(((values < 0) | (values >= len(names))).any())

    @cached_property
    def places_of_images(self) -> tuple[memoryview, memoryview]:
        """Byte pointers and lengths of the image records."""
        return _numbers(self.image.pointers), _numbers(self.image.lengths)

    def row(self, row: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """Token ids, target spans and facts of a sample, which lie one behind the other."""
        first, items = 3 * row, self.text.items
        start = self._pointers[first] // 4
        targets = start + self._lengths[first]
        facts = targets + self._lengths[first + 1]
        return items[start:targets], items[targets:facts], self._items[facts : facts + self.num_facts].tolist()

    def sample_id(self, row: int) -> str:
        stored = bytes(self.ids[row])
        if _ID.fullmatch(stored) is None:
            raise WorkError(f"{self.name}.ids: id {row} is damaged; restore it or ingest again")
        return stored[:-1].decode("ascii")

    def _meta(self, which: int) -> np.ndarray:
        return self.text.items[self.text.pointers[2::3] // 4 + which]


def _room_for_shards(count: int) -> int:
    """How many of ``count`` shards may be open. Python's maps keep their file's descriptor, and many systems allow a
    process 1,024 (204 shards) until it asks for more, which every process may up to the hard limit."""
    soft, hard = (sys.maxsize if n == resource.RLIM_INFINITY else n for n in resource.getrlimit(resource.RLIMIT_NOFILE))
    most = min(count, _MOST_OPEN_SHARDS)
    wanted = min(hard, soft + _MAPS_OF_A_SHARD * most)  # beside those of the other datasets of a blend
    if soft < _OTHER_FILES + _MAPS_OF_A_SHARD * most and wanted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        soft = wanted
    return max(1, min(most, (soft - _OTHER_FILES) // _MAPS_OF_A_SHARD))


class Dataset:
    """An open dataset folder with random access.

    Opening checks the sizes of all files; the structure of a shard is checked when it is first read, its contents by
    ``verify``. So a dataset of 10 million samples opens in a second, however many ranks do.

    Raises:
        UsageError: not a dataset, no samples, or made by another tokenizer.
        WorkError: a file is missing or damaged.
    """

    def __init__(self, folder: str | Path, *, tokenizer_fingerprint: str | None = None) -> None:
        self.folder = Path(folder)
        self.manifest, self.fingerprint = read_manifest(self.folder)
        made_by = self.manifest.tokenizer["sha256"]
        if tokenizer_fingerprint is not None and made_by != tokenizer_fingerprint:
            raise UsageError(
                f"{folder} was made by tokenizer {made_by[:12]}, the run's is {tokenizer_fingerprint[:12]}; "
                "set tokenizer to the one it was made with, or ingest it again"
            )
        if self.manifest.num_samples == 0:
            raise UsageError(f"{folder} holds no samples ({self.manifest.num_records} records, all rejected)")
        for facts in self.manifest.shards:
            _check_sizes(self.folder, facts)
        self._most_open = _room_for_shards(len(self.manifest.shards))
        self._shards: dict[int, _Shard] = {}
        self._image_files: dict[int, BinaryIO] = {}
        self._firsts = list(accumulate((facts.num_samples for facts in self.manifest.shards), initial=0))
        self.image_mark_id: int = self.manifest.tokenizer["image_mark_id"]

    @cached_property
    def token_lengths(self) -> np.ndarray:
        """int32 (samples,): tokens of each sample, an image counted as one."""
        return self._joined(lambda shard: shard.token_lengths)

    @cached_property
    def num_images(self) -> np.ndarray:
        """int32 (samples,): images of each sample."""
        return self._joined(lambda shard: shard.num_images)

    def _joined(self, numbers: Callable[[_Shard], np.ndarray]) -> np.ndarray:
        out = np.empty(len(self), np.int32)
        for number, facts in enumerate(self.manifest.shards):
            if facts.num_samples:  # copied at once: a view would keep its shard's files open
                out[self._firsts[number] : self._firsts[number + 1]] = numbers(self._shard(number))
        return out

    def _shard(self, number: int) -> _Shard:
        shard = self._shards.get(number)
        if shard is None:
            shard = _Shard(self.folder, self.manifest.shards[number])
            if len(self._shards) >= self._most_open:
                self._shards.pop(next(iter(self._shards)), None)
            self._shards[number] = shard
        return shard

    def __len__(self) -> int:
        return self.manifest.num_samples

    def _locate(self, number: int) -> tuple[int, _Shard, int]:
        shard = bisect_right(self._firsts, number) - 1
        return shard, self._shard(shard), number - self._firsts[shard]

    def __getitem__(self, number: int) -> StoredSample:
        number_of_shard, shard, row = self._locate(number)
        token_ids, target_spans, facts = shard.row(row)
        first = facts[2]
        keys = tuple([(number_of_shard, image) for image in range(first, first + facts[1])])
        return StoredSample(token_ids, target_spans, facts[0], keys, shard.sample_id(row))

    def described(self, number: int) -> tuple[str, ...]:
        """What is known of a sample's images, by name: modality, body part, view, laterality."""
        _, shard, row = self._locate(number)
        facts = shard.row(row)[2]
        return tuple(
            names[facts[place]] for place, names in FACT_NAMES.values() if place < len(facts) and facts[place] > 0
        )

    def image(self, key: tuple[int, int]) -> np.ndarray:
        """uint8 record of one image, a view of the file: encoded bytes or a pixel record."""
        return self._shard(key[0]).image[key[1]]

    def read_pixels(self, key: tuple[int, int], out_YXC: np.ndarray) -> None:
        """Read a pixel record into a uint8 (rows, columns, channels) array, contiguous.

        From the file, not from its map: to map the 83 pages of 336 px costs as much again as to copy them.

        Raises:
            WorkError: the record is damaged, or of another size than the array.
        """
        number, image = key
        pointers, lengths = self._shard(number).places_of_images
        header, size = bytearray(PIXEL_HEADER.size), PIXEL_HEADER.size + out_YXC.size
        num_bytes = os.preadv(self._image_file(number).fileno(), (header, out_YXC), pointers[image])
        if header != header_of(out_YXC.shape) or not num_bytes == size == lengths[image]:
            raise WorkError("a stored image is not the pixel record it should be; run medgpt inspect --verify")

    def _image_file(self, number: int) -> BinaryIO:
        # A file that is dropped here closes when nobody reads from it any more: another thread may be about to.
        file = self._image_files.get(number)
        if file is None:
            if len(self._image_files) >= _MOST_OPEN_FILES:
                self._image_files.pop(next(iter(self._image_files)), None)
            file = open(self.folder / f"{self.manifest.shards[number].name}.image.bin", "rb", buffering=0)  # noqa: SIM115
            self._image_files[number] = file
        return file

    def numbers_of(self, sample_ids: frozenset[str]) -> np.ndarray:
        """int64: numbers of the samples that have these ids, ascending. Reads every id of the dataset."""
        wanted = {f"{sample_id}\n".encode() for sample_id in sample_ids}
        found = [
            self._firsts[number] + row
            for number, facts in enumerate(self.manifest.shards) if facts.num_samples
            for row, stored in enumerate(self._shard(number).ids.tolist()) if stored in wanted
        ]  # fmt: skip
        return np.array(found, np.int64)

    def sample_id(self, number: int) -> str:
        _, shard, row = self._locate(number)
        return shard.sample_id(row)
