"""Small changes of pictures during training: stateless, so that a resumed run sees the pictures it would have seen.

What happens to an image follows from (seed, epoch, sample, place in the sample) and from nothing else: not from the
rank, the order of reading, the cache, or what was read before.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
from PIL import Image

from megatron_medgpt.config.schema import AugmentConfig


def draws(seed: int, epoch: int, sample_id: str, place: int) -> np.ndarray:
    """float64 (7,): numbers in [-1, 1), as if random, of one image in one epoch."""
    digest = hashlib.blake2b(f"{seed}\x1f{epoch}\x1f{sample_id}\x1f{place}".encode(), digest_size=56).digest()
    return np.frombuffer(digest, "<i8") / 2.0**63


def augmented(
    square_YXC: np.ndarray, config: AugmentConfig, numbers: np.ndarray, colour: tuple[int, int, int]
) -> np.ndarray:
    """uint8 (size, size, 3): the square turned, moved, zoomed, made brighter and harder as far as ``config`` allows.

    Args:
        numbers: of ``draws``.
        colour: of what comes in from outside; the padding of the encoder.
    """
    turn, across, down, zoom, brightness, contrast, mirror = numbers.tolist()
    size = square_YXC.shape[0]
    if config.rotate_degrees or config.shift or config.zoom:
        angle = math.radians(turn * config.rotate_degrees)
        scale = (1 + config.zoom) ** -zoom  # in place of 1 + zoom: as often larger as smaller
        cosine, sine, centre = math.cos(angle) * scale, math.sin(angle) * scale, size / 2
        x, y = centre + across * config.shift * size, centre + down * config.shift * size
        # Where the pixel at the output's (x, y) comes from: the turn about the centre, then the shift.
        back = (cosine, sine, centre - cosine * x - sine * y, -sine, cosine, centre + sine * x - cosine * y)
        turned = Image.fromarray(square_YXC).transform(
            (size, size), Image.Transform.AFFINE, back, Image.Resampling.BILINEAR, fillcolor=colour
        )
        square_YXC = np.asarray(turned)
    if config.mirror and mirror < 0:
        square_YXC = square_YXC[:, ::-1]
    if config.brightness or config.contrast:
        values = np.arange(256) / 255
        values = (values - 0.5) * (1 + contrast * config.contrast) + 0.5 + brightness * config.brightness
        square_YXC = np.round(255 * values.clip(0, 1)).astype(np.uint8)[square_YXC]
    return square_YXC
