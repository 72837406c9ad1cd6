"""GDCM in a process of its own: lossless JPEG (.57, .70) and 12-bit JPEG (.51), as plug-ins of pydicom.

GDCM ends its process on some damaged streams (an uncaught C++ exception, found by flipping bytes).

pydicom 3.0.2 refuses to ask GDCM for 12 bits, and its only other decoder is GPL. GDCM 3.2 does decode them: pydicom's
JPGExtended.dcm and 12-bit streams written by libjpeg-turbo 3 come out equal to libjpeg-turbo's decoding in every pixel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydicom.pixels.decoders import JPEGExtended12BitDecoder, JPEGLosslessDecoder, JPEGLosslessSV1Decoder
from pydicom.pixels.decoders.base import DecodeRunner
from pydicom.uid import JPEGExtended12Bit, JPEGLossless, JPEGLosslessSV1

from megatron_medgpt.ingest.decode.apart import Apart, Died

PLUGIN = "gdcm in a process of its own"
_SYNTAXES = (JPEGExtended12Bit, JPEGLossless, JPEGLosslessSV1)
DECODER_DEPENDENCIES = dict.fromkeys(_SYNTAXES, ("gdcm>=3.2",))
gdcm = Apart(__name__)


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
    try:
        frame = b"".join(gdcm.ask(facts, source))
    except Died as error:
        raise ValueError("GDCM died of this frame") from error
    if not frame:
        raise ValueError("GDCM cannot decode this frame")
    return frame


def register() -> None:
    """Make the plug-in known to pydicom. Calling it again changes nothing."""
    for decoder in (JPEGExtended12BitDecoder, JPEGLosslessDecoder, JPEGLosslessSV1Decoder):
        if PLUGIN not in decoder.available_plugins:
            decoder.add_plugin(PLUGIN, (__name__, decode_frame.__name__))


def answers(facts: dict[str, Any], source: bytes) -> Iterator[bytes]:
    """In the other process: the frame, or nothing."""
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
    if frame is not None:
        yield frame.encode("utf-8", "surrogateescape")
