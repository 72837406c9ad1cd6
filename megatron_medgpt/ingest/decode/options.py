"""What a user chooses about pixels. All of it changes the bytes of a shard, so all of it is recorded."""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_medgpt.config.errors import UsageError

CT_WINDOWS_HU: dict[str, tuple[tuple[float, float], ...]] = {
    "soft-tissue": ((50, 400),),
    "lung": ((-600, 1500),),
    "bone": ((400, 1800),),
    "brain": ((40, 80),),
    "three": ((-600, 1500), (50, 400), (40, 80)),
}
"""(centre, width) of what a CT without a window gets; ``three`` puts lung, soft tissue and brain into red, green, blue,
and replaces a window that the file brings."""
LARGEST_PICTURES = 1024
"""Pictures that one file may become."""
LARGEST_PICTURES_BYTES = 256 << 20
"""Of the pictures of one record together, as they are stored: all are in memory until the last is known to be good."""
_PICK = re.compile(r"middle|all|(?:every|even):[1-9][0-9]{0,4}")


@dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """Raises UsageError where an option is not allowed.

    Attributes:
        frames: which frames of a multi-frame file become pictures: ``middle``, ``all``, ``every:K``, ``even:N``.
        slices: which slices of a series or of a NIfTI volume do, in the same words.
        ct_window: a name of ``CT_WINDOWS_HU``.
        tiles: which tissue tiles of a whole slide become pictures (row by row), in the same words.
        tile_px: side of a tile.
        um_per_px: resolution of a tile; 0.5 is about 20x, 0.25 about 40x.
        scaled_px: 0 decodes exactly; else JPEG and JPEG 2000 may be decoded at a half, a quarter or an eighth of their
            size, as long as the longer side keeps this many pixels.
    """

    frames: str = "middle"
    slices: str = "middle"
    ct_window: str = "soft-tissue"
    tiles: str = "even:4"
    tile_px: int = 448
    um_per_px: float = 0.5
    scaled_px: int = 0

    def __post_init__(self) -> None:
        for name in ("frames", "slices", "tiles"):
            if not _PICK.fullmatch(getattr(self, name)):
                raise UsageError(f"--{name} {getattr(self, name)}; allowed: middle, all, every:K, even:N")
        if self.ct_window not in CT_WINDOWS_HU:
            raise UsageError(f"--ct-window {self.ct_window}; allowed: {', '.join(CT_WINDOWS_HU)}")
        if not 32 <= self.tile_px <= 4096:
            raise UsageError(f"--tile-px {self.tile_px}; allowed: 32 to 4096")
        if not 0.05 <= self.um_per_px <= 100:
            raise UsageError(f"--um-per-px {self.um_per_px}; allowed: 0.05 to 100")
        if self.scaled_px < 0:
            raise UsageError(f"--scaled-px {self.scaled_px}; 0 decodes exactly, else the smallest longer side to keep")


def picked(count: int, policy: str) -> range | tuple[int, ...]:
    """Indices of ``count`` frames, slices or tiles that a policy of ``DecodeOptions`` takes, in order."""
    if count <= 0 or policy == "all":
        return range(count)
    if policy == "middle":
        return (count // 2,)
    kind, _, number = policy.partition(":")
    if kind == "every":
        return range(0, count, int(number))
    wanted = min(int(number), count)
    return tuple((2 * place + 1) * count // (2 * wanted) for place in range(wanted))
