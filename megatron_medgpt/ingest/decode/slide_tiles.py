"""Tiles of tissue of a whole slide (openslide). Background, label and macro stay unread."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megatron_medgpt.data.picture import LARGEST_PIXELS, PictureError
from megatron_medgpt.ingest.decode.options import LARGEST_PICTURES, DecodeOptions, picked
from megatron_medgpt.ingest.decode.spacing import check_ratio, is_square, ratio_of

_OVERVIEW_PX = 2048
_STRIP_PIXELS = 8_000_000
"""What is read of a level at once: 32 MB as openslide gives it."""
_LEAST_TISSUE = 0.4
"""Share of a tile that must be tissue."""
_LEAST_COLOUR = 12
"""Difference of the largest and the smallest of R, G and B below which nothing is tissue, of 255."""
_FINER_THAN_SCANNED = 0.9


def answers(facts: dict[str, Any], _: bytes) -> Iterator[bytes]:
    """Of each chosen tile whether it was made square, then its uint8 (tile_px, tile_px, 3); or a reason (JSON)."""
    try:
        yield from _opened(Path(facts["path"]), DecodeOptions(**facts["options"]))
    except PictureError as error:
        yield json.dumps({"reason": str(error)}).encode()


def _opened(path: Path, options: DecodeOptions) -> Iterator[bytes]:
    try:
        import openslide
    except ImportError as error:
        raise PictureError("openslide-not-installed") from error
    try:
        with openslide.OpenSlide(path) as slide:
            yield from _tiles(slide, options)
    except openslide.OpenSlideUnsupportedFormatError as error:
        raise PictureError("unsupported-format") from error
    except (openslide.OpenSlideError, MemoryError) as error:
        raise PictureError("truncated-or-corrupt") from error


def _tiles(slide, options: DecodeOptions) -> Iterator[bytes]:
    down_um, across_um = _scanned_um(slide)
    ratio = ratio_of((down_um, across_um))
    if ratio is None:
        raise PictureError("slide-without-resolution")
    check_ratio(ratio)
    shrink = min(options.um_per_px / down_um, options.um_per_px / across_um)
    if shrink < _FINER_THAN_SCANNED:
        raise PictureError("slide-too-coarse")
    # Pixels of the scan: a tile is square in micrometres.
    height, width = (options.tile_px * options.um_per_px / um for um in (down_um, across_um))
    rows, columns = int(slide.dimensions[1] // height), int(slide.dimensions[0] // width)
    if not rows or not columns:
        raise PictureError("too-small-or-narrow")
    level = slide.get_best_level_for_downsample(shrink * 1.01)
    read_px = tuple(max(1, round(side / slide.level_downsamples[level])) for side in (width, height))
    if read_px[0] * read_px[1] > LARGEST_PIXELS:
        raise PictureError("too-many-pixels")
    places = np.argwhere(_tissue_share(slide, rows, columns, height, width) >= _LEAST_TISSUE)
    chosen = picked(len(places), options.tiles)
    if not len(chosen):
        raise PictureError("no-tissue")
    if len(chosen) > LARGEST_PICTURES:
        raise PictureError("too-many-frames")
    for row, column in places[list(chosen)]:
        region = slide.read_region((round(column * width), round(row * height)), level, read_px)
        tile = _on_white(region).resize((options.tile_px, options.tile_px), Image.Resampling.BICUBIC)
        yield json.dumps({"squared": not is_square(ratio)}).encode()
        yield tile.tobytes()


def _scanned_um(slide) -> tuple[float, float]:
    """Height and width of a pixel of the scan."""
    try:
        return float(slide.properties["openslide.mpp-y"]), float(slide.properties["openslide.mpp-x"])
    except (KeyError, ValueError) as error:
        raise PictureError("slide-without-resolution") from error


def _on_white(region: Image.Image) -> Image.Image:
    """Places that were not scanned are transparent."""
    whole = Image.new("RGB", region.size, (255, 255, 255))
    whole.paste(region, mask=region.getchannel("A"))
    return whole


def _tissue_share(slide, rows: int, columns: int, height: float, width: float) -> np.ndarray:
    """float (rows, columns): share of each tile that is coloured more than an Otsu threshold of the whole slide."""
    overview, shrink = _overview(slide)
    colour = overview.max(axis=2) - overview.min(axis=2)
    tissue = Image.fromarray((255 * (colour > max(_otsu(colour), _LEAST_COLOUR))).astype(np.uint8))
    covered = (0, 0, min(columns * width / shrink, tissue.width), min(rows * height / shrink, tissue.height))
    return np.asarray(tissue.resize((columns, rows), Image.Resampling.BOX, box=covered)) / 255


def _overview(slide) -> tuple[np.ndarray, float]:
    """uint8 (rows, columns, 3) of the whole slide, of about ``_OVERVIEW_PX``, and how much smaller it is than the scan.

    openslide's own thumbnail holds a whole level several times: 1 GiB for a slide of 12,000 px without smaller levels.

    Raises:
        PictureError: ``slide-without-overview`` where every level is larger than ``LARGEST_PIXELS``.
    """
    sizes = slide.level_dimensions  # openslide-python asks for all of them anew each time
    allowed = [level for level, (width, height) in enumerate(sizes) if width * height <= LARGEST_PIXELS]
    if not allowed:
        raise PictureError("slide-without-overview")
    level = next((level for level in reversed(allowed) if max(sizes[level]) >= _OVERVIEW_PX), allowed[0])
    width, height = sizes[level]
    step, downsample = -(-max(width, height) // _OVERVIEW_PX), slide.level_downsamples[level]
    at_once = max(1, _STRIP_PIXELS // (width * step)) * step
    strips = []
    for top in range(0, height, at_once):
        strip = slide.read_region((0, round(top * downsample)), level, (width, min(at_once, height - top)))
        strips.append(np.asarray(_on_white(strip).reduce(step)))
    return np.concatenate(strips), step * downsample


def _otsu(values: np.ndarray) -> int:
    """The threshold with the largest variance between the two classes (Otsu, 1979)."""
    counts = np.bincount(values.ravel(), minlength=256).astype(np.float64)
    below, sums = np.cumsum(counts), np.cumsum(counts * np.arange(256))
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return int(np.nanargmax(np.nan_to_num(between)))
