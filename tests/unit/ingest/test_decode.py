"""Pixels a radiologist would accept, and files that are refused for a stated reason."""

import importlib.util
import io
import tracemalloc
from pathlib import Path

import numpy as np
import pydicom
import pytest
from medical_files import BAD_FILES, dicom, encoded, picture
from PIL import Image
from pydicom.uid import JPEGLSLossless, RLELossless

from megatron_medgpt.data.picture import PictureError, canonical, load_picture, pixels_of, resolve_inside
from megatron_medgpt.ingest.decode import decode
from megatron_medgpt.types import MODALITIES

RAMP = (np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) * 2).clip(0, 2047)


def grey_of(content, **options):
    return np.asarray(Image.open(io.BytesIO(decode(content, **options)[0].picture.encoded)))


def windowed(values, centre, width):
    """PS3.3 C.11.2.1.2.1, restated: the linear function with its half-value offsets, to 0 .. 255."""
    return np.clip((values - (centre - 0.5)) / (width - 1) + 0.5, 0, 1) * 255


@pytest.mark.parametrize("slope", [1, 0.5, 2])
def test_ct_is_hounsfield_units_through_its_window(slope):
    content = dicom(RAMP, RescaleSlope=slope, RescaleIntercept=-1024, WindowCenter=40, WindowWidth=400)
    expected = windowed(RAMP.astype(float) * slope - 1024, 40, 400)
    assert abs(grey_of(content).astype(float) - expected).max() <= 0.51


def test_ct_without_a_window_gets_soft_tissue():
    content = dicom(RAMP, RescaleSlope=1, RescaleIntercept=-1024)
    expected = np.clip((RAMP - 1024.0 + 150) / 400, 0, 1) * 255
    assert abs(grey_of(content).astype(float) - expected).max() <= 0.51


def test_monochrome1_is_inverted_exactly_once():
    options = {"modality": "DX", "WindowCenter": 1024, "WindowWidth": 2048}
    plain = grey_of(dicom(RAMP, **options)).astype(int)
    inverted = grey_of(dicom(RAMP, photometric="MONOCHROME1", **options)).astype(int)
    stated_twice = grey_of(dicom(RAMP, photometric="MONOCHROME1", PresentationLUTShape="INVERSE", **options))
    assert abs(inverted - (255 - plain)).max() <= 1
    np.testing.assert_array_equal(stated_twice, inverted)


def test_mr_without_a_window_ignores_padding():
    stored = RAMP.copy()
    stored[:8] = 60000
    grey = grey_of(dicom(stored, modality="MR", PixelPaddingValue=60000))
    low, high = np.percentile(RAMP[8:], (0.5, 99.5))
    expected = np.clip((RAMP[8:] - low) / (high - low), 0, 1) * 255
    assert abs(grey[8:].astype(float) - expected).max() <= 0.51


def test_colour_stays_colour():
    rgb = np.asarray(picture(32, 32))
    content = dicom(rgb, modality="US", photometric="RGB", BurnedInAnnotation="NO")
    np.testing.assert_array_equal(grey_of(content), rgb)
    assert MODALITIES[decode(content)[0].modality] == "ultrasound"


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless])
def test_lossless_transfer_syntaxes_decode_to_the_same_picture(syntax):
    options = {"RescaleSlope": 1, "RescaleIntercept": -1024, "WindowCenter": 40, "WindowWidth": 400}
    np.testing.assert_array_equal(grey_of(dicom(RAMP, compress=syntax, **options)), grey_of(dicom(RAMP, **options)))


def test_of_several_frames_the_middle_one_is_taken():
    frames = np.stack([np.full((16, 16), 40 * k, np.uint8) for k in range(5)])
    content = dicom(frames.reshape(80, 16), modality="MR", WindowCenter=128, WindowWidth=256)
    ds = pydicom.dcmread(io.BytesIO(content))
    ds.Rows, ds.NumberOfFrames = 16, 5
    out = io.BytesIO()
    ds.save_as(out)
    assert abs(grey_of(out.getvalue()).astype(int) - 80).max() <= 1


def test_burned_in_pictures_pass_where_the_user_allows_it():
    content = dicom(RAMP, BurnedInAnnotation="YES")
    assert grey_of(content, allow_burned_in=True).shape == (32, 32)


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_for_its_reason(name):
    content, reason = BAD_FILES[name]
    with pytest.raises(PictureError) as refusal:
        decode(content)
    assert refusal.value.reason == reason


@pytest.mark.parametrize("name", [name for name, (content, _) in BAD_FILES.items() if content[128:132] != b"DICM"])
def test_a_store_of_pixels_refuses_a_bad_file_for_the_same_reason(name):
    content, reason = BAD_FILES[name]
    for scaled_px in (0, 16):
        with pytest.raises(PictureError, match=reason):
            pixels_of(content, scaled_px)


def test_a_thumbnails_end_is_not_taken_for_the_end_of_a_jpeg():
    content = encoded("JPEG", picture(100, 80, "L"), comment=encoded("JPEG", picture(8, 8)))
    assert content.count(b"\xff\xd9") == 2
    assert pixels_of(content).shape == (80, 100)
    with pytest.raises(PictureError, match="truncated-or-corrupt"):
        pixels_of(content[:-2])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_a_store_of_pixels_sees_what_a_store_of_files_sees(mode):
    image = Image.fromarray(RAMP) if mode == "I;16" else picture(mode=mode)
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded("JPEG" if mode == "CMYK" else "PNG", image, exif=exif)
    with Image.open(io.BytesIO(canonical(content).encoded)) as kept:
        np.testing.assert_array_equal(pixels_of(content), np.asarray(kept))


def test_scaled_decoding_halves_a_jpeg_as_often_as_its_longer_side_allows():
    content = encoded("JPEG", picture(400, 300).resize((400, 300)), quality=95)
    assert [pixels_of(content, px).shape[:2] for px in (0, 201, 200, 100, 50, 10)] == [
        (300, 400), (300, 400), (150, 200), (75, 100), (38, 50), (38, 50)
    ]  # fmt: skip
    smooth = Image.fromarray(np.linspace(0, 255, 64 * 64).reshape(64, 64).astype(np.uint8))
    half = pixels_of(encoded("JPEG", smooth, quality=95), 32).astype(float)
    assert abs(half - np.asarray(smooth.resize((32, 32), Image.Resampling.BOX))).max() <= 4


def test_a_jpegs_pixels_pass_through_and_everything_else_in_it_does_not():
    exif = Image.Exif()
    exif[0x010E] = "CANARY-EXIF"
    content = encoded("JPEG", exif=exif, comment=b"CANARY-COMMENT", icc_profile=b"CANARY" * 50) + b"CANARY-TAIL"
    stripped = canonical(content).encoded
    assert b"CANARY" in content
    assert b"CANARY" not in stripped
    np.testing.assert_array_equal(
        np.asarray(Image.open(io.BytesIO(stripped))), np.asarray(Image.open(io.BytesIO(content)))
    )


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_jpegs_of_all_kinds_survive_stripping(progressive, mode):
    content = encoded("JPEG", picture(mode=mode), progressive=progressive, restart_marker_rows=1)
    np.testing.assert_array_equal(
        np.asarray(Image.open(io.BytesIO(canonical(content).encoded))), np.asarray(Image.open(io.BytesIO(content)))
    )


def test_a_pngs_texts_and_times_do_not_pass():
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("Patient", "CANARY")
    content = encoded("PNG", pnginfo=info) + b"CANARY-TAIL"
    stripped = canonical(content).encoded
    assert b"CANARY" not in stripped
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(stripped))), np.asarray(picture()))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_colour_mode_becomes_8_bit_grey_or_rgb(mode):
    if mode == "I;16":
        image = Image.fromarray(RAMP)
    else:
        image = picture(mode=mode)
    content = encoded("JPEG" if mode == "CMYK" else "PNG", image)
    with Image.open(io.BytesIO(canonical(content).encoded)) as result:
        assert result.mode in ("L", "RGB")
        assert result.size == image.size
        if mode == "I;16":  # 11 of its 16 bits are used: a plain conversion would make it black
            assert np.asarray(result).max() == 255


def test_a_turned_photograph_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    result = canonical(encoded("JPEG", picture(40, 30), exif=exif))
    assert (result.width_px, result.height_px) == (30, 40)


@pytest.mark.parametrize("name", ["../outside.png", "/etc/hostname", "a/../../outside.png", "link.png", "~/x", "a\0b"])
def test_a_path_that_leaves_the_root_is_refused(tmp_path, name):
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "outside.png").write_bytes(encoded())
    (root / "link.png").symlink_to(tmp_path / "outside.png")
    with pytest.raises(PictureError, match="path-outside"):
        resolve_inside(root, name)


def test_what_is_no_regular_file_is_refused_without_reading_it(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe.png")
    for name, reason in (("pipe.png", "not-a-file"), (".", "not-a-file"), ("none.png", "missing-file")):
        with pytest.raises(PictureError, match=reason):
            resolve_inside(tmp_path, name)
    (tmp_path / "loop.png").symlink_to("loop.png")
    with pytest.raises(PictureError, match=r"unreadable-path|path-outside|missing-file"):
        resolve_inside(tmp_path, "loop.png")


def test_evaluation_reads_pictures_through_the_same_checks(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded())
    assert load_picture(tmp_path, "a.png") == canonical(encoded()).encoded


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_pydicom_and_nibabel_ship_comes_out_as_the_table_says():
    tool = Path(__file__).parents[3] / "tools" / "data" / "decode_outcomes.py"
    spec = importlib.util.spec_from_file_location("decode_outcomes", tool)
    outcomes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(outcomes)
    lines = tool.with_suffix(".tsv").read_text(encoding="utf-8").splitlines()[1:]
    expected = {tuple(line.split("\t")[:2]): line.split("\t")[3] for line in lines}
    found = {
        (package, name): outcomes.outcome(path.read_bytes())
        for package, name, path in outcomes.shipped()
        if package != "pydicom-data" and path.stat().st_size < 500_000
    }
    assert len(found) > 220
    assert found == {key: expected.get(key) for key in found}


@pytest.mark.parametrize("kind", ["colours", "32 bits", "16-bit PNG"])
def test_a_large_picture_is_not_in_memory_many_times(kind):
    """What Python and numpy hold of it, in bytes of its pixels; 64 million of them took up to 1.6 GiB."""
    rng = np.random.default_rng(0)
    if kind == "colours":
        stored = rng.integers(0, 256, (2400, 2000, 3), dtype=np.uint8)
        content = dicom(stored, modality="XC", photometric="RGB", BurnedInAnnotation="NO")
    elif kind == "32 bits":
        content = dicom(stored := rng.integers(0, 4000, (2400, 2000), dtype=np.uint32), modality="MR")
    else:
        content = encoded("PNG", Image.fromarray(stored := rng.integers(0, 60_000, (2400, 2000), dtype=np.uint16)))
    decode(content)  # what is imported for it
    tracemalloc.start()
    decode(bytes(bytearray(content)))  # it is the only one who has them
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3.5 * stored.nbytes
