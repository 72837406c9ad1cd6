"""What a file is, by its first bytes: found out before pydicom or nibabel is imported for it."""

from __future__ import annotations

import zlib


def is_dicom(content: bytes) -> bool:
    """Whether bytes are a DICOM file with its preamble (without one, pydicom would have to guess)."""
    return content[128:132] == b"DICM"


def is_nifti(content: bytes) -> bool:
    """Whether bytes are NIfTI-1 or NIfTI-2 in one file, gzipped or not."""
    start = content[:348]
    if content[:2] == b"\x1f\x8b":
        try:
            start = zlib.decompressobj(31).decompress(content[:65536], 348)
        except zlib.error:
            return False
    return start[344:347] == b"n+1" or start[4:7] == b"n+2"
