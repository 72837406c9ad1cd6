"""A DICOM file to 8-bit frames.

Order of a grey picture: stored values -> modality LUT (Hounsfield units and the like) -> VOI LUT or window ->
presentation LUT -> inverted once if MONOCHROME1 -> 8 bits -> square pixels. Where no window is given, CT gets a preset
and everything else its 0.5 to 99.5 percentile without padding.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import get_frame
from pydicom.pixels import get_decoder, pixel_array
from pydicom.uid import (
    UID,
    JPEG2000TransferSyntaxes,
    JPEGBaseline8Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from megatron_medgpt.data.picture import PictureError, check_size
from megatron_medgpt.ingest.decode import gdcm_frames
from megatron_medgpt.ingest.decode.codestream import check_deflated, halvings_of_j2k, size_of
from megatron_medgpt.ingest.decode.frames import count_frames, header_of_frame
from megatron_medgpt.ingest.decode.options import LARGEST_PICTURES, DecodeOptions, picked
from megatron_medgpt.ingest.decode.reading import dcmread
from megatron_medgpt.ingest.decode.spacing import Frame, row_to_column, squared
from megatron_medgpt.ingest.decode.windowing import to_8_bit
from megatron_medgpt.ingest.facts import Facts, facts_of_header
from megatron_medgpt.ingest.identity import held_back

_NO_PICTURES = ("1.2.840.10008.5.1.4.1.1.66", "1.2.840.10008.5.1.4.1.1.481.2")
"""Segmentations and radiotherapy doses have pixels, but are no pictures of a patient."""

_PLUGINS = {
    JPEGBaseline8Bit: "pillow", JPEGLossless: gdcm_frames.PLUGIN, JPEGLosslessSV1: gdcm_frames.PLUGIN,
    JPEGLSLossless: "pyjpegls", JPEGLSNearLossless: "pyjpegls", RLELossless: "pylibjpeg",
    **dict.fromkeys(JPEG2000TransferSyntaxes, "pylibjpeg"),
}  # fmt: skip
"""pydicom tries all that are installed, and so would take a damaged frame to GDCM, in this process, in the end."""

gdcm_frames.register()


def frames_of(content: bytes, options: DecodeOptions, *, allow_burned_in: bool) -> tuple[Facts, Iterator[Frame]]:
    """What the header says of the picture, and the chosen frames, decoded as they are taken.

    Raises:
        PictureError: with the reason; a frame may raise it too.
    """
    check_deflated(content)
    try:
        ds = dcmread(io.BytesIO(content))
        rows, columns = int(ds.get("Rows") or 0), int(ds.get("Columns") or 0)
        num_frames = count_frames(ds)
        has_pixels = any(name in ds for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData"))
        reason = held_back(ds)
        sop_class, syntax = str(ds.get("SOPClassUID", "")), ds.file_meta.get("TransferSyntaxUID")
        facts = facts_of_header(ds)
        ds.get("PhotometricInterpretation")  # an element is only read when it is asked for
    except PictureError:
        raise
    except Exception as error:  # a damaged header raises whatever pydicom and zlib like, some of it on access
        raise PictureError("truncated-or-corrupt") from error
    if not rows or not columns or not has_pixels:
        raise PictureError("dicom-without-image")
    if sop_class.startswith(_NO_PICTURES):
        raise PictureError("dicom-without-image")
    check_size(columns, rows)
    if reason and not allow_burned_in:
        raise PictureError(reason)
    chosen = picked(num_frames, options.frames)
    if len(chosen) > LARGEST_PICTURES:
        raise PictureError("too-many-frames")
    if not _supported(syntax):
        raise PictureError("unsupported-transfer-syntax")
    ds.buffer = None  # the whole file, beside its pixels
    return facts, _decoded(ds, chosen, num_frames, options)


def _supported(syntax: object) -> bool:
    try:
        return isinstance(syntax, UID) and get_decoder(syntax).is_available  # a damaged header may state two
    except NotImplementedError:  # MPEG, HEVC, JPIP, private ones and what is retired
        return False


def _decoded(ds: Dataset, chosen: range | tuple[int, ...], num_frames: int, options: DecodeOptions) -> Iterator[Frame]:
    for place, index in enumerate(chosen, 1):
        try:
            stored = _stored(ds, index, num_frames, options.scaled_px)  # YBR comes out as RGB
            header = header_of_frame(ds, index)
            if place == len(chosen):
                del ds.PixelData
            frame = squared(to_8_bit(stored, header, options.ct_window), row_to_column(header))
        except PictureError:
            raise
        except MemoryError as error:
            raise PictureError("too-many-pixels") from error
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # a damaged stream raises what the codec likes; a panic in Rust is no Exception
            raise PictureError("truncated-or-corrupt") from error
        yield frame


def _stored(ds: Dataset, index: int, num_frames: int, scaled_px: int) -> np.ndarray:
    syntax = ds.file_meta.TransferSyntaxUID
    if not syntax.is_encapsulated:
        return pixel_array(ds, index=index)
    if syntax != RLELossless:
        stream = get_frame(ds.PixelData, index, number_of_frames=num_frames)
        size = size_of(stream)
        if size is not None and size != (ds.Columns, ds.Rows):
            # A codec believes its stream: 65,000 squared would be allocated for a header that says 64 x 64.
            raise PictureError("truncated-or-corrupt")
        plain_colours = ds.PhotometricInterpretation not in ("YBR_FULL", "YBR_FULL_422", "PALETTE COLOR")
        if scaled_px and plain_colours and syntax in JPEG2000TransferSyntaxes:
            halvings = _halvings(max(ds.Columns, ds.Rows), scaled_px, halvings_of_j2k(stream))
            if halvings:
                return _reduced(stream, halvings, int(ds.PixelRepresentation))
    plugin = _PLUGINS.get(syntax) or (gdcm_frames.PLUGIN if ds.BitsStored > 8 else "pillow")
    return pixel_array(ds, index=index, decoding_plugin=plugin)


def _halvings(longest: int, scaled_px: int, possible: int) -> int:
    count = 0
    while count < min(possible, 3) and longest >> (count + 1) >= scaled_px:
        count += 1
    return count


def _reduced(stream: bytes, halvings: int, signed: int) -> np.ndarray:
    """A JPEG 2000 frame decoded at a half, quarter or eighth of its size (OpenJPEG, through Pillow).

    Pillow moves samples of 9 to 15 bits to the top of 16 and signed ones up by half of their range; both are undone.
    """
    start = stream.find(b"\xff\x4f\xff\x51")
    precision = (stream[start + 42] & 0x7F) + 1
    with Image.open(io.BytesIO(stream), formats=("JPEG2000",)) as image:
        image.reduce = halvings
        image.load()
        values = np.asarray(image)
    if values.ndim == 3:
        return values
    lifted = values.astype(np.int32) >> (8 * values.dtype.itemsize - precision)
    return lifted - (1 << (precision - 1)) if signed else lifted
