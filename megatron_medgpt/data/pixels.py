"""Stored images to the pixels an encoder wants, and the cache that makes later epochs free of decoding.

One definition for training, evaluation and export: decode to 8-bit RGB, pad to a centred square with the encoder's mean
colour, resize with antialiased bicubic, round to 8 bits, scale and normalise. That is transformers'
``LlavaImageProcessor`` with ``do_pad`` (never a centre crop: it cuts the sides off wide images).
"""

from __future__ import annotations

import importlib.util
import io
import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megatron_medgpt.config.errors import UsageError, WorkError
from megatron_medgpt.config.schema import IMAGE_READERS
from megatron_medgpt.data.square import pad_rgb, square
from megatron_medgpt.data.stored import unpack_pixels
from megatron_medgpt.types import ImageSpec

log = logging.getLogger(__name__)
Reader = Literal["auto", "dali", "pillow"]
Fetch = Callable[[Hashable], tuple[str, np.ndarray | Callable[[np.ndarray], None]]]


class Decoder(Protocol):
    """Turns encoded images into square 8-bit pixels."""

    name: str
    """For logs."""

    def decode(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """uint8 (I, size, size, 3) of I encoded images (uint8 arrays of JPEG or PNG bytes).

        Raises:
            WorkError: an image that ingest verified does not decode: the shard is damaged.
        """
        ...


class PillowDecoder:
    """The reference decoder, one image at a time on one core."""

    name = "Pillow"

    def __init__(self, spec: ImageSpec) -> None:
        self._spec = spec

    def decode(self, images: Sequence[np.ndarray]) -> np.ndarray:
        size = self._spec.size_px
        out = np.empty((len(images), size, size, 3), np.uint8)
        for number, encoded in enumerate(images):
            try:
                with Image.open(io.BytesIO(encoded), formats=("JPEG", "PNG")) as image:
                    out[number] = square(image, size, pad_rgb(self._spec))
            except (OSError, ValueError, Image.DecompressionBombError) as error:
                raise WorkError(
                    f"a stored image does not decode ({type(error).__name__}); run medgpt inspect --verify"
                ) from error
        return out


def chosen_decoder(
    reader: Reader, device: torch.device | None, dali_installed: bool
) -> Literal["pillow", "cpu", "mixed"]:
    """Pillow, DALI on the CPU, or DALI with the decoder of the rank's GPU (``mixed``).

    ``auto`` is DALI where it is installed, else Pillow; DALI decodes on the GPU where there is one.

    Raises:
        UsageError: unknown name, or ``dali`` where DALI is not installed.
    """
    if reader not in IMAGE_READERS:
        raise UsageError(f"image_reader={reader!r}; allowed: {', '.join(IMAGE_READERS)}")
    if reader == "dali" and not dali_installed:
        raise UsageError("image_reader=dali, but DALI is not installed; pip install '.[dali]', or set auto or pillow")
    if reader == "pillow" or not dali_installed:
        return "pillow"
    return "mixed" if device is not None and device.type == "cuda" else "cpu"


def make_decoder(reader: Reader, spec: ImageSpec, device: torch.device | None = None) -> Decoder:
    """The decoder of a run; see ``chosen_decoder``."""
    installed = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
    chosen = chosen_decoder(reader, device, installed)
    if chosen == "pillow":
        return PillowDecoder(spec)
    from megatron_medgpt.data.dali import DaliDecoder

    return DaliDecoder(spec, device=chosen, device_id=device.index if device and chosen == "mixed" else None)


class PixelSource:
    """Pixels of stored images, by key. Ready 8-bit squares are kept up to ``cache_bytes`` in the order they come.

    Nothing is thrown out when the cache is full: every image is wanted once an epoch, in a new order, so an image that
    stays serves as often as any that could take its place.

    Args:
        device: of the rank; DALI decodes there if it is a GPU. Pixels come back to the host all the same.
    """

    def __init__(
        self,
        spec: ImageSpec,
        reader: Reader = "auto",
        cache_bytes: int = 1 << 29,
        device: torch.device | None = None,
    ) -> None:
        self.spec = spec
        self._reader: Reader = reader
        self._device = device
        self._decoder: Decoder | None = None
        self._cache: dict[Hashable, np.ndarray] = {}
        self._free_images = cache_bytes // (3 * spec.size_px**2)
        scale = 1 / (255 * np.asarray(spec.std, np.float64))
        shift = -np.asarray(spec.mean, np.float64) / np.asarray(spec.std, np.float64)
        self._scale_C = torch.from_numpy(scale.astype(np.float32))
        self._shift_C = torch.from_numpy(shift.astype(np.float32))
        if reader not in IMAGE_READERS:
            raise UsageError(f"image_reader={reader!r}; allowed: {', '.join(IMAGE_READERS)}")

    def read(self, keys: Sequence[Hashable], fetch: Fetch) -> Tensor:
        """float32 (I, 3, size, size), normalised, contiguous. See ``squares`` for the arguments."""
        return self.normalise(self.squares(keys, fetch))

    def squares(self, keys: Sequence[Hashable], fetch: Fetch) -> np.ndarray:
        """uint8 (I, size, size, 3).

        Args:
            keys: identities of the images; equal keys are equal images for ever.
            fetch: gives (store kind, uint8 record) of a key that is not in the cache; in place of a pixel record it
                may give what reads its pixels into a uint8 (size, size, 3) array.

        Raises:
            WorkError: a stored image does not decode.
        """
        size = self.spec.size_px
        squares_IYXC = np.empty((len(keys), size, size, 3), np.uint8)
        missing: list[int] = []
        encoded: list[np.ndarray] = []
        for place, key in enumerate(keys):
            ready = self._cache.get(key)
            if ready is None:
                kind, record = fetch(key)
                if kind == "encoded":
                    missing.append(place)
                    encoded.append(record)
                    continue
                if callable(record):
                    record(squares_IYXC[place])
                    continue
                ready = unpack_pixels(record)
            squares_IYXC[place] = ready
        if encoded:
            if self._decoder is None:
                self._decoder = make_decoder(self._reader, self.spec, self._device)
                log.info("images are decoded by %s", self.decoder_name)
            squares_IYXC[missing] = self._decoder.decode(encoded)
            for place in missing[: max(0, self._free_images)]:
                if keys[place] not in self._cache:
                    self._cache[keys[place]] = squares_IYXC[place].copy()
                    self._free_images -= 1
        return squares_IYXC

    def normalise(self, squares_IYXC: np.ndarray) -> Tensor:
        """float32 (I, 3, size, size) of uint8 squares."""
        # The order of the dimensions is changed while a pixel is one byte: 3.4 times as fast as after, same bits.
        pixels_ICYX = torch.from_numpy(squares_IYXC).permute(0, 3, 1, 2).contiguous().float()
        return pixels_ICYX.mul_(self._scale_C[:, None, None]).add_(self._shift_C[:, None, None])

    @property
    def decoder_name(self) -> str:
        """Name for logs; ``none yet`` before the first image was decoded."""
        return "none yet" if self._decoder is None else self._decoder.name
