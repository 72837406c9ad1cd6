"""What a shard holds of one sample: its numbers, its facts, and a picture as ready pixels."""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from megatron_medgpt.config.errors import WorkError
from megatron_medgpt.types import BODY_PARTS, LATERALITIES, MODALITIES, VIEWS

NUM_FACTS = (7, 4)
"""How many facts a sample has: today, and in schema 1."""
FACT_NAMES = {
    "modalities": (0, MODALITIES),
    "body_parts": (4, BODY_PARTS),
    "views": (5, VIEWS),
    "lateralities": (6, LATERALITIES),
}
"""Count in the manifest -> where it stands among the facts, and the names of its values."""
PIXEL_HEADER = struct.Struct("<4sHHB3x")
_PIXEL_MAGIC = b"MGPX"


class StoredSample(NamedTuple):
    """One sample as it lies in a shard; arrays are read-only views of the file."""

    token_ids: np.ndarray
    target_spans_flat: np.ndarray
    modality: int
    image_keys: tuple[tuple[int, int], ...]
    """(shard, image in the shard), one per image mark."""
    sample_id: str


def pack_pixels(pixels_YXC: np.ndarray) -> bytes:
    """A pixel record: ``MGPX``, uint16 rows, uint16 columns, uint8 channels, 3 zero bytes, then the uint8 pixels."""
    return header_of(pixels_YXC.shape) + np.ascontiguousarray(pixels_YXC).tobytes()


@lru_cache(maxsize=8)
def header_of(shape: tuple[int, ...]) -> bytes:
    """The bytes before the pixels of a picture of this (rows, columns, channels)."""
    return PIXEL_HEADER.pack(_PIXEL_MAGIC, *shape)


def unpack_pixels(record: np.ndarray) -> np.ndarray:
    """uint8 (rows, columns, channels) of a pixel record, without a copy.

    Raises:
        WorkError: not a pixel record, or its size does not fit its header.
    """
    magic, rows, columns, channels = (
        PIXEL_HEADER.unpack_from(record) if record.size >= PIXEL_HEADER.size else (b"", 0, 0, 0)
    )
    if magic != _PIXEL_MAGIC or record.size != PIXEL_HEADER.size + rows * columns * channels:
        raise WorkError("a stored image is not a pixel record; the shard is damaged, run medgpt inspect --verify")
    return record[PIXEL_HEADER.size :].reshape(rows, columns, channels)
