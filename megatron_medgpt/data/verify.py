"""Every byte of a dataset against what the dataset says of itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_medgpt.data.manifest import MANIFEST, TOKENIZER, Manifest, read_manifest, sha256_of
from megatron_medgpt.data.shards import Dataset
from megatron_medgpt.data.stored import StoredSample


def verify(folder: str | Path) -> Iterator[str]:
    """Read every byte of a dataset and yield one line per fault: hashes, then the meaning of every sample.

    An empty iteration is a whole dataset. Raises as ``Dataset`` does where it cannot even be opened.
    """
    folder = Path(folder)
    manifest, _ = read_manifest(folder)
    faults = 0
    listed = {name: entry for facts in manifest.shards for name, entry in facts.files.items()} | manifest.files
    for name, expected in listed.items():
        path = folder / name
        if not path.is_file():
            faults += 1
            yield f"{name} is missing"
        elif sha256_of(path) != expected["sha256"]:
            faults += 1
            yield f"{name} does not have the sha256 of {MANIFEST}"
    copy = folder / TOKENIZER
    if TOKENIZER not in listed and copy.is_file() and sha256_of(copy) != manifest.tokenizer["sha256"]:
        faults += 1
        yield f"{TOKENIZER} is not the tokenizer of {MANIFEST}"
    if faults:
        return
    dataset = Dataset(folder)
    seen: set[str] = set()
    for number in range(len(dataset)):
        sample = dataset[number]
        if sample.sample_id in seen:
            yield f"sample {number} repeats the id {sample.sample_id}"
        seen.add(sample.sample_id)
        yield from _faults_of(sample, number, manifest)


def _faults_of(sample: StoredSample, number: int, manifest: Manifest) -> Iterator[str]:
    ids, spans = sample.token_ids, sample.target_spans_flat
    if ids.size == 0 or ids.min() < 0 or ids.max() >= manifest.tokenizer["vocab_size"]:
        yield f"sample {number} has token ids outside the vocabulary of {manifest.tokenizer['vocab_size']}"
    marks = int((ids == manifest.tokenizer["image_mark_id"]).sum())
    if marks != len(sample.image_keys):
        yield f"sample {number} has {marks} image marks and {len(sample.image_keys)} images"
    if spans.size and (spans[0] < 0 or spans[-1] > ids.size or (np.diff(spans) < 0).any()):
        yield f"sample {number} has target spans outside its tokens"
