"""Writing a shard; the format stands in ``shards``."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_medgpt.data.index import IndexedFile, IndexedWriter
from megatron_medgpt.data.manifest import LISTED, STORE_KINDS, ShardFacts, Store, sha256_of, shard_name
from megatron_medgpt.data.stored import FACT_NAMES


class ShardWriter:
    """Writes one shard: into hidden files first; ``close`` reads them back, then moves them to their names."""

    def __init__(self, folder: Path, number: int, store: Store) -> None:
        self.folder, self.name, self.store = folder, shard_name(number), store
        self._prefix = folder / f".{self.name}"
        self._text = IndexedWriter(Path(f"{self._prefix}.text"), "int32")
        self._image = IndexedWriter(Path(f"{self._prefix}.image"), "uint8")
        self._ids: list[str] = []
        self._num_tokens = self._num_targets = 0
        self._counts: dict[str, Counter[str]] = {listed: Counter() for listed in LISTED}

    def add_images(self, images: Sequence[bytes]) -> int:
        """Append images (encoded bytes or pixel records) and return the number of the first in this shard."""
        first = self._image.num_sequences
        for image in images:
            self._image.add(image)
            self._image.end_document()
        return first

    def add_sample(
        self,
        *,
        sample_id: str,
        token_ids: np.ndarray,
        target_spans: Sequence[tuple[int, int]],
        modality: int,
        num_images: int,
        first_image: int,
        body_part: int = 0,
        view: int = 0,
        laterality: int = 0,
    ) -> None:
        """Append one sample whose images ``add_images`` has written. ``sample_id``: 32 hexadecimal digits."""
        self._text.add(token_ids)
        self._text.add(np.asarray(target_spans, np.int32).reshape(-1))
        kind = STORE_KINDS[self.store.kind]
        facts = [modality, num_images, first_image, kind, body_part, view, laterality]
        self._text.add(np.asarray(facts, np.int32))
        self._text.end_document()
        self._ids.append(f"{sample_id:>032s}\n")
        self._num_tokens += len(token_ids)
        self._num_targets += sum(end - start for start, end in target_spans)
        for listed, (place, names) in FACT_NAMES.items():
            if listed == "modalities" or facts[place]:
                self._counts[listed][names[facts[place]]] += 1

    def close(self) -> ShardFacts:
        """Complete the shard and return its entry for the manifest."""
        num_images = self._image.num_sequences
        self._text.close()
        self._image.close()
        with open(f"{self._prefix}.ids", "w", encoding="ascii") as file:
            file.writelines(self._ids)
            file.flush()
            os.fsync(file.fileno())
        kept = (["text.bin", "text.idx", "ids"] if self._ids else []) + (
            ["image.bin", "image.idx"] if num_images else []
        )
        if self._ids:
            IndexedFile(Path(f"{self._prefix}.text"), "int32")
        if num_images:
            IndexedFile(Path(f"{self._prefix}.image"), "uint8")
        files = {}
        for suffix in ("text.bin", "text.idx", "ids", "image.bin", "image.idx"):
            partial = Path(f"{self._prefix}.{suffix}")
            if suffix in kept:
                files[f"{self.name}.{suffix}"] = {"bytes": partial.stat().st_size, "sha256": sha256_of(partial)}
                os.replace(partial, self.folder / f"{self.name}.{suffix}")
            else:
                partial.unlink()
        return ShardFacts(
            name=self.name, num_samples=len(self._ids), num_images=num_images, num_tokens=self._num_tokens,
            num_targets=self._num_targets, files=files,
            **{listed: dict(sorted(counts.items())) for listed, counts in self._counts.items()},
        )  # fmt: skip
