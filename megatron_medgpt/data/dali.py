"""DALI's decoder: JPEG and PNG bytes to square 8-bit pixels, on the CPU or in the GPU's decoder (``mixed``).

The pipeline is fed by hand, one batch a run, with nothing prefetched, and every picture goes through it together with
its number, which is compared at the end: after an error, a prefetching pipeline returns
the batch *before* the one that was asked for (DALI 2.4, reference/reliability.md), and an image must never slide.

DALI's own resize is up to 30 levels (mean 3.4) from the exported processor's on strong noise, for two reasons: Pillow
rounds to 8 bits between its two passes, and leaves out taps beyond the border where DALI repeats the last pixel. On the
CPU torch resizes (``data.resize``: nearer, and faster). Where the pixels are to stay on the GPU, ``_near_pillow`` does
both things with DALI's operators: at most 2 levels, mean 0.05.

On a GPU every JPEG goes to nvJPEG's CUDA decoder. Left to itself DALI gives a share of each batch to the GPU's JPEG
engines, whose pixels need not be the same: a picture would depend on what it is decoded with, and a resumed run would
not be the run it continues.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from nvidia.dali import fn, pipeline_def, types

from megatron_medgpt.config.errors import WorkError
from megatron_medgpt.data.resize import square_pixels
from megatron_medgpt.data.square import pad_rgb
from megatron_medgpt.types import ImageSpec

_LARGEST_BATCH = 64


class DaliDecoder:
    """Decode, pad to a centred square, resize with antialiased bicubic.

    Args:
        device: ``cpu`` or ``mixed`` (decodes and resizes on the GPU, needs ``device_id``).
        num_threads: threads of DALI beside the caller's.
        resize_in_dali: resize in the pipeline too; by default on the GPU only.
    """

    def __init__(
        self,
        spec: ImageSpec,
        *,
        device: str = "cpu",
        device_id: int | None = None,
        num_threads: int = 1,
        resize_in_dali: bool | None = None,
    ) -> None:
        self._spec, self._device, self._device_id, self._num_threads = spec, device, device_id, num_threads
        self.name = "DALI on the CPU" if device == "cpu" else f"DALI on GPU {device_id}"
        self._in_dali = device != "cpu" if resize_in_dali is None else resize_in_dali
        self._pipeline = self._build()

    def _build(self):
        size, device, colour, in_dali = self._spec.size_px, self._device, pad_rgb(self._spec), self._in_dali

        @pipeline_def(
            batch_size=_LARGEST_BATCH, num_threads=self._num_threads, device_id=self._device_id,
            prefetch_queue_depth=1, exec_dynamic=True,
        )  # fmt: skip
        def decode():
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=True)
            image = fn.decoders.image(
                encoded, device=device, output_type=types.RGB, jpeg_fancy_upsampling=True, use_fast_idct=False,
                hw_decoder_load=0.0,
            )  # fmt: skip
            number = fn.external_source(name="number", dtype=types.INT64, ndim=0)
            if not in_dali:
                return image, number
            shape = fn.cast(fn.peek_image_shape(encoded), dtype=types.INT32)[:2]
            return _near_pillow(image, shape, size, colour), number

        pipeline = decode()
        pipeline.build()
        return pipeline

    def decode(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """uint8 (I, size, size, 3).

        Raises:
            WorkError: an image does not decode.
        """
        size = self._spec.size_px
        out = np.empty((len(images), size, size, 3), np.uint8)
        for first in range(0, len(images), _LARGEST_BATCH):
            batch = list(images[first : first + _LARGEST_BATCH])
            numbers = np.arange(first, first + len(batch), dtype=np.int64)
            try:
                decoded, came_back = self._pipeline.run(encoded=batch, number=list(numbers))
            except RuntimeError as error:
                self._pipeline = self._build()  # a pipeline that failed is not trusted with the next batch
                raise WorkError(
                    f"a stored image does not decode ({str(error).splitlines()[0]}); run medgpt inspect --verify"
                ) from error
            if not np.array_equal(came_back.as_array().reshape(-1), numbers):
                raise WorkError("DALI returned other pictures than it was given; set image_reader=pillow")
            decoded = decoded.as_cpu()
            if self._in_dali:
                out[first : first + len(batch)] = decoded.as_array()
                continue
            for place in range(len(batch)):
                out[first + place] = square_pixels(decoded.at(place), size, pad_rgb(self._spec))
        return out


def _near_pillow(image, shape, size: int, colour: tuple[int, int, int]):
    """Pad and resize in DALI as Pillow does: across, to 8 bits, down, to 8 bits, no taps beyond the border.

    A tap beyond the border meets a margin of zeros, and the sum is divided by what a row of ones gives there. Both
    passes run down the first axis of a transposed picture, which DALI's CPU code does three times as fast.
    """
    side = fn.reductions.max(shape)
    # Pillow pastes at (side - size) // 2; a slice that starts outside the image is filled with the colour.
    image = fn.slice(
        image, start=-((side - shape) // 2), shape=fn.stack(side, side), axes=(0, 1), out_of_bounds_policy="pad",
        fill_values=colour,
    )  # fmt: skip
    margin = 2 * side // size + 4
    start, length = fn.cast(margin, dtype=types.FLOAT), fn.cast(side, dtype=types.FLOAT)
    zero = length * 0.0

    def down(picture, columns):
        framed = fn.slice(
            picture, start=-margin, shape=side + 2 * margin, axes=(0,), out_of_bounds_policy="pad", fill_values=0
        )
        return fn.resize(
            framed, resize_y=float(size), resize_x=columns, roi_start=fn.stack(start, zero),
            roi_end=fn.stack(start + length, columns), interp_type=types.INTERP_CUBIC, antialias=True,
            dtype=types.FLOAT,
        )  # fmt: skip

    def turned(picture):
        return fn.transpose(picture, perm=(1, 0, 2), output_layout="HWC")

    ones = image[:, 0:1, 0:1] * np.uint8(0) + np.uint8(1)
    weight = down(ones, zero + 1.0)
    across = fn.cast(down(turned(image), length) / weight, dtype=types.UINT8)
    return fn.cast(down(turned(across), zero + float(size)) / weight, dtype=types.UINT8)
