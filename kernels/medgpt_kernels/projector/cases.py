"""Shapes shared by tests and benchmark."""

SMALL = ((2, 4, 1, 24, 40, 48), (3, 4, 2, 20, 136, 72))
"""(images, side, fold, F, Hp, H): without and with the pixel shuffle, nothing a multiple of a block."""
BENCH = {
    "clip-336": (16, 24, 1, 1024, 2880, 2880), "clip-336-shuffled": (16, 24, 2, 1024, 2880, 2880),
    "siglip-448": (16, 32, 1, 1152, 2880, 2880), "siglip-448-shuffled": (16, 32, 2, 1152, 2880, 2880),
}  # fmt: skip
