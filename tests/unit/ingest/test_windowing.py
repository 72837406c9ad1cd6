"""Grey values against pydicom's own functions, against highdicom's per-frame transforms, and against PS3.3."""

import io

import highdicom
import numpy as np
import pydicom
import pytest
from medical_files import dicom
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.sequence import Sequence
from pydicom.uid import EnhancedCTImageStorage

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.data.picture import PictureError
from megatron_medgpt.ingest.decode import DecodeOptions, decode, picked
from megatron_medgpt.ingest.decode.windowing import to_8_bit

RAMP = (np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) * 2).clip(0, 2047)


def greys_of(content, **options):
    pictures = decode(content, DecodeOptions(**options), allow_burned_in=True)
    return [np.asarray(Image.open(io.BytesIO(picture.picture.encoded))) for picture in pictures]


def read(content):
    return pydicom.dcmread(io.BytesIO(content))


def lut_item(first, entries, bits):
    item = Dataset()
    item.LUTDescriptor, item.LUTData = [len(entries), first, bits], [int(value) for value in entries]
    item["LUTDescriptor"].VR = item["LUTData"].VR = "US"
    return item


def as_pydicom(ds, stored, bits=16):
    """0 ... 255 by pydicom's functions, black and white taken from what they make of values far outside."""
    values = apply_voi_lut(apply_modality_lut(stored, ds), ds)
    black, white = (apply_voi_lut(np.array([end]), ds)[0] for end in (-1e5, 1e5))
    return (values - black) / (white - black) * 255


@pytest.mark.parametrize("slope", [1.0, 0.5, -1.0])
@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("signed", [False, True])
def test_a_window_is_pydicoms_window(function, slope, signed):
    stored = RAMP.astype(np.int16) - 1024 if signed else RAMP
    tags = {"RescaleSlope": slope, "RescaleIntercept": -100, "WindowCenter": [300, 40], "WindowWidth": [700, 400],
            "VOILUTFunction": function, "PixelRepresentation": int(signed), "BitsStored": 12,
            "HighBit": 11}  # fmt: skip
    content = dicom(stored, **tags)
    expected = as_pydicom(read(content), stored)
    assert abs(greys_of(content)[0].astype(float) - expected).max() <= 0.51


def test_a_window_of_no_width_is_as_none():
    for width in (0, -5, ""):
        windowed = greys_of(dicom(RAMP, modality="MR", WindowCenter=100, WindowWidth=width))[0]
        np.testing.assert_array_equal(windowed, greys_of(dicom(RAMP, modality="MR"))[0])


def test_modality_and_voi_luts_are_pydicoms_and_precede_a_window():
    modality = lut_item(0, np.linspace(0, 4000, 2048).astype(int), 16)
    modality.ModalityLUTType = "OD"
    voi = lut_item(500, (np.linspace(0, 1, 3000) ** 2 * 4095).astype(int), 12)
    content = dicom(RAMP, modality="DX", ModalityLUTSequence=Sequence([modality]), VOILUTSequence=Sequence([voi]),
                    WindowCenter=10, WindowWidth=20)  # fmt: skip
    ds = read(content)
    expected = apply_voi_lut(apply_modality_lut(RAMP, ds), ds, prefer_lut=True) / 4095 * 255
    assert abs(greys_of(content)[0].astype(float) - expected).max() <= 0.51


def test_a_presentation_lut_and_its_inversion():
    table = lut_item(0, (np.linspace(0, 1, 256) ** 2 * 65535).astype(int), 16)
    content = dicom(RAMP, modality="DX", WindowCenter=1024, WindowWidth=2048, VOILUTFunction="LINEAR_EXACT",
                    PresentationLUTSequence=Sequence([table]))  # fmt: skip
    expected = (np.rint(RAMP / 2048 * 255) / 255) ** 2 * 255
    assert abs(greys_of(content)[0].astype(float) - expected).max() <= 1


def test_padding_is_black_and_in_no_percentile():
    stored = RAMP.astype(np.int16)
    stored[:6], stored[6:8] = -2000, -1500
    tags = {"modality": "CR", "PixelRepresentation": 1, "photometric": "MONOCHROME1"}
    grey = greys_of(dicom(stored, PixelPaddingValue=-2000, PixelPaddingRangeLimit=-1500, **tags))[0]
    low, high = np.percentile(RAMP[8:], (0.5, 99.5))
    expected = 255 - np.clip((RAMP[8:] - low) / (high - low), 0, 1) * 255
    assert (grey[:8] == 0).all()
    assert abs(grey[8:].astype(float) - expected).max() <= 0.51


def test_three_ct_windows_become_three_colours_and_a_ct_without_rescale_has_no_hounsfield_units():
    tags = {"RescaleSlope": 1, "RescaleIntercept": -1024, "WindowCenter": 40, "WindowWidth": 400}
    (colour,) = greys_of(dicom(RAMP, **tags), ct_window="three")
    for channel, (centre, width) in enumerate([(-600, 1500), (50, 400), (40, 80)]):
        expected = np.clip((RAMP - 1024.0 - centre) / width + 0.5, 0, 1) * 255
        assert abs(colour[..., channel].astype(float) - expected).max() <= 0.51
    (bone,) = greys_of(dicom(RAMP, RescaleSlope=1, RescaleIntercept=-1024), ct_window="bone")
    assert abs(bone.astype(float) - np.clip((RAMP - 1024.0 - 400) / 1800 + 0.5, 0, 1) * 255).max() <= 0.51
    low, high = np.percentile(RAMP, (0.5, 99.5))
    (bare,) = greys_of(dicom(RAMP))
    assert abs(bare.astype(float) - np.clip((RAMP - low) / (high - low), 0, 1) * 255).max() <= 0.51


def test_wide_and_floating_values_are_windowed_as_narrow_ones():
    header = read(dicom(RAMP, modality="MR", WindowCenter=1000, WindowWidth=1500))
    narrow = to_8_bit(RAMP, header)
    wide = RAMP.astype(np.int32)
    wide[0, 0] = 10**6
    shifted = to_8_bit(wide, header)
    assert shifted[0, 0] == 255
    np.testing.assert_array_equal(shifted.ravel()[1:], narrow.ravel()[1:])
    floating = RAMP.astype(np.float32)
    floating[0, 0] = np.nan
    np.testing.assert_array_equal(to_8_bit(floating, header).ravel()[1:], narrow.ravel()[1:])


def palette(values, bits):
    tags = {}
    for number, colour in enumerate(("Red", "Green", "Blue")):
        tags[f"{colour}PaletteColorLookupTableDescriptor"] = [256, 0, bits]
        tags[f"{colour}PaletteColorLookupTableData"] = values[number].astype("<u2").tobytes()
    return tags


@pytest.mark.parametrize("scale", [257, 1])
def test_a_palette_gives_its_colours_also_where_16_bit_entries_hold_8_bit_colours(scale):
    colours = np.stack([np.arange(256), 255 - np.arange(256), np.arange(256) // 2])
    stored = np.arange(1024, dtype=np.uint16).reshape(32, 32).astype(np.uint8)
    content = dicom(stored, modality="US", photometric="PALETTE COLOR", **palette(colours * scale, 16))
    np.testing.assert_array_equal(greys_of(content)[0], np.moveaxis(colours, 0, -1)[stored])


def test_ybr_comes_out_as_rgb():
    ybr = np.zeros((16, 16, 3), np.uint8)
    ybr[..., 0], ybr[..., 1], ybr[..., 2] = 150, 90, 200
    (rgb,) = greys_of(dicom(ybr, modality="US", photometric="YBR_FULL"))
    y, cb, cr = 150.0, 90.0 - 128, 200.0 - 128  # PS3.3 C.7.6.3.1.2
    expected = [y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb]
    assert abs(rgb[0, 0].astype(float) - np.clip(expected, 0, 255)).max() <= 1


def test_colours_that_are_none_are_refused():
    with pytest.raises(PictureError, match="unsupported-colour"):
        decode(dicom(RAMP, photometric="HSV"))


def multi_frame(frames, **tags):
    """A file of several frames (frames, rows, columns)."""
    ds = read(dicom(frames.reshape(-1, frames.shape[-1]), **tags))
    ds.Rows, ds.NumberOfFrames = frames.shape[1], frames.shape[0]
    return ds


def saved(ds):
    out = io.BytesIO()
    pydicom.dcmwrite(out, ds, enforce_file_format=True)
    return out.getvalue()


FRAMES = np.stack([RAMP + 10 * number for number in range(7)]).astype(np.uint16)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("middle", [3]),
        ("all", [0, 1, 2, 3, 4, 5, 6]),
        ("every:3", [0, 3, 6]),
        ("even:2", [1, 5]),
        ("even:99", range(7)),
    ],
)
def test_frame_policies(policy, expected):
    content = saved(multi_frame(FRAMES, modality="MR", WindowCenter=1000, WindowWidth=3000))
    found = greys_of(content, frames=policy)
    plain = [greys_of(dicom(f, modality="MR", WindowCenter=1000, WindowWidth=3000))[0] for f in FRAMES]
    assert len(found) == len(expected)
    for grey, index in zip(found, expected):
        np.testing.assert_array_equal(grey, plain[index])
    assert list(picked(7, policy)) == list(expected)


@pytest.mark.parametrize("policy", ["first", "every:0", "even", "even:-1", "every:2x", ""])
def test_a_policy_that_means_nothing_is_refused_with_what_is_allowed(policy):
    with pytest.raises(UsageError, match=r"--frames .*allowed: middle, all, every:K, even:N"):
        DecodeOptions(frames=policy)


def item(**tags):
    made = Dataset()
    for name, value in tags.items():
        setattr(made, name, value)
    return Sequence([made])


def enhanced(windows):
    """An enhanced CT whose frames have rescales of their own, and windows of their own or one for all."""
    ds = multi_frame(FRAMES, modality="CT", InstanceNumber=1, ImageType=["ORIGINAL", "PRIMARY", "AXIAL", "NONE"])
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    shared = Dataset()
    if windows == "shared":
        # Exact, as highdicom 0.28 subtracts LINEAR's one after it has divided the width by the slope.
        shared.FrameVOILUTSequence = item(WindowCenter=0, WindowWidth=3000, VOILUTFunction="LINEAR_EXACT")
    ds.SharedFunctionalGroupsSequence = Sequence([shared])
    groups = []
    for number in range(len(FRAMES)):
        group = Dataset()
        group.PixelValueTransformationSequence = item(
            RescaleSlope=1 + number / 10, RescaleIntercept=-1024 - number, RescaleType="HU"
        )
        if windows == "per frame":
            group.FrameVOILUTSequence = item(WindowCenter=40 * number, WindowWidth=400, VOILUTFunction="LINEAR_EXACT")
        groups.append(group)
    ds.PerFrameFunctionalGroupsSequence = Sequence(groups)
    return ds


@pytest.mark.parametrize("windows", ["shared", "per frame"])
def test_frames_of_an_enhanced_file_have_the_rescale_and_window_that_highdicom_applies(windows):
    content = saved(enhanced(windows))
    image = highdicom.Image.from_dataset(read(content), copy=False)
    found = greys_of(content, frames="all")
    for number, grey in enumerate(found):
        expected = 255 * image.get_frame(number + 1, apply_voi_transform=True, apply_modality_transform=True)
        assert abs(grey.astype(float) - expected).max() <= 0.51, number
    assert abs(found[6].astype(int) - found[0]).max() > 20
