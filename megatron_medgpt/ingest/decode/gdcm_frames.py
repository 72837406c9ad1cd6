"""GDCM in a process of its own: lossless JPEG (.57, .70) and 12-bit JPEG (.51), as plug-ins of pydicom.

GDCM ends its process on some damaged streams (an uncaught C++ exception, found by flipping bytes); one bad file must
not end an ingest. A process that died, or that took longer than ``LONGEST_S``, costs its frame and is started anew.

pydicom 3.0.2 refuses to ask GDCM for 12 bits, and its only other decoder is GPL. GDCM 3.2 does decode them: pydicom's
JPGExtended.dcm and 12-bit streams written by libjpeg-turbo 3 come out equal to libjpeg-turbo's decoding in every pixel.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import threading
from functools import lru_cache
from typing import IO, Any

from pydicom.pixels.decoders import JPEGExtended12BitDecoder, JPEGLosslessDecoder, JPEGLosslessSV1Decoder
from pydicom.pixels.decoders.base import DecodeRunner
from pydicom.uid import JPEGExtended12Bit, JPEGLossless, JPEGLosslessSV1

PLUGIN = "gdcm in a process of its own"
LONGEST_S = 60.0
_SYNTAXES = (JPEGExtended12Bit, JPEGLossless, JPEGLosslessSV1)
DECODER_DEPENDENCIES = dict.fromkeys(_SYNTAXES, ("gdcm>=3.2",))
_LENGTH = struct.Struct("<Q")


def is_available(uid: str) -> bool:
    """What pydicom asks of a plug-in."""
    return uid in _SYNTAXES


def decode_frame(source: bytes, runner: DecodeRunner) -> bytes:
    """Bytes of one decoded frame, as pydicom's own plug-in for GDCM gives them."""
    facts = {
        "syntax": str(runner.transfer_syntax), "photometric": str(runner.photometric_interpretation),
        "rows": runner.rows, "columns": runner.columns, "samples": runner.samples_per_pixel,
        "allocated": runner.bits_allocated, "stored": runner.bits_stored, "signed": runner.pixel_representation,
        "planar": runner.planar_configuration if runner.samples_per_pixel > 1 else 0,
    }  # fmt: skip
    process = _process()
    timer = threading.Timer(LONGEST_S, process.kill)
    timer.start()
    try:
        _send(process.stdin, json.dumps(facts).encode())
        _send(process.stdin, source)
        frame = _receive(process.stdout)
    except (EOFError, OSError) as error:
        process.kill()
        process.wait()
        _process.cache_clear()
        raise ValueError("GDCM died of this frame") from error
    finally:
        timer.cancel()
    if not frame:
        raise ValueError("GDCM cannot decode this frame")
    return frame


def register() -> None:
    """Make the plug-in known to pydicom. Calling it again changes nothing."""
    for decoder in (JPEGExtended12BitDecoder, JPEGLosslessDecoder, JPEGLosslessSV1Decoder):
        if PLUGIN not in decoder.available_plugins:
            decoder.add_plugin(PLUGIN, (__name__, decode_frame.__name__))


@lru_cache(maxsize=1)
def _process() -> subprocess.Popen:
    """Started at the first frame; it ends when this process does, as its input ends then."""
    command = [sys.executable, "-c", f"from {__name__} import serve; serve()"]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
    )


def _send(pipe: IO[bytes] | None, content: bytes) -> None:
    if pipe is None:
        raise EOFError
    left = memoryview(_LENGTH.pack(len(content)) + content)
    while left:
        left = left[pipe.write(left) :]


def _receive(pipe: IO[bytes] | None) -> bytes:
    (length,) = _LENGTH.unpack(_exactly(pipe, _LENGTH.size))
    return _exactly(pipe, length)


def _exactly(pipe: IO[bytes] | None, length: int) -> bytes:
    content = bytearray()
    while pipe is not None and len(content) < length:
        piece = pipe.read(min(length - len(content), 1 << 20))
        if not piece:
            raise EOFError
        content += piece
    return bytes(content)


def serve() -> None:
    """The other process: frames from its input to its output until the input ends. An empty frame is a failure."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what GDCM prints must not get between the frames
    requests = os.fdopen(0, "rb", buffering=0)
    while True:
        try:
            facts, source = json.loads(_receive(requests)), _receive(requests)
        except EOFError:
            return
        _send(answers, _decoded(facts, source))


def _decoded(facts: dict[str, Any], source: bytes) -> bytes:
    import gdcm

    fragment = gdcm.Fragment()
    fragment.SetByteStringValue(source)
    fragments = gdcm.SequenceOfFragments.New()
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((facts["columns"], facts["rows"], 1))
    image.SetDataElement(element)
    kind = gdcm.PhotometricInterpretation.GetPIType(facts["photometric"])
    image.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(kind))
    if facts["samples"] > 1:
        image.SetPlanarConfiguration(facts["planar"])
    image.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(facts["syntax"])))
    stored = facts["stored"]
    image.SetPixelFormat(gdcm.PixelFormat(facts["samples"], facts["allocated"], stored, stored - 1, facts["signed"]))
    frame = image.GetBuffer()  # text, as SWIG makes it of char*
    return b"" if frame is None else frame.encode("utf-8", "surrogateescape")
