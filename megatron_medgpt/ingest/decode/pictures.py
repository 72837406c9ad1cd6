"""``decode``: bytes of one file, of whatever kind, to the pictures that a shard may hold."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image  # before GDCM: loaded after it, Pillow 13's PNG writer crashes (python-gdcm 3.2.6 exports zlib)

from megatron_medgpt.data.manifest import Store
from megatron_medgpt.data.picture import Picture, PictureError, canonical, encode_png, pixels_of
from megatron_medgpt.data.stored import pack_pixels
from megatron_medgpt.ingest.decode.kinds import is_dicom, is_nifti
from megatron_medgpt.ingest.decode.options import LARGEST_PICTURES_BYTES, DecodeOptions
from megatron_medgpt.ingest.decode.spacing import Frame
from megatron_medgpt.ingest.facts import NO_FACTS, Facts

ENCODED = Store()
EXACT = DecodeOptions()
"""Middle frames and slices, exactly decoded."""
_ROWS_AT_ONCE = 256


@dataclass(frozen=True, slots=True, eq=False)
class Decoded:
    """A picture fit for a shard, and what its file states of it."""

    picture: Picture
    facts: Facts = NO_FACTS
    squared: bool = False
    """Whether it was resampled because its stored pixels are not square in millimetres."""

    @property
    def modality(self) -> int:
        """Index into ``MODALITIES``, 0 unknown."""
        return self.facts.modality


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

        facts, frames = frames_of(content, options, allow_burned_in=allow_burned_in)
        del content  # up to 256 MiB; nobody needs them while frames become pictures
        return written(frames, store, facts)
    if is_nifti(content):
        from megatron_medgpt.ingest.decode.volume import slices_of

        slices = slices_of(content, options, modality)
        del content
        return written(slices, store)
    if store.kind == "pixels":
        return written([Frame(pixels_of(content, options.scaled_px))], store)
    return (Decoded(canonical(content)),)


def written(frames: Iterable[Frame], store: Store, facts: Facts = NO_FACTS) -> tuple[Decoded, ...]:
    """8-bit frames as squares of pixels, or as PNG files that have been decoded again and compared.

    They are taken one by one: a file of a thousand frames is never decoded as a whole.

    Raises:
        PictureError: ``written-bytes-differ``, ``pictures-too-large`` (all of one file together), and what the frames
            raise.
    """
    one = _square if store.kind == "pixels" else _as_png
    pictures, num_bytes = [], 0
    for frame in frames:
        picture = one(frame.pixels, store)
        num_bytes += len(picture.encoded)
        if num_bytes > LARGEST_PICTURES_BYTES:
            raise PictureError("pictures-too-large")
        pictures.append(Decoded(picture, facts, frame.squared))
    return tuple(pictures)


def _square(pixels: np.ndarray, store: Store) -> Picture:
    from megatron_medgpt.data.resize import square_pixels  # torch: 1.5 s that encoded stores need not pay

    return Picture(pack_pixels(square_pixels(pixels, store.size_px, store.pad_rgb)), store.size_px, store.size_px)


def _as_png(pixels: np.ndarray, _: Store) -> Picture:
    picture = encode_png(pixels)
    with Image.open(io.BytesIO(picture.encoded)) as again:
        same = again.size == (picture.width_px, picture.height_px)
        for top in range(0, picture.height_px, _ROWS_AT_ONCE):  # as a whole, 200 MB more of the largest
            rows = np.asarray(again.crop((0, top, again.width, min(top + _ROWS_AT_ONCE, again.height))))
            same = same and np.array_equal(rows, pixels[top : top + _ROWS_AT_ONCE])
    if not same:
        raise PictureError("written-bytes-differ")
    return picture
