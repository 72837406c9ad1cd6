"""A circle in the body is a circle in the picture, whatever the pixels' height and width in millimetres are."""

import io
import json

import nibabel
import numpy as np
import pytest
import tifffile
from medical_files import dicom
from PIL import Image
from pydicom.dataset import Dataset as Header

from megatron_medgpt.data.manifest import Store
from megatron_medgpt.data.picture import PictureError
from megatron_medgpt.data.shards import Dataset
from megatron_medgpt.data.stored import unpack_pixels
from megatron_medgpt.ingest.command import run_ingest
from megatron_medgpt.ingest.decode import DecodeOptions, decode, decode_slide

RADIUS_MM = 20


def disc(down_mm, across_mm, side_mm=64):
    """A disc of 20 mm in pixels of this size, uint16."""
    rows, columns = round(side_mm / down_mm), round(side_mm / across_mm)
    y, x = (np.arange(rows) + 0.5) * down_mm - side_mm / 2, (np.arange(columns) + 0.5) * across_mm - side_mm / 2
    return (1000 * (y[:, None] ** 2 + x[None] ** 2 < RADIUS_MM**2)).astype(np.uint16)


def shown(content, **options):
    (picture,) = decode(content, **options)
    return np.asarray(Image.open(io.BytesIO(picture.picture.encoded)).convert("L")), picture


def height_and_width(grey):
    inside = grey > 127
    return inside.any(axis=1).sum(), inside.any(axis=0).sum()


SAID = {
    "row spacing larger": (2.0, 1.0, {"PixelSpacing": [2.0, 1.0]}),
    "column spacing larger": (0.5, 1.25, {"PixelSpacing": [0.5, 1.25]}),
    "at the detector": (2.0, 1.0, {"ImagerPixelSpacing": [0.2, 0.1]}),
    "as a ratio": (2.0, 1.0, {"PixelAspectRatio": [4, 2]}),
    "a spacing goes before a ratio": (2.0, 1.0, {"PixelSpacing": [2.0, 1.0], "PixelAspectRatio": [1, 7]}),
}


@pytest.mark.parametrize("name", SAID)
def test_a_disc_of_a_dicom_file_is_round(name):
    down_mm, across_mm, tags = SAID[name]
    stored = disc(down_mm, across_mm)
    stretched, _ = shown(dicom(stored, modality="MR"))
    assert stretched.shape == stored.shape  # nothing is said: nothing is done
    height, width = height_and_width(stretched)
    assert abs(height - width) > 15
    grey, picture = shown(dicom(stored, modality="MR", **tags))
    assert picture.squared
    assert grey.shape == (max(stored.shape), max(stored.shape))
    height, width = height_and_width(grey)
    assert abs(height - width) <= 2 * max(down_mm / across_mm, across_mm / down_mm)


def test_a_disc_of_an_enhanced_file_is_round():
    measures, group = Header(), Header()
    measures.PixelSpacing = [2.0, 1.0]
    group.PixelMeasuresSequence = [measures]
    grey, _ = shown(dicom(disc(2.0, 1.0), modality="MR", SharedFunctionalGroupsSequence=[group]))
    assert grey.shape == (64, 64)


def region(down_cm, across_cm, units=(3, 3)):
    found = Header()
    found.PhysicalUnitsXDirection, found.PhysicalUnitsYDirection = units
    found.PhysicalDeltaX, found.PhysicalDeltaY = across_cm, down_cm
    return found


def ultrasound(regions, **tags):
    return dicom(disc(2.0, 1.0), modality="US", BurnedInAnnotation="NO", SequenceOfUltrasoundRegions=regions, **tags)


SPECTRUM = region(5.0, 0.01, units=(4, 7))
"""Doppler: seconds across, centimetres a second down."""


@pytest.mark.parametrize("regions", [[region(0.2, 0.1)], [SPECTRUM, region(-0.2, 0.1)], [region(0.2, 0.1)] * 2])
@pytest.mark.parametrize("tags", [{}, {"PixelAspectRatio": [1, 1]}])
def test_a_disc_of_an_ultrasound_picture_is_round_by_the_spacing_of_its_regions(regions, tags):
    grey, picture = shown(ultrasound(regions, **tags), allow_burned_in=False)
    assert picture.squared and grey.shape == (64, 64)
    height, width = height_and_width(grey)
    assert abs(height - width) <= 4


@pytest.mark.parametrize(
    "regions", [[], [SPECTRUM], [region(0.2, 0.1, units=(0, 0))], [region(0.0, 0.1)], [region(0.1, 0.1)]]
)
def test_regions_that_say_nothing_of_the_body_or_that_it_is_square_change_no_pixel(regions):
    grey, picture = shown(ultrasound(regions))
    assert not picture.squared and grey.shape == (32, 64)


def test_views_of_different_proportions_in_one_picture_are_refused():
    with pytest.raises(PictureError, match="regions-of-different-proportions"):
        decode(ultrasound([region(0.2, 0.1), region(0.1, 0.1)]))


def test_a_disc_of_a_slide_with_oblong_pixels_is_round(tmp_path):
    """1 um down, 0.5 um across: tiles of 256 um lie at every 256th row and 512th column."""
    y, x = np.arange(600)[:, None] + 0.5, (np.arange(1200) + 0.5) / 2
    inside = (y % 256 - 128) ** 2 + (x % 256 - 128) ** 2 < 120**2
    pixels = np.where(inside[..., None], np.uint8([150, 60, 140]), np.uint8(244))
    tifffile.imwrite(tmp_path / "slide.tif", pixels, tile=(256, 256), photometric="rgb", metadata=None,
                     resolution=(20_000, 10_000), resolutionunit="CENTIMETER")  # fmt: skip
    tiles = decode_slide(tmp_path / "slide.tif", DecodeOptions(tiles="all", tile_px=256, um_per_px=1.0))
    assert len(tiles) == 4
    for tile in tiles:
        grey = np.asarray(Image.open(io.BytesIO(tile.picture.encoded)).convert("L"))
        assert tile.squared and grey.shape == (256, 256)
        assert height_and_width(255 - grey) == (240, 240)
    with pytest.raises(PictureError, match="slide-too-coarse"):  # by its coarser axis
        decode_slide(tmp_path / "slide.tif", DecodeOptions(um_per_px=0.75))


@pytest.mark.parametrize(("zooms", "shape"), [((2, 1, 6), (64, 64)), ((1, 2, 6), (64, 64)), ((2, 6, 1), (64, 64))])
def test_a_disc_of_a_nifti_volume_is_round_in_every_plane(zooms, shape):
    thick = int(np.argmax(zooms))
    across, down = (size for axis, size in enumerate(zooms) if axis != thick)
    plane = disc(down, across).T  # the first axis runs across
    voxels = np.stack([plane] * 5, axis=thick)
    grey, picture = shown(nibabel.Nifti1Image(voxels, np.diag([*map(float, zooms), 1])).to_bytes())
    assert picture.squared and grey.shape == shape
    height, width = height_and_width(grey)
    assert abs(height - width) <= 4


@pytest.mark.parametrize(
    "tags",
    [{"PixelSpacing": [0.5, 0.502]}, {"PixelSpacing": [0, 1]}, {"PixelSpacing": [-1, 1]}, {"PixelAspectRatio": [3, 3]}],
)
def test_pixels_that_are_square_or_of_no_size_stay_as_they_are_to_the_byte(tags):
    stored = disc(1.0, 1.0)
    plain, _ = shown(dicom(stored, modality="MR"))
    grey, picture = shown(dicom(stored, modality="MR", **tags))
    assert not picture.squared
    np.testing.assert_array_equal(grey, plain)


def test_a_spacing_that_is_no_number_is_none():
    content = dicom(disc(1.0, 1.0), modality="MR", PixelSpacing=[0.25, 0.25])
    grey, picture = shown(content.replace(b"0.25\\0.25", b"abcd\\efgh"))
    assert grey.shape == (64, 64) and not picture.squared


def test_pixels_forty_times_as_high_as_wide_are_refused():
    with pytest.raises(PictureError, match="pixels-far-from-square"):
        decode(dicom(disc(1.0, 1.0), modality="MR", PixelSpacing=[41, 1]))


def test_a_store_of_pixels_gets_the_round_disc_too():
    store = Store(kind="pixels", size_px=32, pad_rgb=(0, 0, 0))
    (picture,) = decode(dicom(disc(2.0, 1.0), modality="MR", PixelSpacing=[2, 1]), store=store)
    pixels = unpack_pixels(np.frombuffer(picture.picture.encoded, np.uint8))[..., 0]
    assert height_and_width(pixels) == (20, 20)


def test_what_was_resampled_is_recorded(tmp_path, tokenizer_folder, key_file):
    for number, spacing in enumerate(([2, 1], [1, 1])):
        (tmp_path / f"{number}.dcm").write_bytes(dicom(disc(*map(float, spacing)), modality="MR", PixelSpacing=spacing))
    rows = [{"image": f"{n}.dcm", "caption": f"Text {n}."} for n in range(2)]
    (tmp_path / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made = run_ingest([tmp_path / "table.jsonl"], out=tmp_path / "out", tokenizer=tokenizer_folder, key_file=key_file,
                      workers=1, echo=lambda line: None)  # fmt: skip
    assert made.notes == {"pictures made square in millimetres": 1}
    assert Dataset(tmp_path / "out").manifest.provenance["square_pixels"] == "bicubic"
