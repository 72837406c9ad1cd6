"""What a compressed frame says about itself, read before a codec allocates memory for it."""

from __future__ import annotations

import struct
import zlib

from megatron_medgpt.data.picture import LARGEST_FILE_BYTES, PictureError

_J2K = b"\xff\x4f\xff\x51"
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_FRAME_HEADERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC} | {0xF7}
"""Markers of JPEG and JPEG-LS frames."""


def size_of(frame: bytes) -> tuple[int, int] | None:
    """(columns, rows) of a JPEG, JPEG-LS or JPEG 2000 stream; None for anything else (RLE has no size of its own)."""
    try:
        at = frame.find(_J2K, 0, 256)
        if at >= 0:
            right, bottom, left, top = struct.unpack_from(">4I", frame, at + 8)
            return right - left, bottom - top
        if frame[:2] != b"\xff\xd8":
            return None
        at = 2
        while True:
            while frame[at + 1] == 0xFF:
                at += 1
            marker, length = struct.unpack_from(">xBH", frame, at)
            if marker in _FRAME_HEADERS:
                rows, columns = struct.unpack_from(">HH", frame, at + 5)
                return columns, rows
            at += 2 + length
    except (struct.error, IndexError):
        return None


def halvings_of_j2k(frame: bytes) -> int:
    """How often a JPEG 2000 stream can be decoded at half the size (its decomposition levels), 0 if it does not say."""
    at = frame.find(_J2K, 0, 256) + 2
    if at < 2:
        return 0
    while at + 10 <= len(frame):
        marker, length = struct.unpack_from(">HH", frame, at)
        if marker == 0xFF52:
            return frame[at + 9]
        if marker == 0xFF90:
            break
        at += 2 + length
    return 0


def check_deflated(content: bytes) -> None:
    """Raise PictureError where the deflated transfer syntax would inflate to more than a file may have.

    pydicom inflates the whole dataset at once: 256 MB of zeros deflated are 260 kB.
    """
    if _DEFLATED not in content[132:4096] or len(content) < 144:
        return
    (group_bytes,) = struct.unpack_from("<I", content, 140)
    inflater, size, rest = zlib.decompressobj(-zlib.MAX_WBITS), 0, content[144 + group_bytes :]
    while rest and not inflater.eof:
        try:
            size += len(inflater.decompress(rest, 1 << 20))
        except zlib.error as error:
            raise PictureError("truncated-or-corrupt") from error
        if size > LARGEST_FILE_BYTES:
            raise PictureError("file-too-large")
        rest = inflater.unconsumed_tail
