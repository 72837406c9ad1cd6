"""Pictures that tell their seed."""

import io

import numpy as np
from PIL import Image


def png_of(seed: int, width: int = 30, height: int = 20) -> bytes:
    """A PNG whose pixels tell its seed."""
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()
