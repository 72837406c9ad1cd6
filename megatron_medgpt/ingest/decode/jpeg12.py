"""12-bit JPEG (Extended, .51) through GDCM, as a plug-in of pydicom.

pydicom 3.0.2 refuses to ask its own GDCM plug-in for 12 bits, and its only other decoder is GPL. GDCM 3.2 does decode
them: pydicom's JPGExtended.dcm and 12-bit streams written by libjpeg-turbo 3 come out equal to libjpeg-turbo's
decoding in every pixel. To be removed when pydicom lets it through.
"""

from __future__ import annotations

import gdcm
from pydicom.pixels.decoders import JPEGExtended12BitDecoder
from pydicom.pixels.decoders.base import DecodeRunner
from pydicom.uid import JPEGExtended12Bit

DECODER_DEPENDENCIES = {JPEGExtended12Bit: ("gdcm>=3.2",)}
_LABEL = "gdcm, 12 bits"


def is_available(uid: str) -> bool:
    """What pydicom asks of a plug-in."""
    return uid == JPEGExtended12Bit


def decode_frame(source: bytes, runner: DecodeRunner) -> bytes:
    """Bytes of one decoded frame, 16 bits a sample."""
    if runner.bits_stored <= 8:
        raise NotImplementedError("8 bits: pydicom's own plug-ins decode them")
    fragment = gdcm.Fragment()
    fragment.SetByteStringValue(source)
    fragments = gdcm.SequenceOfFragments.New()
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((runner.columns, runner.rows, 1))
    image.SetDataElement(element)
    kind = gdcm.PhotometricInterpretation.GetPIType(str(runner.photometric_interpretation))
    image.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(kind))
    syntax = gdcm.TransferSyntax.GetTSType(str(JPEGExtended12Bit))
    image.SetTransferSyntax(gdcm.TransferSyntax(syntax))
    image.SetPixelFormat(
        gdcm.PixelFormat(
            runner.samples_per_pixel, runner.bits_allocated, runner.bits_stored, runner.bits_stored - 1,
            runner.pixel_representation,
        )
    )  # fmt: skip
    frame = image.GetBuffer()
    if frame is None:
        raise ValueError("GDCM cannot decode the frame")
    return frame.encode("utf-8", "surrogateescape")


def register() -> None:
    """Make pydicom use this for 12-bit JPEG. Calling it again changes nothing."""
    if _LABEL not in JPEGExtended12BitDecoder.available_plugins:
        JPEGExtended12BitDecoder.add_plugin(_LABEL, (__name__, decode_frame.__name__))
