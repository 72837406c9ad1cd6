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
_CENTIMETRES = 3
"""PhysicalUnitsXDirection and PhysicalUnitsYDirection of a region that shows the body; those of spectra differ."""
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

    Raises:
        PictureError: ``regions-of-different-proportions``.
    """
    ratio = _of_regions(header)
    if ratio is not None:
        return ratio
    for keyword in _SPACINGS:
        try:
            distances = header.get(keyword) or ()
        except Exception:  # text that is no number: pydicom raises what it likes, and there is no spacing to go by
            continue
        ratio = ratio_of(distances)
        if ratio is not None:
            return ratio
    return 1.0


def _of_regions(header: Dataset) -> float | None:
    """The ratio that the regions of an ultrasound picture state in centimetres, None where none does (PS3.3 C.8.5.5).

    Two views in one picture may have a scale each; what makes both round is one ratio, or there is none.
    """
    ratios = []
    for region in header.get("SequenceOfUltrasoundRegions") or ():
        try:
            units = [region.get(f"PhysicalUnits{axis}Direction") for axis in "XY"]
            down, across = (abs(float(region.get(f"PhysicalDelta{axis}") or 0)) for axis in "YX")
        except Exception:  # as in row_to_column
            continue
        ratio = ratio_of((down, across)) if units == [_CENTIMETRES, _CENTIMETRES] else None
        ratios += [] if ratio is None else [ratio]
    if not ratios:
        return None
    if not is_square(max(ratios) / min(ratios)):
        raise PictureError("regions-of-different-proportions")
    return ratios[0]


def ratio_of(distances: Iterable[float]) -> float | None:
    """The first distance over the second, None unless they are two positive numbers."""
    try:
        down, across = (float(value) for value in distances)
    except (TypeError, ValueError):  # one number, three, or none
        return None
    return down / across if math.isfinite(down) and math.isfinite(across) and down > 0 and across > 0 else None


def is_square(ratio: float) -> bool:
    return abs(ratio - 1) <= _AS_GOOD_AS_SQUARE


def check_ratio(ratio: float) -> None:
    """
    Raises:
        PictureError: ``pixels-far-from-square``.
    """
    if not 1 / LARGEST_ASPECT <= ratio <= LARGEST_ASPECT:
        raise PictureError("pixels-far-from-square")


def squared(pixels: np.ndarray, ratio: float) -> Frame:
    """A picture whose pixels are ``ratio`` times as high as wide with square ones, by bicubic interpolation.

    The coarser axis is stretched, so no detail is lost.

    Raises:
        PictureError: ``pixels-far-from-square``, or of ``check_size``.
    """
    if is_square(ratio):
        return Frame(pixels)
    check_ratio(ratio)
    rows, columns = pixels.shape[:2]
    rows, columns = (round(rows * ratio), columns) if ratio > 1 else (rows, round(columns / ratio))
    check_size(columns, rows)
    stretched = Image.fromarray(pixels).resize((columns, rows), Image.Resampling.BICUBIC)
    return Frame(np.asarray(stretched), squared=True)
