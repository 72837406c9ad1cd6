"""Stored values to 8 bits, once: modality LUT, then VOI LUT or window, then presentation LUT, then one inversion.

The whole chain is a function of one stored value. It is evaluated once for every value that occurs and looked up,
which keeps a 64-megapixel mammogram at its own size in memory instead of eight float64 copies of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.pixels import apply_color_lut

from megatron_medgpt.data.picture import PictureError
from megatron_medgpt.ingest.decode.options import CT_WINDOWS_HU

PERCENTILES = (0.5, 99.5)
_BLOCK_PIXELS = 1 << 20
_LARGEST_TABLE = 1 << 16
Curve = Callable[[np.ndarray], np.ndarray]
"""Stored values (or modality values) to 0 (black) ... 1 (white), float64, any shape."""


def to_8_bit(stored: np.ndarray, header: Dataset, ct_window: str = "soft-tissue") -> np.ndarray:
    """uint8 (rows, columns) grey or (rows, columns, 3) colour of one frame as ``pixel_array`` gives it.

    Args:
        header: with the attributes that hold for this frame (``frames.header_of_frame``).
        ct_window: of a CT without a window, a name of ``CT_WINDOWS_HU``.

    Raises:
        PictureError: ``unsupported-colour``.
    """
    photometric = header.PhotometricInterpretation
    if photometric == "PALETTE COLOR":
        return _palette(stored, header)
    if stored.ndim == 3:
        return _colour(stored, int(header.BitsStored))
    if photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise PictureError("unsupported-colour")
    hidden = _padding(header, stored.dtype)
    curves = _curves(stored, header, ct_window, hidden)
    grey = [_looked_up(stored, curve, hidden) for curve in curves]
    return grey[0] if len(grey) == 1 else np.stack(grey, axis=-1)


def _palette(stored: np.ndarray, header: Dataset) -> np.ndarray:
    colour = apply_color_lut(stored, header)[..., :3]  # some palettes bring an alpha
    if colour.dtype.itemsize > 1:
        # Some writers put 8-bit colours into 16-bit entries.
        colour = colour >> 8 if colour.max() > 255 else colour
    return np.ascontiguousarray(colour.astype(np.uint8))


def _colour(stored: np.ndarray, bits: int) -> np.ndarray:
    if stored.shape[-1] != 3:
        raise PictureError("unsupported-colour")
    return np.ascontiguousarray((stored >> (bits - 8) if bits > 8 else stored).astype(np.uint8, copy=False))


def _curves(stored: np.ndarray, header: Dataset, ct_window: str, hidden: Curve | None) -> list[Curve]:
    """One curve, or three where a CT is to show three windows at once."""
    modality = _modality(header)
    # Without a rescale or a modality LUT the values of a CT are not Hounsfield units.
    in_hu = header.get("Modality") == "CT" and ("RescaleSlope" in header or "ModalityLUTSequence" in header)
    presets = CT_WINDOWS_HU[ct_window]
    if in_hu and len(presets) > 1:
        windows = [linear_exact(*preset) for preset in presets]
    elif header.get("VOILUTSequence"):
        windows = [_lookup_table(header.VOILUTSequence[0], header)]
    else:
        window = _window(header)
        if window is None and in_hu:
            window = linear_exact(*presets[0])
        windows = [window or _between_percentiles(stored, modality, hidden)]
    return [_shown(header, modality, window) for window in windows]


def _shown(header: Dataset, modality: Curve, window: Curve) -> Curve:
    presentation = header.get("PresentationLUTSequence")
    table = _lookup_table(presentation[0], header, from_unit=True) if presentation else None
    # DX files state the inversion twice (MONOCHROME1 and an INVERSE presentation shape): it is one inversion.
    inverted = header.PhotometricInterpretation == "MONOCHROME1" or header.get("PresentationLUTShape") == "INVERSE"

    def curve(values: np.ndarray) -> np.ndarray:
        grey = window(modality(values))
        grey = table(grey) if table else grey
        return 1 - grey if inverted else grey

    return curve


def _modality(header: Dataset) -> Curve:
    if header.get("ModalityLUTSequence"):
        return _lookup_table(header.ModalityLUTSequence[0], header, scaled=False)
    slope, intercept = _number(header.get("RescaleSlope"), 1.0), _number(header.get("RescaleIntercept"), 0.0)
    return lambda values: values.astype(np.float64) * slope + intercept


def linear_exact(centre: float, width: float) -> Curve:
    """PS3.3 C.11.2.1.3.2: black at ``centre - width / 2``, white at ``centre + width / 2``."""
    return lambda values: np.clip((values - centre) / width + 0.5, 0, 1)


def _window(header: Dataset) -> Curve | None:
    """The first window of the header, or None where there is none or it means nothing."""
    centre, width = _number(header.get("WindowCenter"), None), _number(header.get("WindowWidth"), None)
    function = str(header.get("VOILUTFunction") or "LINEAR").strip().upper()
    if centre is None or width is None or width <= 0:
        return None
    if function == "SIGMOID":  # C.11.2.1.3.1
        return lambda values: 1 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -700, 700)))
    if function == "LINEAR_EXACT":
        return linear_exact(centre, width)
    if width < 1:
        return None
    if width == 1:
        return lambda values: (values > centre - 0.5).astype(np.float64)
    return linear_exact(centre - 0.5, width - 1)  # C.11.2.1.2.1


def _between_percentiles(stored: np.ndarray, modality: Curve, hidden: Curve | None) -> Curve:
    seen = stored if hidden is None else stored[~hidden(stored)]
    seen = seen if seen.size else stored
    if stored.dtype.kind == "f":
        seen = seen[np.isfinite(seen)]
        if not seen.size:
            raise PictureError("no-finite-value")
    # Percentiles of what is stored are those of the modality's values as long as that function is monotone.
    low, high = sorted(modality(np.percentile(seen, PERCENTILES)))
    if not high > low:  # a mask: nearly all of it is one value
        low, high = sorted(modality(np.array([seen.min(), seen.max()])))
    return linear_exact((low + high) / 2, max(high - low, 1e-6))


def _padding(header: Dataset, dtype: np.dtype) -> Curve | None:
    """Whether stored values are padding: they are black and belong to no statistics (PS3.3 C.7.5.1.1.2)."""
    first = _number(header.get("PixelPaddingValue"), None)
    if first is None:
        return None
    last = _number(header.get("PixelPaddingRangeLimit"), first)
    if dtype.kind == "i":  # written as unsigned although the pixels are signed
        span = 1 << (8 * dtype.itemsize)
        first, last = (value - span if value >= span // 2 else value for value in (first, last))
    low, high = sorted((first, last))
    return lambda values: (values >= low) & (values <= high)


def _looked_up(stored: np.ndarray, curve: Curve, hidden: Curve | None) -> np.ndarray:
    def shown(values: np.ndarray) -> np.ndarray:
        grey = np.rint(255 * np.nan_to_num(curve(values))).astype(np.uint8)
        if hidden is not None:
            grey[hidden(values)] = 0
        return grey

    out = np.empty(stored.shape, np.uint8)
    rows = max(1, _BLOCK_PIXELS // stored.shape[1])
    blocks = [slice(first, first + rows) for first in range(0, stored.shape[0], rows)]
    if stored.dtype.kind in "iu":
        lowest, highest = int(stored.min()), int(stored.max())
        if highest - lowest < _LARGEST_TABLE:
            table = shown(np.arange(lowest, highest + 1))
            for block in blocks:
                out[block] = table[stored[block].astype(np.int64) - lowest]
            return out
    for block in blocks:
        out[block] = shown(stored[block])
    return out


def _lookup_table(item: Dataset, header: Dataset, *, scaled: bool = True, from_unit: bool = False) -> Curve:
    """A LUT of the header (PS3.3 C.11.1.1, C.11.2.1.1): values outside get its first or last entry.

    Args:
        scaled: results as a share of the largest that the LUT's bits can hold, else as they are.
        from_unit: its input is 0 ... 1 and not a stored value.
    """
    count, first, bits = (int(value) for value in item.LUTDescriptor)
    count = count or 1 << 16
    data: Any = item.LUTData
    if isinstance(data, bytes):
        big_endian = header.original_encoding[1] is False
        kind = np.uint8 if len(data) < 2 * count else np.dtype(">u2" if big_endian else "<u2")
        data = np.frombuffer(data, kind, count=count)
    entries = np.asarray(data, np.float64)[:count] / (2**bits - 1 if scaled else 1)

    def curve(values: np.ndarray) -> np.ndarray:
        if from_unit:
            places = np.rint(values * (len(entries) - 1))
        else:
            # Its first value is written as unsigned where the values below zero are.
            start = first - (1 << 16) if first >= 1 << 15 and values.min() < 0 else first
            places = np.rint(values) - start
        found = entries[np.clip(places, 0, len(entries) - 1).astype(np.int64)]
        return np.clip(found, 0, 1) if scaled else found

    return curve


def _number(value: Any, missing: Any) -> Any:
    """The first finite number of an attribute, or ``missing``."""
    if isinstance(value, (list, tuple, MultiValue)):
        value = value[0] if len(value) else None
    if value in (None, ""):
        return missing
    number = float(value)
    return number if np.isfinite(number) else missing
