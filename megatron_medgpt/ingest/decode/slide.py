"""Whole slides: tiles of tissue at a requested resolution, read by openslide in a process of its own.

openslide ends its process where a damaged slide asks for more memory than there is (found by changing bytes).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from megatron_medgpt.data.manifest import Store
from megatron_medgpt.data.picture import PictureError
from megatron_medgpt.ingest.decode.apart import Apart, Died
from megatron_medgpt.ingest.decode.options import DecodeOptions
from megatron_medgpt.ingest.decode.pictures import ENCODED, Decoded, written
from megatron_medgpt.ingest.decode.spacing import Frame
from megatron_medgpt.ingest.facts import Facts
from megatron_medgpt.types import MODALITIES

_ENDINGS = (".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".tif", ".tiff")
openslide = Apart("megatron_medgpt.ingest.decode.slide_tiles", most_bytes=1 << 30)


def is_slide_name(name: str) -> bool:
    """Whether a file of this name may be a whole slide."""
    return name.lower().endswith(_ENDINGS)


def decode_slide(path: Path, options: DecodeOptions, *, store: Store = ENCODED) -> tuple[Decoded, ...]:
    """The chosen tissue tiles of a slide, row by row.

    Raises:
        PictureError: ``openslide-not-installed``, ``unsupported-format``, ``slide-without-resolution``,
            ``slide-too-coarse`` (scanned with less than 0.9 of the requested resolution), ``pixels-far-from-square``,
            ``no-tissue``, ``truncated-or-corrupt``.
    """
    return written(_tiles(path, options), store, Facts(MODALITIES.index("microscopy")))


def _tiles(path: Path, options: DecodeOptions) -> Iterator[Frame]:
    tiles, reason = openslide.ask({"path": str(path.absolute()), "options": asdict(options)}), ""
    try:
        for piece in tiles:
            said = json.loads(piece)
            if "reason" in said:  # the last that is said
                reason = said["reason"]
                continue
            pixels = np.frombuffer(next(tiles), np.uint8).reshape(options.tile_px, options.tile_px, 3)
            yield Frame(pixels, squared=said["squared"])
    except Died as error:
        raise PictureError("truncated-or-corrupt") from error
    if reason:
        raise PictureError(reason)
