"""Series of DICOM slices, DICOMDIR, NIfTI and whole slides: what becomes a picture, in which order and place."""

import gzip
import io
import struct
import tracemalloc
from contextlib import nullcontext

import nibabel
import numpy as np
import openslide
import pydicom
import pytest
import tifffile
from medical_files import dicom, encoded, picture, series, slide_file
from PIL import Image
from pydicom.data import get_testdata_file

from megatron_medgpt.data.manifest import Store
from megatron_medgpt.data.picture import PictureError
from megatron_medgpt.data.text import IMAGE_MARK, Turn
from megatron_medgpt.ingest import write
from megatron_medgpt.ingest.decode import DecodeOptions, decode, decode_slide, pictures, slide_tiles
from megatron_medgpt.ingest.decode import volume as volumes
from megatron_medgpt.ingest.dicom_tree import files_by_uid
from megatron_medgpt.ingest.sample import repeat_marks
from megatron_medgpt.ingest.sources import Record
from megatron_medgpt.types import MODALITIES


def greys(pictures):
    return [np.asarray(Image.open(io.BytesIO(one.picture.encoded))) for one in pictures]


def test_slices_are_sorted_by_their_place_along_the_normal_whatever_their_names_and_numbers(tmp_path):
    series(tmp_path, [30, -10, 20, 10, 0.5])
    tree = files_by_uid(tmp_path, "SeriesInstanceUID", "all")
    assert tree.paths["1.2.7"] == tuple(f"1.2.7-{n}.dcm" for n in (1, 4, 3, 2, 0))
    turned = files_by_uid(tmp_path, "StudyInstanceUID", "even:2")
    assert turned.paths["1.2.9"] == ("1.2.7-4.dcm", "1.2.7-2.dcm")
    assert files_by_uid(tmp_path, "StudyInstanceUID", "middle").paths["1.2.9"] == ("1.2.7-3.dcm",)


def test_a_localiser_in_the_series_and_views_without_a_place_are_no_slices(tmp_path):
    series(tmp_path, [5, 4, 3])
    series(tmp_path, [0], uid="1.2.7.99", cosines=(0, 1, 0, 0, 0, -1))
    localiser = pydicom.dcmread(tmp_path / "1.2.7.99-0.dcm")
    localiser.SeriesInstanceUID, localiser.InstanceNumber = "1.2.7", 1
    localiser.save_as(tmp_path / "1.2.7.99-0.dcm")
    for number in (2, 1):
        views = dicom(np.zeros((16, 16), np.uint16), SeriesInstanceUID="1.2.8", SeriesNumber=9, InstanceNumber=number,
                      StudyInstanceUID="1.2.9", SOPInstanceUID=f"1.2.8.{number}")  # fmt: skip
        (tmp_path / f"view-{number}.dcm").write_bytes(views)
    names = files_by_uid(tmp_path, "StudyInstanceUID", "middle").paths["1.2.9"]
    assert names == ("1.2.7.99-0.dcm", "1.2.7-1.dcm", "view-1.dcm", "view-2.dcm")


def test_a_dicomdir_says_which_files_there_are(tmp_path):
    from shutil import copytree

    media = tmp_path / "media"
    copytree(get_testdata_file("dicomdirtests/DICOMDIR", read=False).rpartition("/")[0], media)
    listed = files_by_uid(media, "SOPInstanceUID")
    (media / "DICOMDIR").rename(tmp_path / "DICOMDIR")
    found = files_by_uid(media, "SOPInstanceUID")
    assert listed.paths and set(listed.paths.items()) <= set(found.paths.items())
    (tmp_path / "DICOMDIR").rename(media / "DICOMDIR")
    lost = next(iter(listed.paths.values()))[0]
    (media / lost).unlink()
    (media / lost).symlink_to("/etc/hostname")
    again = files_by_uid(media, "SOPInstanceUID")
    assert len(again.paths) == len(listed.paths) - 1
    assert "1 listed in DICOMDIR are missing" in again.remark


def nifti(voxels, affine=None, *, zip=False, kind=nibabel.Nifti1Image, **header):
    image = kind(voxels, np.eye(4) if affine is None else affine)
    for name, value in header.items():
        image.header[name] = value
    content = image.to_bytes()
    return gzip.compress(content, 1) if zip else content


def volume(shape=(20, 24, 16)):
    rng = np.random.default_rng(0)
    return rng.integers(-1000, 1000, shape).astype(np.int16)


@pytest.mark.parametrize("zip", [False, True])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("axes", [("R", "A", "S"), ("L", "P", "S"), ("P", "I", "R"), ("S", "L", "A")])
def test_a_volume_in_any_orientation_shows_the_patients_right_at_the_left_and_front_at_the_top(axes, kind, zip):
    voxels = volume()
    to_stored = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.axcodes2ornt(axes)
    )
    stored = nibabel.orientations.apply_orientation(voxels, to_stored)
    affine = nibabel.orientations.inv_ornt_aff(to_stored, voxels.shape)
    assert nibabel.aff2axcodes(affine) == axes
    content = nifti(np.ascontiguousarray(stored), affine, zip=zip, kind=kind)
    found = greys(decode(content, DecodeOptions(slices="even:3"), modality="CT"))
    closest = nibabel.as_closest_canonical(kind.from_bytes(gzip.decompress(content) if zip else content))
    for grey, k in zip_strict(found, (2, 8, 13)):
        axial = closest.get_fdata(dtype=np.float32)[::-1, ::-1, k].T  # rows front to back, columns right to left
        expected = np.clip((axial - 50) / 400 + 0.5, 0, 1) * 255
        assert grey.shape == (24, 20)
        assert abs(grey.astype(float) - expected).max() <= 0.51


def zip_strict(*lists):
    return zip(*lists, strict=True)


def test_slices_are_cut_across_the_thickest_voxels_and_scaled_by_the_header():
    voxels = volume((12, 30, 28))
    content = nifti(voxels, np.diag([5.0, 1, 1, 1]), scl_slope=2, scl_inter=-10)
    (grey,) = greys(decode(content))
    plane = voxels[6, ::-1, ::-1].T * 2.0 - 10  # sagittal: rows head to foot, columns front to back
    low, high = np.percentile(voxels, (0.5, 99.5)) * 2 - 10
    assert abs(grey.astype(float) - np.clip((plane - low) / (high - low), 0, 1) * 255).max() <= 0.51


@pytest.mark.parametrize(("thick", "zip"), [(0, False), (1, True), (2, True)])
def test_only_the_slices_that_are_looked_at_are_held_and_each_until_it_is_given(thick, zip):
    shape = [96, 80, 64]
    shape[thick] = 1500
    affine = np.diag([*(6.0 if axis == thick else 1.0 for axis in range(3)), 1.0])
    content = nifti(volume(shape), affine, zip=zip)
    plane_bytes = 2 * 96 * 80 * 64 // [96, 80, 64][thick]
    for policy, held in (("middle", 33), ("even:64", 96)):
        tracemalloc.start()
        for _ in volumes.slices_of(content, DecodeOptions(slices=policy)):
            pass
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        # Beside them: pieces of a MiB, float64 of one slice, percentiles (a copy of 32).
        assert peak < (held + 40) * plane_bytes + (5 << 20) < 1500 * plane_bytes


@pytest.mark.parametrize("thick", [0, 1, 2])
def test_slices_do_not_depend_on_the_pieces_that_are_read(thick, monkeypatch):
    affine = np.diag([*(6.0 if axis == thick else 1.0 for axis in range(3)), 1.0])
    content = nifti(volume((20, 24, 16)), affine)
    plane = np.take(volume((20, 24, 16)), 3, axis=thick)[::-1, ::-1].T.astype(float)
    expected = np.clip((plane - 50) / 400 + 0.5, 0, 1) * 255
    for piece_bytes in (1, 7 * 40, 2 * 40 * 24 + 1, 1 << 20):  # a line of 40 bytes, some, two slabs, everything
        monkeypatch.setattr(volumes, "_PIECE_BYTES", piece_bytes)
        found = greys(decode(content, DecodeOptions(slices="all"), modality="CT"))
        assert abs(found[3] - expected).max() <= 0.51


def test_a_large_slice_is_windowed_piece_by_piece():
    content = nifti(volume((3000, 2000, 1)).astype(np.float32))
    tracemalloc.start()
    (frame,) = volumes.slices_of(content, DecodeOptions())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3.5 * 3000 * 2000 * 4  # in float64, as a whole: 12
    assert frame.pixels.min() == 0 and frame.pixels.max() == 255


def test_the_pictures_of_a_file_and_of_a_record_are_not_more_than_memory_is_set_aside_for(monkeypatch, tmp_path):
    content, options = nifti(volume()), DecodeOptions(slices="all")
    one = len(decode(content)[0].picture.encoded)
    monkeypatch.setattr(pictures, "LARGEST_PICTURES_BYTES", 20 * one)
    assert len(decode(content, options)) == 16
    monkeypatch.setattr(pictures, "LARGEST_PICTURES_BYTES", 10 * one)
    with pytest.raises(PictureError, match="pictures-too-large"):
        decode(content, options)
    monkeypatch.setattr(write, "LARGEST_PICTURES_BYTES", 3 * one)
    (tmp_path / "a.nii").write_bytes(content)
    settings = write.Settings(out=tmp_path, tokenizer=tmp_path, store=Store(), key=b"", allow_burned_in=False,
                              longest_tokens=1)  # fmt: skip
    for num_images in (2, 4):
        record = Record(0, images=("a.nii",) * num_images)
        with pytest.raises(PictureError, match="too-large") if num_images == 4 else nullcontext():
            assert len(write._read_all(tmp_path, record, settings)) == num_images


@pytest.mark.parametrize("cut", ["voxels", "further volumes", "checksum"])
def test_a_volume_is_read_to_its_end_whatever_of_it_is_shown(cut):
    moving = np.stack([volume(), volume()], axis=-1)
    if cut == "checksum":
        content = bytearray(nifti(moving, zip=True))
        content[-6] ^= 1
    else:
        content = nifti(moving)[: -8000 if cut == "further volumes" else -2 * volume().nbytes + 8000]
    with pytest.raises(PictureError, match="truncated-or-corrupt"):
        decode(bytes(content))


def test_of_a_time_series_the_first_volume_and_of_colours_the_colours():
    moving = np.stack([volume(), volume() * 0], axis=-1)
    np.testing.assert_array_equal(greys(decode(nifti(moving)))[0], greys(decode(nifti(volume())))[0])
    colours = np.random.default_rng(1).integers(0, 256, (20, 24, 16, 3), dtype=np.uint8)
    stored = colours.view([("R", "u1"), ("G", "u1"), ("B", "u1")])[..., 0]
    np.testing.assert_array_equal(greys(decode(nifti(stored)))[0], colours[::-1, ::-1, 8].swapaxes(0, 1))


def test_nibabels_own_volumes_decode():
    from pathlib import Path

    folder = Path(nibabel.__file__).parent / "tests" / "data"
    for name in ("anatomical.nii", "example4d.nii.gz", "example_nifti2.nii.gz", "functional.nii"):
        assert decode((folder / name).read_bytes())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (nifti(volume())[:5000], "truncated-or-corrupt"),
        (nifti(volume(), zip=True)[:-4000], "truncated-or-corrupt"),
        (nifti(volume((4, 4, 4))), "too-small-or-narrow"),
        (nifti(volume().astype(np.complex64)), "unsupported-volume"),
        (nifti(np.full((20, 20, 20), np.nan, np.float32)), "no-finite-value"),
        (b"\x1f\x8b" + b"\0" * 400, "not-an-image"),
    ],
)
def test_a_bad_volume_is_refused_for_its_reason(content, reason):
    with pytest.raises(PictureError, match=reason):
        decode(content)


def test_a_volume_that_would_be_gigabytes_is_refused_by_its_header(monkeypatch):
    plain = bytearray(nifti(volume()))
    struct.pack_into("<4h", plain, 40, 3, 2000, 2000, 2000)
    bomb = gzip.compress(bytes(plain) + b"\0" * (1 << 20), 9)
    monkeypatch.setattr(volumes, "_slices", lambda *_: pytest.fail("the voxels were read"))
    for content in (bytes(plain), bomb):
        with pytest.raises(PictureError, match="volume-too-large"):
            decode(content)


def test_tissue_tiles_of_a_slide_come_row_by_row_at_the_requested_resolution(tmp_path):
    pixels = slide_file(tmp_path / "slide.tif")
    options = DecodeOptions(tiles="all", tile_px=256, um_per_px=0.5)
    found = decode_slide(tmp_path / "slide.tif", options)
    places = [(row, column) for row in (1, 2, 3, 4) for column in range(2, 6) if 384 <= row * 256 + 128 <= 1152]
    assert [MODALITIES[one.modality] for one in found] == ["microscopy"] * len(places)
    for tile, (row, column) in zip_strict(greys(found), places):
        expected = pixels[256 * row : 256 * row + 256, 256 * column : 256 * column + 256]
        np.testing.assert_array_equal(tile, expected)
    coarse = greys(decode_slide(tmp_path / "slide.tif", DecodeOptions(tiles="middle", tile_px=128, um_per_px=2.0)))[0]
    assert coarse.shape == (128, 128, 3)
    assert abs(coarse.mean(axis=(0, 1)) - pixels[512:1024, 512:1024].mean(axis=(0, 1))).max() < 3


def test_slides_that_cannot_give_such_tiles_are_refused_for_a_reason(tmp_path):
    slide_file(tmp_path / "a.tif")
    slide_file(tmp_path / "white.tif", tissue=False)
    (tmp_path / "flat.tif").write_bytes(encoded("TIFF", picture()))
    (tmp_path / "half.tif").write_bytes((tmp_path / "a.tif").read_bytes()[:5000])
    for name, options, reason in (
        ("a.tif", {"um_per_px": 0.25}, "slide-too-coarse"),
        ("white.tif", {}, "no-tissue"),
        ("flat.tif", {}, "unsupported-format"),
        ("half.tif", {}, "unsupported-format|truncated-or-corrupt"),
    ):
        with pytest.raises(PictureError, match=reason):
            decode_slide(tmp_path / name, DecodeOptions(**options))


def test_the_overview_of_a_slide_without_smaller_levels_is_read_strip_by_strip(tmp_path, monkeypatch):
    """openslide's own thumbnail holds all of a level several times; 12,000 px were refused as damaged."""
    pixels = np.full((1700, 2900, 3), 244, np.uint8)
    pixels[900:1500, 1200:2400] = np.random.default_rng(0).integers((120, 40, 110), (180, 80, 170), (600, 1200, 3))
    with tifffile.TiffWriter(tmp_path / "flat.tif") as writer:
        writer.write(pixels, tile=(256, 256), photometric="rgb", resolution=(20_000, 20_000),
                     resolutionunit="CENTIMETER", metadata=None)  # fmt: skip
    monkeypatch.setattr(slide_tiles, "_STRIP_PIXELS", 100_000)
    with openslide.OpenSlide(tmp_path / "flat.tif") as slide:
        overview, shrink = slide_tiles._overview(slide)
        assert shrink == 2 and overview.shape == (850, 1450, 3)
        halves = pixels.reshape(850, 2, 1450, 2, 3).mean(axis=(1, 3))
        assert abs(overview - halves).max() <= 0.51
    whole = decode_slide(tmp_path / "flat.tif", DecodeOptions(tiles="all", tile_px=300))
    np.testing.assert_array_equal(greys(whole)[0], pixels[900:1200, 1200:1500])
    assert len(whole) == 8
    monkeypatch.setattr(slide_tiles, "LARGEST_PIXELS", 2900 * 1700 - 1)
    with openslide.OpenSlide(tmp_path / "flat.tif") as slide, pytest.raises(PictureError, match="without-overview"):
        slide_tiles._overview(slide)


def test_otsu_divides_two_heaps_between_them():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(40, 5, 900), rng.normal(160, 9, 300)]).astype(np.uint8)
    assert 50 < slide_tiles._otsu(values) < 140


def test_a_mark_is_repeated_for_every_picture_that_its_file_became():
    turns = (Turn("user", f"a {IMAGE_MARK} b {IMAGE_MARK}"), Turn("user", f"{IMAGE_MARK}c"), Turn("assistant", "d"))
    record = Record(0, images=("1", "2", "3"), turns=turns)
    texts = [turn.text for turn in repeat_marks(record, [2, 1, 3]).turns]
    assert texts == [f"a {IMAGE_MARK * 2} b {IMAGE_MARK}", f"{IMAGE_MARK * 3}c", "d"]
    assert repeat_marks(record, [1, 1, 1]) is record
