"""``decode``: bytes of one file, of whatever kind, to the pictures that a shard may hold."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image  # before GDCM: loaded after it, Pillow 13's PNG writer crashes (python-gdcm 3.2.6 exports zlib)

from megatron_medgpt.data.manifest import Store
from megatron_medgpt.data.picture import Picture, PictureError, canonical, encode_png, pixels_of
from megatron_medgpt.data.shards import pack_pixels
from megatron_medgpt.ingest.decode.kinds import is_dicom, is_nifti
from megatron_medgpt.ingest.decode.options import DecodeOptions
from megatron_medgpt.ingest.identity import modality_of_header

ENCODED = Store()
EXACT = DecodeOptions()
"""Middle frames and slices, exactly decoded."""
_UNKNOWN = 0


@dataclass(frozen=True, slots=True, eq=False)
class Decoded:
    """A picture fit for a shard, and the modality its file states (index into ``MODALITIES``, 0 unknown)."""

    picture: Picture
    modality: int


def decode(
    content: bytes,
    options: DecodeOptions = EXACT,
    *,
    store: Store = ENCODED,
    allow_burned_in: bool = False,
    modality: str = "",
) -> tuple[Decoded, ...]:
    """Decode one file's bytes: one picture of a JPEG or PNG, the chosen frames or slices of a DICOM or NIfTI file.

    Args:
        store: whether a picture becomes JPEG or PNG bytes, or a square of pixels.
        modality: what the table says of it; a NIfTI file does not know whether it is CT.

    Raises:
        PictureError: with the reason; see also ``data.picture.canonical``.
    """
    if is_dicom(content):  # pydicom and its codecs, 0.3 s of imports that other files need not pay
        from megatron_medgpt.ingest.decode.dicom import frames_of

        header, frames = frames_of(content, options, allow_burned_in=allow_burned_in)
        return written(frames, modality_of_header(header), store)
    if is_nifti(content):
        from megatron_medgpt.ingest.decode.volume import slices_of

        return written(slices_of(content, options, modality), _UNKNOWN, store)
    if store.kind == "pixels":
        return written([pixels_of(content, options.scaled_px)], _UNKNOWN, store)
    return (Decoded(canonical(content), _UNKNOWN),)


def written(frames: Sequence[np.ndarray], modality: int, store: Store) -> tuple[Decoded, ...]:
    """8-bit frames as squares of pixels, or as PNG files that have been decoded again and compared.

    Raises:
        PictureError: ``written-bytes-differ``.
    """
    if store.kind == "pixels":
        from megatron_medgpt.data.resize import square_pixels  # torch: 1.5 s that encoded stores need not pay

        squares = [square_pixels(frame, store.size_px, store.pad_rgb) for frame in frames]
        return tuple(Decoded(Picture(pack_pixels(s), store.size_px, store.size_px), modality) for s in squares)
    pictures = []
    for frame in frames:
        picture = encode_png(Image.fromarray(frame))
        with Image.open(io.BytesIO(picture.encoded)) as again:
            if not np.array_equal(np.asarray(again), frame):
                raise PictureError("written-bytes-differ")
        pictures.append(Decoded(picture, modality))
    return tuple(pictures)
