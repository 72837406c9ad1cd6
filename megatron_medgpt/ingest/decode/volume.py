"""A NIfTI volume to 8-bit slices, oriented and proportioned as a radiologist looks at them.

Axial slices show the patient's right at the left and front at the top, coronal and sagittal ones the head at the top.
Slices are cut across the axis with the thickest voxels (as they were acquired), axially where all are alike.
"""

from __future__ import annotations

import gzip
import io
import math
import zlib
from collections.abc import Iterator

import nibabel
import numpy as np

from megatron_medgpt.data.picture import PictureError, check_size
from megatron_medgpt.ingest.decode.options import CT_WINDOWS_HU, LARGEST_PICTURES, DecodeOptions, picked
from megatron_medgpt.ingest.decode.spacing import Frame, ratio_of, squared
from megatron_medgpt.ingest.decode.windowing import PERCENTILES, Curve, linear_exact
from megatron_medgpt.ingest.identity import modality_of_name
from megatron_medgpt.types import MODALITIES

LARGEST_VOLUME_BYTES = 400 << 20
_LARGEST_HEADER_BYTES = 16 << 20
_PIECE_BYTES = 1 << 20
_MUCH_THICKER = 1.5
_STATISTICS_SLICES = 32
_STATISTICS_VOXELS = _STATISTICS_SLICES * 512 * 512
"""Of more, rows and columns are left out evenly: percentiles of 400 MiB would take 800 more."""
_AXIAL = 2


def slices_of(content: bytes, options: DecodeOptions, modality: str = "") -> Iterator[Frame]:
    """The chosen slices, their pixels square in millimetres.

    A window covers the whole volume, so that neighbouring slices look alike: the CT preset where ``modality`` says
    computed tomography, else the percentiles of up to 32 slices spread over it.

    Only the slices that are looked at are held, and each until it is given.

    Raises:
        PictureError: ``volume-too-large``, ``unsupported-volume``, ``truncated-or-corrupt``, and those of
            ``check_size``.
    """
    stream = gzip.GzipFile(fileobj=io.BytesIO(content)) if content[:2] == b"\x1f\x8b" else io.BytesIO(content)
    try:
        kind = nibabel.Nifti2Image if _is_second(content) else nibabel.Nifti1Image
        del content
        # The header alone, before nibabel reads extensions and voxels of the sizes that it states.
        header = kind.header_class(stream.read(kind.header_class.sizeof_hdr))
        shape = tuple(int(n) for n in header.get_data_shape())
        size = float(np.prod(np.array(shape, float))) * header.get_data_dtype().itemsize
        if size > LARGEST_VOLUME_BYTES or header.get_data_offset() > _LARGEST_HEADER_BYTES:
            raise PictureError("volume-too-large")
        if len(shape) < 2 or min(shape) < 1:
            raise PictureError("unsupported-volume")
        stream.seek(0)
        frames = _slices(kind.from_stream(stream), stream, options, modality)
        del stream
        yield from frames
    except PictureError:
        raise
    except MemoryError as error:
        raise PictureError("volume-too-large") from error
    except Exception as error:  # a damaged header raises whatever nibabel and numpy like
        raise PictureError("truncated-or-corrupt") from error


def _is_second(content: bytes) -> bool:
    start = zlib.decompressobj(31).decompress(content[:65536], 348) if content[:2] == b"\x1f\x8b" else content
    return start[4:7] == b"n+2"


def _slices(
    image: nibabel.Nifti1Image, stream: io.BufferedIOBase, options: DecodeOptions, modality: str
) -> Iterator[Frame]:
    shape = (*image.shape[:3], 1)[:3]  # of several volumes, the first
    stored = image.dataobj.dtype
    turned = nibabel.io_orientation(image.affine)
    if np.isnan(turned).any() or not (stored.names or stored.kind in "iuf"):
        raise PictureError("unsupported-volume")
    spacing_mm = np.empty(3)
    spacing_mm[turned[:, 0].astype(int)] = nibabel.affines.voxel_sizes(image.affine)
    axis = _through_plane(spacing_mm)
    across = int(np.flatnonzero(turned[:, 0] == axis)[0])  # the same axis, as the file counts
    count = shape[across]
    chosen = picked(count, options.slices)
    if len(chosen) > LARGEST_PICTURES:
        raise PictureError("too-many-frames")
    rows, columns = (shape[int(np.flatnonzero(turned[:, 0] == a)[0])] for a in np.delete(range(3), axis)[::-1])
    check_size(columns, rows)
    across_mm, down_mm = np.delete(spacing_mm, axis)  # see _upright
    ratio = ratio_of((down_mm, across_mm)) or 1.0
    is_ct = MODALITIES[modality_of_name(modality)] == "ct"
    looked_at = () if stored.names or is_ct else picked(count, f"even:{_STATISTICS_SLICES}")
    backwards = turned[across, 1] < 0
    planes = _read(
        stream, image.dataobj, shape, across, {count - 1 - k if backwards else k for k in (*chosen, *looked_at)}
    )
    planes = {(count - 1 - k if backwards else k): _upright(plane, across, turned, axis) for k, plane in planes.items()}
    slope, intercept = (float(value) for value in (image.dataobj.slope, image.dataobj.inter))
    del stream, image  # they hold the file, 256 MiB of the largest
    if is_ct:
        curves = [linear_exact(*window) for window in CT_WINDOWS_HU[options.ct_window]]
    elif looked_at:
        low, high = sorted(_percentiles([planes[k] for k in looked_at]) * slope + intercept)
        curves = [linear_exact((low + high) / 2, max(high - low, 1e-6))]
    for k in set(looked_at).difference(chosen):
        del planes[k]
    for k in chosen:
        plane = planes.pop(k)
        if stored.names:  # RGB or RGBA, 8 bits each
            yield squared(np.stack([plane[name] for name in "RGB"], axis=-1), ratio)
        else:
            yield squared(_grey(plane, slope, intercept, curves), ratio)


def _read(
    stream: io.BufferedIOBase, voxels: nibabel.arrayproxy.ArrayProxy, shape: tuple[int, ...], across: int,
    wanted: set[int],
) -> dict[int, np.ndarray]:  # fmt: skip
    """Stored slices across an axis, each an array of its own. All voxels are read, so that what is cut off is found.

    The file counts its first axis fastest. nibabel's own way holds a zipped volume twice.
    """
    planes = {k: np.empty(np.delete(shape, across), voxels.dtype, order="F") for k in wanted}
    line_bytes = shape[0] * voxels.dtype.itemsize
    lines = min(shape[1], max(1, _PIECE_BYTES // line_bytes))
    slabs = max(1, _PIECE_BYTES // (line_bytes * shape[1]))
    stream.seek(voxels.offset)
    for z in range(0, shape[2], slabs):
        zs = slice(z, min(z + slabs, shape[2]))
        for y in range(0, shape[1], lines):
            ys = slice(y, min(y + lines, shape[1]))
            piece = _exactly(stream, (zs.stop - z) * (ys.stop - y) * line_bytes)
            block = np.frombuffer(piece, voxels.dtype).reshape(zs.stop - z, ys.stop - y, shape[0])
            for k, plane in planes.items():
                if across == 0:
                    plane[ys, zs] = block[:, :, k].T
                elif across == 1 and y <= k < ys.stop:
                    plane[:, zs] = block[:, k - y].T
                elif across == 2 and z <= k < zs.stop:
                    plane[:, ys] = block[k - z].T
    left = (int(np.prod(voxels.shape[3:])) - 1) * line_bytes * shape[1] * shape[2]  # further volumes
    while left:
        left -= len(_exactly(stream, min(left, _PIECE_BYTES)))
    stream.read(1)  # gzip compares its checksum where it finds the end
    return planes


def _exactly(stream: io.BufferedIOBase, num_bytes: int) -> bytes:
    piece = stream.read(num_bytes)
    if len(piece) != num_bytes:
        raise PictureError("truncated-or-corrupt")
    return piece


def _percentiles(planes: list[np.ndarray]) -> np.ndarray:
    """``PERCENTILES`` of the stored values."""
    step = math.isqrt(max(1, sum(plane.size for plane in planes) // _STATISTICS_VOXELS))
    seen = np.stack([plane[::step, ::step] for plane in planes])
    seen = seen[np.isfinite(seen)] if seen.dtype.kind == "f" else seen
    if not seen.size:
        raise PictureError("no-finite-value")
    return np.percentile(seen, PERCENTILES)


def _grey(plane: np.ndarray, slope: float, intercept: float, curves: list[Curve]) -> np.ndarray:
    """uint8 (rows, columns), or (rows, columns, 3) of three curves."""
    grey = np.empty((*plane.shape, len(curves)), np.uint8)
    at_once = max(1, _PIECE_BYTES // plane.shape[1])  # float64 of a whole slice could be 512 MB, several times
    for top in range(0, len(plane), at_once):
        values = np.nan_to_num(plane[top : top + at_once].astype(np.float64) * slope + intercept)
        for number, curve in enumerate(curves):
            grey[top : top + at_once, :, number] = np.rint(255 * curve(values))
    return grey[..., 0] if len(curves) == 1 else grey


def _through_plane(spacing_mm: np.ndarray) -> int:
    axis = int(np.argmax(spacing_mm))
    others = np.delete(spacing_mm, axis)
    return axis if spacing_mm[axis] > _MUCH_THICKER * others.max() else _AXIAL


def _upright(stored: np.ndarray, across: int, turned: np.ndarray, axis: int) -> np.ndarray:
    """One slice as (rows, columns): rows from front to back or head to foot, columns from right to left (sagittal:
    from front to back); a view.

    Args:
        stored: as the file has it, without its axis ``across``.
        turned: of each stored axis the patient's (right, front, head) and its direction.
        axis: the patient's axis across the slice.
    """
    canonical = nibabel.apply_orientation(np.expand_dims(stored, across), turned)
    plane = canonical[(slice(None),) * axis + (0,)]  # its two axes grow to the right, front or head
    return plane[::-1, ::-1].T
