"""The square an encoder sees: padding and resizing, in Pillow. No torch, so that ingest can use it."""

from __future__ import annotations

from PIL import Image, ImageOps

from megatron_medgpt.types import ImageSpec


def pad_rgb(spec: ImageSpec) -> tuple[int, int, int]:
    """Colour of the padding: the encoder's mean colour, truncated to integers as LlavaImageProcessor does."""
    red, green, blue = (int(value * 255) for value in spec.mean)
    return red, green, blue


def square(image: Image.Image, size_px: int, colour: tuple[int, int, int]) -> Image.Image:
    """Pad to a centred square and resize: the reference of the pixel path."""
    image = ImageOps.exif_transpose(image).convert("RGB")
    side = max(image.size)
    if image.size != (side, side):
        whole = Image.new("RGB", (side, side), colour)
        whole.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = whole
    return image if side == size_px else image.resize((size_px, size_px), Image.Resampling.BICUBIC)
