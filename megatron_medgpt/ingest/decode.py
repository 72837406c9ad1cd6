"""One image file to bytes fit for a shard: DICOM windowed to 8 bits once, JPEG and PNG checked and stripped.

Order of a grey DICOM picture: stored values -> modality LUT (Hounsfield units and the like) -> VOI LUT or window ->
8 bits -> inverted once if MONOCHROME1. Where no window is given, CT gets the soft-tissue window and everything else
its 0.5 to 99.5 percentile without padding.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut, pixel_array

from megatron_medgpt.data.picture import Picture, PictureError, canonical, check_size, encode_png
from megatron_medgpt.ingest.identity import held_back, modality_of_header

SOFT_TISSUE_HU = (50.0, 400.0)
"""Centre and width."""
LARGEST_FRAMES = 10_000
_UNKNOWN = 0


@dataclass(frozen=True, slots=True, eq=False)
class Decoded:
    """An image fit for a shard, and the modality its file states (index into ``MODALITIES``, 0 unknown)."""

    picture: Picture
    modality: int


def decode(content: bytes, *, allow_burned_in: bool = False) -> Decoded:
    """Decode one file's bytes.

    Raises:
        PictureError: with the reason; see also ``data.picture.canonical``.
    """
    if content[128:132] == b"DICM":
        return _decode_dicom(content, allow_burned_in)
    return Decoded(canonical(content), _UNKNOWN)


def _decode_dicom(content: bytes, allow_burned_in: bool) -> Decoded:
    try:
        ds = pydicom.dcmread(io.BytesIO(content))
        rows, columns = int(ds.get("Rows") or 0), int(ds.get("Columns") or 0)
        frames = int(ds.get("NumberOfFrames") or 1)
    except (InvalidDicomError, ValueError, TypeError, EOFError, OSError, KeyError, AttributeError) as error:
        raise PictureError("truncated-or-corrupt") from error
    if not rows or not columns or "PixelData" not in ds:
        raise PictureError("dicom-without-image")
    check_size(columns, rows)
    if not 1 <= frames <= LARGEST_FRAMES:
        raise PictureError("too-many-frames")
    reason = held_back(ds)
    if reason and not allow_burned_in:
        raise PictureError(reason)
    try:
        stored = pixel_array(ds, index=frames // 2)  # YBR comes out as RGB; of several frames, the middle one
        grey_or_rgb = _to_8_bit(ds, stored)
    except (RuntimeError, NotImplementedError) as error:  # pydicom: no decoder for this transfer syntax
        raise PictureError("unsupported-transfer-syntax") from error
    except Exception as error:  # a damaged stream raises whatever the codec plug-in likes
        raise PictureError("truncated-or-corrupt") from error
    picture = encode_png(Image.fromarray(grey_or_rgb))
    with Image.open(io.BytesIO(picture.encoded)) as written:
        if not np.array_equal(np.asarray(written), grey_or_rgb):
            raise PictureError("written-bytes-differ")
    return Decoded(picture, modality_of_header(ds))


def _to_8_bit(ds: Dataset, stored: np.ndarray) -> np.ndarray:
    """uint8 (rows, columns) grey or (rows, columns, 3) colour."""
    photometric = ds.PhotometricInterpretation
    if photometric == "PALETTE COLOR":
        colour = apply_color_lut(stored, ds)
        return np.ascontiguousarray((colour >> 8 if colour.dtype.itemsize > 1 else colour).astype(np.uint8))
    if stored.ndim == 3:
        bits = int(ds.BitsStored)
        return np.ascontiguousarray((stored >> (bits - 8) if bits > 8 else stored).astype(np.uint8))
    values = np.asarray(apply_modality_lut(stored, ds))
    low, high, values = _window(ds, stored, values)
    grey = np.clip((values.astype(np.float32) - np.float32(low)) / np.float32(max(high - low, 1e-6)), 0, 1)
    # DX files state the inversion twice (MONOCHROME1 and an INVERSE presentation shape): it is one inversion.
    inverted = photometric == "MONOCHROME1" or ds.get("PresentationLUTShape") == "INVERSE"
    return np.round(255 * (1 - grey if inverted else grey)).astype(np.uint8)


def _window(ds: Dataset, stored: np.ndarray, values: np.ndarray) -> tuple[float, float, np.ndarray]:
    """Values after the window, and the two of them that become black and white."""
    if "VOILUTSequence" in ds:
        bits = int(ds.VOILUTSequence[0].LUTDescriptor[2])
        return 0, 2**bits - 1, apply_voi_lut(values, ds, index=0)
    if ds.get("WindowCenter") not in (None, "") and ds.get("WindowWidth") not in (None, ""):
        # What the window makes of values far outside is its black and its white, for all of DICOM's functions.
        ends = apply_voi_lut(np.array([-1e12, 1e12]), ds, index=0)
        return float(ends[0]), float(ends[1]), apply_voi_lut(values.astype(np.float64), ds, index=0)
    if ds.get("Modality") == "CT":
        centre, width = SOFT_TISSUE_HU
        return centre - width / 2, centre + width / 2, values
    padding = ds.get("PixelPaddingValue")
    seen = values[stored != padding] if padding is not None else values
    low, high = np.percentile(seen if seen.size else values, (0.5, 99.5))
    return float(low), float(high), values
