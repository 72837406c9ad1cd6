"""The data of a stage: rows by number (``prefetch`` prepares the next ones in a thread).

A row's number counts through all epochs and all data-parallel ranks, so position is one integer, any number of ranks
sees one global order, and resuming is asking for the next number.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.config.schema import AugmentConfig, BlendConfig
from megatron_medgpt.data.augment import augmented, draws
from megatron_medgpt.data.collate import Document, RowShape, collate
from megatron_medgpt.data.mix import Member, draw_epoch, whole_passes
from megatron_medgpt.data.pack import EpochPlan, plan_epoch
from megatron_medgpt.data.pixels import PixelSource, Reader
from megatron_medgpt.data.plans import EpochPlans
from megatron_medgpt.data.shards import Dataset
from megatron_medgpt.data.square import pad_rgb
from megatron_medgpt.types import ImageSpec, MedBatch

log = logging.getLogger(__name__)
PLAN_VERSION = 1
"""Raised whenever the same inputs would give another order."""
_STEPS_KEPT = 8


def open_stage(
    blend: Sequence[BlendConfig],
    *,
    tokenizer_fingerprint: str | None,
    image: ImageSpec | None,
    sequence_length: int,
    seed: int,
    reader: Reader = "auto",
    drop_over_long: bool = False,
    excluded: frozenset[str] = frozenset(),
    cache_bytes: int = 1 << 29,
    rows_per_step: int = 1,
    augment: AugmentConfig | None = None,
    plans_folder: Path | None = None,
    device: torch.device | None = None,
) -> StageData:
    """Open the datasets of a stage.

    Args:
        image: what the encoder wants; None for stages without images.
        drop_over_long: leave out samples that do not fit a row (counted in ``num_over_long``) rather than refuse them.
        excluded: ids of samples to leave out (counted in ``num_excluded``).
        cache_bytes: memory for ready 8-bit images of this process.
        rows_per_step: rows of an optimizer step. Within each step they are put in order of their images, so that the
            rows that data-parallel ranks work on at one time hold about the same number.
        augment: changes of pictures; None shows them as they are.
        plans_folder: where plans of large epochs are kept for other ranks and later runs.
        device: of this rank; where it is a GPU, DALI decodes there. Batches come on the CPU all the same.

    Raises:
        UsageError: a folder is no dataset, of another tokenizer, stored for another encoder, or has samples that do
            not fit a row.
        WorkError: a dataset is damaged.
    """
    datasets = [Dataset(entry.path, tokenizer_fingerprint=tokenizer_fingerprint) for entry in blend]
    return StageData(
        datasets, [entry.weight for entry in blend], image=image, sequence_length=sequence_length, seed=seed,
        reader=reader, drop_over_long=drop_over_long, excluded=excluded, cache_bytes=cache_bytes,
        rows_per_step=rows_per_step, augment=augment, plans_folder=plans_folder, device=device,
    )  # fmt: skip


class StageData:
    """Random access to the packed rows of a stage. Made by ``open_stage``."""

    def __init__(
        self,
        datasets: Sequence[Dataset],
        weights: Sequence[float],
        *,
        image: ImageSpec | None,
        sequence_length: int,
        seed: int,
        reader: Reader,
        drop_over_long: bool,
        excluded: frozenset[str],
        cache_bytes: int,
        rows_per_step: int,
        augment: AugmentConfig | None,
        plans_folder: Path | None,
        device: torch.device | None,
    ) -> None:
        self._datasets = datasets
        self.sequence_length, self.seed, self.image = sequence_length, seed, image
        self.rows_per_step = rows_per_step
        self.augment = None if augment == AugmentConfig() else augment
        self._check_images(image)
        tokens_per_image = image.num_tokens if image else 1
        made_by = datasets[0].manifest.tokenizer
        if any(dataset.manifest.tokenizer != made_by for dataset in datasets):
            raise UsageError("the datasets of a stage were made by different tokenizers; ingest them with one")
        self.vocab_size: int = made_by["vocab_size"]
        self.shape = RowShape(
            sequence_length=sequence_length, image_mark_id=made_by["image_mark_id"], pad_id=made_by["pad_id"],
            tokens_per_image=tokens_per_image,
        )  # fmt: skip
        self._firsts = np.cumsum([0, *map(len, datasets)])
        self._members = [
            Member(fingerprint=d.fingerprint, num_samples=len(d), weight=w) for d, w in zip(datasets, weights)
        ]
        self._drop_over_long, self._excluded = drop_over_long, excluded
        self.plan_hash = self._hash()
        self._plans = EpochPlans(self._make_plan, self.plan_hash, plans_folder)
        self._step_orders: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()
        self._first_rows = [0]  # first row of each epoch known so far
        self.num_rows_per_epoch = self._plans[0].num_rows
        """Rows of epoch 0; every epoch has as many when the weights are whole numbers."""
        if self.num_rows_per_epoch == 0:
            others = " or leave fewer samples out (exclude)" if excluded else ""
            raise UsageError(
                f"no sample is left for this stage; raise the weights of its data or sequence_length{others}"
            )
        self.pixels = PixelSource(image, reader, cache_bytes, device) if image else None

    def _check_images(self, image: ImageSpec | None) -> None:
        for dataset in self._datasets:
            store = dataset.manifest.store
            if image is None and dataset.manifest.num_images:
                raise UsageError(f"{dataset.folder} has images and the stage has no encoder; use a dataset without")
            if image and store.kind == "pixels" and (store.size_px, store.pad_rgb) != (image.size_px, pad_rgb(image)):
                raise UsageError(
                    f"{dataset.folder} stores pixels for an encoder of {store.size_px} px padded with {store.pad_rgb}, "
                    f"this one wants {image.size_px} px padded with {pad_rgb(image)}; ingest with --store encoded"
                )

    @cached_property
    def _lengths(self) -> np.ndarray:
        """int32: positions of every sample of the blend. Only making a plan asks for it."""
        more = np.int32(self.shape.tokens_per_image - 1)
        return np.concatenate([d.token_lengths + d.num_images * more for d in self._datasets])

    @cached_property
    def _left_out(self) -> np.ndarray:
        """int64: samples of the blend that ``excluded`` lists, ascending. Only making a plan asks for it."""
        if not self._excluded:
            return np.empty(0, np.int64)
        found = [
            first + dataset.numbers_of(self._excluded) for first, dataset in zip(self._firsts.tolist(), self._datasets)
        ]
        return np.concatenate(found)

    @property
    def num_excluded(self) -> int:
        """Samples that are left out because ``excluded`` lists them."""
        return int(self._left_out.size)

    @cached_property
    def num_over_long(self) -> int:
        """Samples that do not fit a row and are left out (but for those that are left out anyway)."""
        over_long = self._lengths > self.sequence_length
        over_long[self._left_out] = False
        return int(over_long.sum())

    def _check_lengths(self) -> None:
        if not self.num_over_long:
            return
        count, longest = self.num_over_long, int(self._lengths.max())
        if not self._drop_over_long:
            raise UsageError(
                f"{count} of {self._lengths.size} samples do not fit sequence_length={self.sequence_length} "
                f"(longest {longest}); set the stage's sequence_length to at least {longest}, or shorten their texts"
            )
        log.warning("%d of %d samples are longer than %d and left out", count, self._lengths.size, self.sequence_length)

    def _hash(self) -> str:
        facts = {
            "version": PLAN_VERSION, "members": [asdict(m) for m in self._members], "seed": self.seed,
            "sequence_length": self.sequence_length, "tokens_per_image": self.shape.tokens_per_image,
            "drop": self._drop_over_long,
        }  # fmt: skip
        if self.rows_per_step > 1:
            facts["rows_per_step"] = self.rows_per_step
        if self.augment is not None:
            facts["augment"] = asdict(self.augment)
        if self._excluded:
            facts["excluded"] = hashlib.sha256("\n".join(sorted(self._excluded)).encode()).hexdigest()
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _make_plan(self, epoch: int) -> EpochPlan:
        if epoch == 0:
            self._check_lengths()
            if self._excluded:
                log.info("%d of %d samples are listed in exclude and left out", self.num_excluded, self._lengths.size)
        drawn = draw_epoch(self._members, self.seed, epoch)
        if self.num_excluded:
            kept = np.ones(self._lengths.size, bool)
            kept[self._left_out] = False
            drawn = drawn[kept[drawn]]
        if self.num_over_long:
            drawn = drawn[self._lengths[drawn] <= self.sequence_length]
        images = np.concatenate([dataset.num_images for dataset in self._datasets])
        return plan_epoch(drawn, self._lengths, self.sequence_length, self.seed, epoch, images)

    def locate(self, row: int) -> tuple[int, int]:
        """(epoch, row of that epoch) of a global row number."""
        if whole_passes(self._members):
            return divmod(row, self.num_rows_per_epoch)
        while self._first_rows[-1] <= row:
            self._first_rows.append(self._first_rows[-1] + self._plans[len(self._first_rows) - 1].num_rows)
        epoch = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        return epoch, row - self._first_rows[epoch]

    def _served(self, row: int) -> int:
        """The row of the plan that is given as ``row``: steps hold the plan's rows, those with most images first.

        Ranks take neighbouring rows at one time, so their numbers of images are neighbours too; over a whole step the
        totals of two ranks differ by at most what two single rows can differ by, for any number of ranks.
        """
        if self.rows_per_step == 1:
            return row
        step, place = divmod(row, self.rows_per_step)
        with self._lock:
            order = self._step_orders.get(step)
            if order is None:
                places = [self.locate(step * self.rows_per_step + i) for i in range(self.rows_per_step)]
                images = np.array([self._plans[epoch].images_of_row[inside] for epoch, inside in places])
                order = np.argsort(-images, kind="stable")
                while len(self._step_orders) >= _STEPS_KEPT:
                    self._step_orders.pop(next(iter(self._step_orders)))
                self._step_orders[step] = order
        return step * self.rows_per_step + int(order[place])

    def _places_of(self, row: int) -> tuple[int, list[int]]:
        epoch, inside = self.locate(self._served(row))
        return epoch, self._plans[epoch].row(inside).tolist()

    def samples_of(self, row: int) -> list[int]:
        """Numbers (through the blend) of the samples in a global row, in order."""
        return self._places_of(row)[1]

    def _documents(self, row: int) -> list[Document]:
        epoch, samples = self._places_of(row)
        return [self._document(sample, epoch) for sample in samples]

    def _document(self, sample: int, epoch: int) -> Document:
        number = int(np.searchsorted(self._firsts, sample, side="right")) - 1
        stored = self._datasets[number][sample - int(self._firsts[number])]
        keys: tuple[Hashable, ...] = tuple((number, *key) for key in stored.image_keys)
        if self.augment is not None:
            # What happens to a picture depends on where it is shown: two samples may show one image in two ways.
            keys = tuple((key, epoch, stored.sample_id, place) for place, key in enumerate(keys))
        return Document(stored.token_ids, stored.target_spans_flat, keys, stored.modality, stored.sample_id)

    def _fetch(self, key: Hashable) -> tuple[str, np.ndarray | Callable[[np.ndarray], None]]:
        number, shard, image = key
        dataset = self._datasets[number]
        if dataset.manifest.store.kind == "pixels":
            return "pixels", partial(dataset.read_pixels, (shard, image))
        return "encoded", dataset.image((shard, image))

    def _read(self, keys: list[Hashable]) -> Tensor:
        if self.augment is None:
            return self.pixels.read(keys, self._fetch)
        images = list(dict.fromkeys(key[0] for key in keys))
        squares_IYXC = self.pixels.squares(images, self._fetch)
        square_of = dict(zip(images, squares_IYXC))
        shown = [
            augmented(square_of[image], self.augment, draws(self.seed, *shown), pad_rgb(self.image))
            for image, *shown in keys
        ]
        return self.pixels.normalise(np.stack(shown) if shown else squares_IYXC)

    def take(
        self, first_row: int, num_rows: int, *, keep: tuple[int, int] | None = None, with_pixels: bool = True
    ) -> MedBatch:
        """Rows ``first_row .. first_row + num_rows - 1`` as one micro-batch, on the CPU.

        Row numbers are global and unbounded. The same numbers give the same batch for ever (see ``plan_hash``).

        Args:
            keep: positions ``[first, end)`` of the sequence that this tensor-parallel rank owns: only images that
                reach into them are decoded and listed.
            with_pixels: False on ranks without a vision encoder: no pixels, no spans.

        Raises:
            WorkError: a shard is damaged.
        """
        rows = [self._documents(row) for row in range(first_row, first_row + num_rows)]
        read = self._read if with_pixels and self.pixels is not None else None
        return collate(rows, self.shape, keep=keep, pixels=read)

    def sample_ids(self, first_row: int, num_rows: int) -> list[str]:
        """Opaque ids of the samples of some rows, without laying them out: what ``chain`` takes."""
        ids = []
        for row in range(first_row, first_row + num_rows):
            for sample in self.samples_of(row):
                number = int(np.searchsorted(self._firsts, sample, side="right")) - 1
                ids.append(self._datasets[number].sample_id(sample - int(self._firsts[number])))
        return ids

    def describe(self) -> dict[str, float | int | str | list[str]]:
        """Facts for logs and ``--dry-run``."""
        plan = self._plans[0]
        used = int(self._lengths[plan.samples].sum())
        return {
            "datasets": [Path(d.folder).name for d in self._datasets], "samples_per_epoch": int(plan.samples.size),
            "rows_per_epoch": plan.num_rows, "positions_per_epoch": used,
            "packing_efficiency": used / (plan.num_rows * self.sequence_length), "over_long": self.num_over_long,
            "excluded": self.num_excluded,
        }  # fmt: skip


def chain(previous: str, sample_ids: Iterable[str]) -> str:
    """The next link of the hash chain over all samples seen: proof that nothing was lost or repeated.

    ``chain(chain(p, a), b) == chain(p, a + b)``, so the link does not depend on the sizes of batches.
    """
    link = bytes.fromhex(previous) if previous else b""
    for sample_id in sample_ids:
        link = hashlib.sha256(link + sample_id.encode()).digest()
    return link.hex()
