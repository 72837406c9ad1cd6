"""Every transfer syntax in which pictures come, from files that pydicom ships and from streams made by encoders."""

import base64
import io
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from medical_files import dicom
from openjpeg.utils import encode_array
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import (
    HTJ2K,
    MPEG4HP41,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from megatron_medgpt.data.picture import PictureError
from megatron_medgpt.ingest.decode import DecodeOptions, decode
from megatron_medgpt.ingest.decode import dicom as dicom_files

SHIPPED = Path(pydicom.__file__).parent / "data" / "test_files"
RAMP = (np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) * 2).clip(0, 2047)
WINDOW = {"RescaleSlope": 1, "RescaleIntercept": -1024, "WindowCenter": 0, "WindowWidth": 2048}
# RAMP, lossless, by OpenJPH through imagecodecs 2026.3.6; no encoder of ours writes HTJ2K.
HTJ2K_RAMP = base64.b64decode(
    "/0//UQApQAAAAAAgAAAAIAAAAAAAAAAAAAAAIAAAACAAAAAAAAAAAAABDwEB/1AACAACAAAACv9SAAwAAgABAAUEBEAB/1wAEyCIkJCQkJCQkJ"
    "CQkJCQiIiI/2QAFwABT3BlbkpQSCBWZXIgMC4yNi4zLv+QAAoAAAAAAK8AAf+TwAAmR/sFB3QAwAASwAATAMgAh3QAIvkDB3QAwAATQAATgEL8"
    "AAJ0AJCE5ACjVADAABPAABVgAACgp8J1AEYaMWLkwEIB7LYAwAAVcAAFpgAAAOfAp6enQngAHj08PDw8PDz+/Yxge/Yxgey6AMAAK6AAFvgAAP"
    "n/FPT09PT09PJ8AH7f933f933f933f9/94YEIHv2EIHv2EIHv2EIHsswH/2Q=="
)


def grey_of(content, **options):
    (picture,) = decode(content, DecodeOptions(**options))
    return np.asarray(Image.open(io.BytesIO(picture.picture.encoded)))


def with_stream(stored, stream, syntax, **tags):
    """A DICOM file whose pixel data are a compressed stream."""
    ds = pydicom.dcmread(io.BytesIO(dicom(stored, **WINDOW, **tags)))
    ds.file_meta.TransferSyntaxUID = syntax
    ds.PixelData = encapsulate([stream])
    ds["PixelData"].VR = "OB"
    out = io.BytesIO()
    pydicom.dcmwrite(out, ds, enforce_file_format=True)
    return out.getvalue()


def recoded(content, syntax):
    """The same file in another uncompressed transfer syntax."""
    ds = pydicom.dcmread(io.BytesIO(content))
    swap = syntax == ExplicitVRBigEndian
    if swap:
        ds.PixelData = np.frombuffer(ds.PixelData, "<u2").astype(">u2").tobytes()
    ds.file_meta.TransferSyntaxUID = syntax
    out = io.BytesIO()
    pydicom.dcmwrite(out, ds, implicit_vr=syntax == ImplicitVRLittleEndian, little_endian=not swap)
    return out.getvalue()


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian])
def test_uncompressed_syntaxes_give_the_same_picture(syntax):
    plain = dicom(RAMP, **WINDOW)
    content = recoded(plain, syntax)
    assert pydicom.dcmread(io.BytesIO(content)).file_meta.TransferSyntaxUID == syntax
    np.testing.assert_array_equal(grey_of(content), grey_of(plain))


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless])
def test_lossless_syntaxes_give_the_same_picture(syntax):
    tags = {"BitsStored": 12, "HighBit": 11}
    np.testing.assert_array_equal(
        grey_of(dicom(RAMP, compress=syntax, **WINDOW, **tags)), grey_of(dicom(RAMP, **WINDOW))
    )


def test_near_lossless_jpeg_ls_stays_within_its_error():
    import jpeg_ls

    stream = bytes(jpeg_ls.encode_array(RAMP, lossy_error=3))
    content = with_stream(RAMP, stream, JPEGLSNearLossless)
    difference = grey_of(content).astype(float) - grey_of(dicom(RAMP, **WINDOW))
    assert 0 < abs(difference).max() <= 3 * 255 / 2047 + 1


@pytest.mark.parametrize("syntax", [JPEGLossless, JPEGLosslessSV1])
def test_lossless_jpeg_gives_the_same_picture(syntax, tmp_path):
    import gdcm

    source, target = tmp_path / "plain.dcm", tmp_path / "lossless.dcm"
    source.write_bytes(dicom(RAMP, **WINDOW))
    reader = gdcm.ImageReader()
    reader.SetFileName(str(source))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(str(syntax))))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    writer.SetFileName(str(target))
    assert writer.Write()
    assert pydicom.dcmread(target).file_meta.TransferSyntaxUID == syntax
    np.testing.assert_array_equal(grey_of(target.read_bytes()), grey_of(source.read_bytes()))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_jpeg_2000_of_any_depth_and_sign_gives_the_same_picture(bits, signed):
    low = -(1 << (bits - 1)) if signed else 0
    stored = np.linspace(low, low + (1 << bits) - 1, 40 * 36).reshape(40, 36)
    stored = stored.astype(np.dtype(f"<{'i' if signed else 'u'}{1 if bits == 8 else 2}"))
    tags = {"PixelRepresentation": int(signed), "BitsStored": bits, "HighBit": bits - 1, "modality": "MR"}
    stream = encode_array(stored, bits_stored=bits, photometric_interpretation=0)
    np.testing.assert_array_equal(
        grey_of(with_stream(stored, stream, JPEG2000Lossless, **tags)), grey_of(dicom(stored, **WINDOW, **tags))
    )


@pytest.mark.parametrize("syntax", [HTJ2K, HTJ2KLossless, HTJ2KLosslessRPCL])
def test_high_throughput_jpeg_2000_gives_the_same_picture(syntax):
    content = with_stream(RAMP, HTJ2K_RAMP, syntax)
    np.testing.assert_array_equal(grey_of(content), grey_of(dicom(RAMP, **WINDOW)))


def test_12_bit_jpeg_has_the_values_that_other_decoders_give():
    ds = pydicom.dcmread(SHIPPED / "JPGExtended.dcm")
    stored = dicom_files._stored(ds, 0, 1, 0)
    # pydicom's own reference for this file, and libjpeg-turbo 3's decoding of it.
    assert (stored.max(), stored[420, 140], stored[230, 120]) == (264, 244, 95)


@pytest.mark.parametrize("name", ["JPGExtended.dcm", "SC_rgb_jpeg_dcmtk.dcm", "SC_rgb_jpeg_gdcm.dcm", "JPEG2000.dcm",
                                  "MR_small_RLE.dcm", "image_dfl.dcm", "SC_rgb_jls_lossy_sample.dcm"])  # fmt: skip
def test_shipped_files_of_each_family_decode(name):
    assert decode((SHIPPED / name).read_bytes(), allow_burned_in=True)


def test_a_syntax_that_nothing_decodes_is_named_as_such():
    with pytest.raises(PictureError, match="unsupported-transfer-syntax"):
        decode(with_stream(RAMP, b"\0" * 100, MPEG4HP41))


def test_a_stream_that_claims_another_size_than_its_header_is_never_decoded(monkeypatch):
    stream = encode_array(RAMP, bits_stored=12, photometric_interpretation=0)
    at = stream.index(b"\xff\x4f\xff\x51") + 8
    huge = (65_000).to_bytes(4, "big")
    bomb = stream[:at] + huge + huge + stream[at + 8 :]
    monkeypatch.setattr(dicom_files, "pixel_array", lambda *_, **__: pytest.fail("a codec was called"))
    with pytest.raises(PictureError, match="truncated-or-corrupt"):
        decode(with_stream(RAMP, bomb, JPEG2000Lossless, BitsStored=12, HighBit=11))


def test_a_deflated_bomb_is_refused_before_it_is_inflated(monkeypatch):
    content = recoded(dicom(RAMP, **WINDOW), DeflatedExplicitVRLittleEndian)
    group_bytes = int.from_bytes(content[140:144], "little")
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    zeros = b"\0" * (1 << 20)
    body = b"".join(squeeze.compress(zeros) for _ in range(260)) + squeeze.flush()
    bomb = content[: 144 + group_bytes] + body
    assert len(bomb) < 300_000
    monkeypatch.setattr(dicom_files, "dcmread", lambda *_: pytest.fail("pydicom would inflate all of it"))
    with pytest.raises(PictureError, match="file-too-large"):
        decode(bomb)


@pytest.mark.parametrize("signed", [False, True])
def test_scaled_decoding_of_jpeg_2000_shows_the_same_picture_smaller(signed):
    y, x = np.mgrid[:256, :192]
    wave = 1000 * np.sin(x / 40) * np.cos(y / 50) + (0 if signed else 1024)
    stored = wave.astype("<i2" if signed else "<u2")
    tags = {"PixelRepresentation": int(signed), "BitsStored": 12, "HighBit": 11, "modality": "MR"}
    content = with_stream(stored, encode_array(stored, bits_stored=12, photometric_interpretation=0), JPEG2000Lossless,
                          **tags)  # fmt: skip
    whole = grey_of(content)
    assert grey_of(content, scaled_px=129).shape == whole.shape == (256, 192)
    small = grey_of(content, scaled_px=64)
    assert small.shape == (64, 48)
    assert abs(small.astype(float) - whole[::4, ::4]).mean() < 2
