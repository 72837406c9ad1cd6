"""A NIfTI volume to 8-bit slices, oriented and proportioned as a radiologist looks at them.

Axial slices show the patient's right at the left and front at the top, coronal and sagittal ones the head at the top.
Slices are cut across the axis with the thickest voxels (as they were acquired), axially where all are alike.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator

import nibabel
import numpy as np

from megatron_medgpt.data.picture import PictureError, check_size
from megatron_medgpt.ingest.decode.options import CT_WINDOWS_HU, LARGEST_PICTURES, DecodeOptions, picked
from megatron_medgpt.ingest.decode.spacing import Frame, ratio_of, squared
from megatron_medgpt.ingest.decode.windowing import PERCENTILES, linear_exact
from megatron_medgpt.ingest.identity import modality_of_name
from megatron_medgpt.types import MODALITIES

LARGEST_VOLUME_BYTES = 400 << 20
_LARGEST_HEADER_BYTES = 16 << 20
_PIECE_BYTES = 1 << 20
_MUCH_THICKER = 1.5
_STATISTICS_SLICES = 32
_AXIAL = 2


def slices_of(content: bytes, options: DecodeOptions, modality: str = "") -> Iterator[Frame]:
    """The chosen slices, their pixels square in millimetres.

    A window covers the whole volume, so that neighbouring slices look alike: the CT preset where ``modality`` says
    computed tomography, else the percentiles of up to 32 slices spread over it.

    Raises:
        PictureError: ``volume-too-large``, ``unsupported-volume``, ``truncated-or-corrupt``, and those of
            ``check_size``.
    """
    stream = gzip.GzipFile(fileobj=io.BytesIO(content)) if content[:2] == b"\x1f\x8b" else io.BytesIO(content)
    try:
        kind = nibabel.Nifti2Image if _is_second(content) else nibabel.Nifti1Image
        # The header alone, before nibabel reads extensions and voxels of the sizes that it states.
        header = kind.header_class(stream.read(kind.header_class.sizeof_hdr))
        shape = tuple(int(n) for n in header.get_data_shape())
        size = float(np.prod(np.array(shape, float))) * header.get_data_dtype().itemsize
        if size > LARGEST_VOLUME_BYTES or header.get_data_offset() > _LARGEST_HEADER_BYTES:
            raise PictureError("volume-too-large")
        if len(shape) < 2 or min(shape) < 1:
            raise PictureError("unsupported-volume")
        stream.seek(0)
        image = kind.from_stream(stream)
        yield from _slices(image, _voxels(image, stream), options, modality)
    except PictureError:
        raise
    except MemoryError as error:
        raise PictureError("volume-too-large") from error
    except Exception as error:  # a damaged header raises whatever nibabel and numpy like
        raise PictureError("truncated-or-corrupt") from error


def _is_second(content: bytes) -> bool:
    start = zlib.decompressobj(31).decompress(content[:65536], 348) if content[:2] == b"\x1f\x8b" else content
    return start[4:7] == b"n+2"


def _voxels(image: nibabel.Nifti1Image, stream: io.BufferedIOBase) -> np.ndarray:
    """Stored values, read in place: nibabel's own way holds a zipped volume twice (800 MiB more for one of 400)."""
    voxels = np.empty(image.dataobj.shape, image.dataobj.dtype, order="F")
    left = memoryview(voxels.ravel(order="K").view(np.uint8))
    stream.seek(image.dataobj.offset)
    while left:
        count = stream.readinto(left[:_PIECE_BYTES])
        if not count:
            raise PictureError("truncated-or-corrupt")
        left = left[count:]
    return voxels


def _slices(image: nibabel.Nifti1Image, voxels: np.ndarray, options: DecodeOptions, modality: str) -> Iterator[Frame]:
    voxels = voxels[(slice(None),) * 3 + (0,) * (voxels.ndim - 3)]  # of several volumes, the first
    voxels = voxels[..., None] if voxels.ndim == 2 else voxels
    turned = nibabel.io_orientation(image.affine)
    if np.isnan(turned).any():
        raise PictureError("unsupported-volume")
    canonical = nibabel.apply_orientation(voxels, turned)  # to the patient's right, front and head; a view
    spacing_mm = np.empty(3)
    spacing_mm[turned[:, 0].astype(int)] = nibabel.affines.voxel_sizes(image.affine)
    axis = _through_plane(spacing_mm)
    count = canonical.shape[axis]
    chosen = picked(count, options.slices)
    if len(chosen) > LARGEST_PICTURES:
        raise PictureError("too-many-frames")
    planes = [_upright(canonical, axis, index) for index in chosen]
    for rows, columns in {plane.shape[:2] for plane in planes}:
        check_size(columns, rows)
    across_mm, down_mm = np.delete(spacing_mm, axis)  # see _upright
    ratio = ratio_of((down_mm, across_mm)) or 1.0
    if voxels.dtype.names:  # RGB or RGBA, 8 bits each
        yield from (squared(np.stack([plane[name] for name in "RGB"], axis=-1), ratio) for plane in planes)
        return
    if voxels.dtype.kind not in "iuf":
        raise PictureError("unsupported-volume")
    slope, intercept = (float(value) for value in (image.dataobj.slope, image.dataobj.inter))
    if MODALITIES[modality_of_name(modality)] == "ct":
        curves = [linear_exact(*window) for window in CT_WINDOWS_HU[options.ct_window]]
    else:
        seen = np.stack([_upright(canonical, axis, index) for index in picked(count, f"even:{_STATISTICS_SLICES}")])
        seen = seen[np.isfinite(seen)] if seen.dtype.kind == "f" else seen
        if not seen.size:
            raise PictureError("no-finite-value")
        low, high = sorted(np.percentile(seen, PERCENTILES) * slope + intercept)
        curves = [linear_exact((low + high) / 2, max(high - low, 1e-6))]
    for plane in planes:
        values = np.nan_to_num(plane.astype(np.float64) * slope + intercept)
        grey = [np.rint(255 * curve(values)).astype(np.uint8) for curve in curves]
        yield squared(np.ascontiguousarray(grey[0] if len(grey) == 1 else np.stack(grey, axis=-1)), ratio)


def _through_plane(spacing_mm: np.ndarray) -> int:
    axis = int(np.argmax(spacing_mm))
    others = np.delete(spacing_mm, axis)
    return axis if spacing_mm[axis] > _MUCH_THICKER * others.max() else _AXIAL


def _upright(canonical: np.ndarray, axis: int, index: int) -> np.ndarray:
    """One slice as (rows, columns): rows from front to back or head to foot, columns from right to left (sagittal:
    from front to back)."""
    # A view: np.take copies the whole volume first where it is not in C order, which files never are.
    plane = canonical[(slice(None),) * axis + (index,)]  # its two axes grow to the right, front or head
    return plane[::-1, ::-1].T
