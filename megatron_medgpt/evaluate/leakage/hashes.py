"""What pictures look like, in few bits: an exact hash of the pixels and perceptual hashes that survive re-encoding.

The perceptual hashes are ImageHash's ``phash`` (signs of the low frequencies of a cosine transform against their
median): 64 bits to search by and 256 bits to confirm by. Radiographs of one kind share their low frequencies, so 64
bits alone would call two patients' chests near; the 256 bits are what tells them apart.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.data.manifest import Store
from megatron_medgpt.data.shards import Dataset
from megatron_medgpt.data.stored import unpack_pixels
from megatron_medgpt.evaluate.tasks.question import Question

SMALLEST_SPREAD = 2.0
"""Standard deviation of the grey values below which a picture is blank; all blank pictures look alike."""
_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Hashes:
    """Hashes of n pictures."""

    exact: np.ndarray
    """uint64 (n, 2): the first 16 bytes of the sha256 of size and RGB pixels."""
    coarse: np.ndarray
    """uint64 (n,): 64-bit perceptual hash."""
    fine: np.ndarray
    """uint64 (n, 4): 256-bit perceptual hash."""
    usable: np.ndarray
    """bool (n,): whether the perceptual hashes mean anything (read, and not blank)."""
    readable: np.ndarray
    """bool (n,)."""

    @classmethod
    def joined(cls, rows: Sequence[np.ndarray]) -> Hashes:
        """From rows uint64 (n, 9) as ``hash_row`` gives them."""
        table = np.concatenate(rows) if rows else np.empty((0, 9), np.uint64)
        return cls(
            exact=table[:, 0:2], coarse=np.ascontiguousarray(table[:, 2]), fine=table[:, 3:7],
            usable=table[:, 7].astype(bool), readable=table[:, 8].astype(bool),
        )  # fmt: skip


def hash_row(image: Image.Image) -> np.ndarray:
    """uint64 (9,): exact (2), coarse, fine (4), usable, readable."""
    imagehash = _library()
    rgb = image.convert("RGB")
    digest = hashlib.sha256(f"{rgb.width}x{rgb.height}".encode() + rgb.tobytes()).digest()[:16]
    grey = rgb.convert("L")
    usable = float(np.asarray(grey).std()) >= SMALLEST_SPREAD
    bits = [imagehash.phash(grey, hash_size=size).hash.ravel() for size in (8, 16)]
    words = [np.packbits(some).view(">u8").astype(np.uint64) for some in bits]
    return np.concatenate([np.frombuffer(digest, ">u8").astype(np.uint64), *words, np.array([usable, 1], np.uint64)])


def hash_dataset(dataset: Dataset, *, workers: int = 1, report: Callable[[int, int], None] | None = None) -> Hashes:
    """Hashes of every stored image, shard after shard."""
    places = [
        (number, first, min(first + _AT_ONCE, facts.num_images))
        for number, facts in enumerate(dataset.manifest.shards)
        for first in range(0, facts.num_images, _AT_ONCE)
    ]
    tasks = [(str(dataset.folder), *place) for place in places]
    return Hashes.joined(_gather(_hash_stored, tasks, workers, report))


def hash_questions(
    pictures: Sequence[Question], store: Store | None = None, *, workers: int = 1,
    report: Callable[[int, int], None] | None = None,
) -> Hashes:  # fmt: skip
    """Hashes of the pictures of questions; one that cannot be read is not ``readable``.

    Args:
        store: a pixel store whose squares they are to be compared with; None compares pictures as they are.
    """
    kind = store if store is not None and store.kind == "pixels" else None
    tasks = [(pictures[first : first + _AT_ONCE], kind) for first in range(0, len(pictures), _AT_ONCE)]
    return Hashes.joined(_gather(_hash_pictures, tasks, workers, report))


def stored_picture(dataset: Dataset, key: tuple[int, int]) -> Image.Image:
    """One stored image as a picture."""
    record = dataset.image(key)
    if dataset.manifest.store.kind == "pixels":
        return Image.fromarray(unpack_pixels(record))
    return Image.open(io.BytesIO(record))


def question_picture(question: Question, store: Store | None = None) -> Image.Image:
    """The picture of a question, as a pixel store would hold it where one is given.

    Raises:
        UsageError: no image, missing, or not a picture.
    """
    try:
        picture = Image.open(io.BytesIO(question.image_bytes())).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(f"question {question.question_id}: its image does not decode ({error})") from None
    if store is None:
        return picture
    from megatron_medgpt.data.resize import square_pixels  # torch: 1.5 s that encoded stores need not pay

    return Image.fromarray(square_pixels(np.asarray(picture), store.size_px, store.pad_rgb))


def _library():
    try:
        import imagehash
    except ImportError:
        raise UsageError("hashing pictures needs ImageHash; pip install 'megatron-medgpt[leakage]'") from None
    return imagehash


def _gather(
    work: Callable[..., np.ndarray], tasks: Sequence[tuple], workers: int, report: Callable[[int, int], None] | None
) -> list[np.ndarray]:
    def watched(results: Iterable[np.ndarray]) -> list[np.ndarray]:
        rows = []
        for done, row in enumerate(results, 1):
            rows.append(row)
            if report is not None:
                report(done, len(tasks))
        return rows

    if workers <= 1:
        return watched(work(*task) for task in tasks)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return watched(pool.map(work, *zip(*tasks)))


@lru_cache(maxsize=1)
def _open(folder: str) -> Dataset:
    return Dataset(Path(folder))


def _hash_stored(folder: str, shard: int, first: int, end: int) -> np.ndarray:
    dataset = _open(folder)
    return np.stack([hash_row(stored_picture(dataset, (shard, number))) for number in range(first, end)])


def _hash_pictures(questions: Sequence[Question], store: Store | None) -> np.ndarray:
    rows = np.zeros((len(questions), 9), np.uint64)
    for place, question in enumerate(questions):
        try:
            picture = question_picture(question, store)
        except UsageError:
            continue  # stays a row of zeros: not readable, which the audit counts
        rows[place] = hash_row(picture)
    return rows
