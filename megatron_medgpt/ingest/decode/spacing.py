"""Pixels that are not square in millimetres: resampled, so that a circle in the body is a circle in the picture."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from megatron_medgpt.data.picture import LARGEST_ASPECT, PictureError, check_size

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_SPACINGS = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "PixelAspectRatio")
"""Row distance, then column distance. The ratio is stated where no spacing is (PS3.3 C.7.6.3.1.7)."""
_AS_GOOD_AS_SQUARE = 0.01
"""Spacings are written with few digits: what differs less is left as it is rather than blurred."""


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """One 8-bit picture on its way to a shard."""

    pixels: np.ndarray
    """uint8 (rows, columns) or (rows, columns, 3)."""
    squared: bool = False
    """Whether it was resampled to square pixels."""


def row_to_column(header: Dataset) -> float:
    """Height of a pixel over its width, 1 where the header says nothing that can be true.

    Args:
        header: with the attributes that hold for the frame (``frames.header_of_frame``).
    """
    for keyword in _SPACINGS:
        try:
            distances = header.get(keyword) or ()
        except Exception:  # text that is no number: pydicom raises what it likes, and there is no spacing to go by
            continue
        ratio = ratio_of(distances)
        if ratio is not None:
            return ratio
    return 1.0


def ratio_of(distances: Iterable[float]) -> float | None:
    """The first distance over the second, None unless they are two positive numbers."""
    try:
        down, across = (float(value) for value in distances)
    except (TypeError, ValueError):  # one number, three, or none
        return None
    return down / across if math.isfinite(down) and math.isfinite(across) and down > 0 and across > 0 else None


def squared(pixels: np.ndarray, ratio: float) -> Frame:
    """A picture whose pixels are ``ratio`` times as high as wide with square ones, by bicubic interpolation.

    The coarser axis is stretched, so no detail is lost.

    Raises:
        PictureError: ``pixels-far-from-square``, or of ``check_size``.
    """
    if abs(ratio - 1) <= _AS_GOOD_AS_SQUARE:
        return Frame(pixels)
    if not 1 / LARGEST_ASPECT <= ratio <= LARGEST_ASPECT:
        raise PictureError("pixels-far-from-square")
    rows, columns = pixels.shape[:2]
    rows, columns = (round(rows * ratio), columns) if ratio > 1 else (rows, round(columns / ratio))
    check_size(columns, rows)
    stretched = Image.fromarray(pixels).resize((columns, rows), Image.Resampling.BICUBIC)
    return Frame(np.asarray(stretched), squared=True)
