"""DALI's decoder: JPEG and PNG bytes to square 8-bit pixels, on the CPU or in the GPU's decoder (``mixed``).

The pipeline is fed by hand, one batch a run, with nothing prefetched: after an error, a prefetching pipeline returns
the batch *before* the one that was asked for (DALI 2.4, reference/reliability.md), and an image must never slide.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from nvidia.dali import fn, pipeline_def, types

from megatron_medgpt.config.errors import WorkError
from megatron_medgpt.data.square import pad_rgb
from megatron_medgpt.types import ImageSpec

_LARGEST_BATCH = 64


class DaliDecoder:
    """Decode, pad to a centred square, resize with antialiased bicubic.

    Args:
        device: ``cpu`` or ``mixed`` (decodes on the GPU, needs ``device_id``).
        num_threads: threads of DALI beside the caller's.
    """

    def __init__(
        self, spec: ImageSpec, *, device: str = "cpu", device_id: int | None = None, num_threads: int = 1
    ) -> None:
        self._spec, self._device, self._device_id, self._num_threads = spec, device, device_id, num_threads
        self._pipeline = self._build()

    def _build(self):
        size, device = self._spec.size_px, self._device

        @pipeline_def(
            batch_size=_LARGEST_BATCH, num_threads=self._num_threads, device_id=self._device_id,
            prefetch_queue_depth=1, exec_dynamic=True,
        )  # fmt: skip
        def decode():
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=True)
            shape = fn.cast(fn.peek_image_shape(encoded), dtype=types.INT32)[:2]
            side = fn.reductions.max(shape)
            # Pillow pastes at (side - size) // 2; a slice that starts outside the image is filled with the colour.
            start = -((side - shape) // 2)
            image = fn.decoders.image(
                encoded, device=device, output_type=types.RGB, jpeg_fancy_upsampling=True, use_fast_idct=False
            )
            image = fn.slice(
                image, start=start, shape=fn.stack(side, side), axes=(0, 1), out_of_bounds_policy="pad",
                fill_values=pad_rgb(self._spec),
            )  # fmt: skip
            return fn.resize(
                image, size=(size, size), interp_type=types.INTERP_CUBIC, antialias=True, dtype=types.UINT8
            )

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
            try:
                (squares,) = self._pipeline.run(encoded=batch)
            except RuntimeError as error:
                self._pipeline = self._build()  # a pipeline that failed is not trusted with the next batch
                raise WorkError(
                    f"a stored image does not decode ({str(error).splitlines()[0]}); run medgpt inspect --verify"
                ) from error
            out[first : first + len(batch)] = squares.as_cpu().as_array()
        return out
