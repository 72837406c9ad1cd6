"""Files of every family with bytes changed: a picture or a typed refusal, and never the end of the process.

``MEDGPT_FUZZ_CASES`` sets how many (make fuzz); they are the same on every machine.
"""

import gzip
import io
import os
import random
import resource
import signal
import struct
import warnings
from contextlib import contextmanager
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import tifffile
from caps import LONGEST_S, capped
from medical_files import dicom, encoded, picture
from pydicom.dataset import Dataset as Header
from pydicom.encaps import encapsulate, generate_frames
from pydicom.pixels import pixel_array

from megatron_medgpt.data.picture import PictureError
from megatron_medgpt.ingest.decode import DecodeOptions, apart, decode, decode_slide, gdcm_frames, slide
from megatron_medgpt.ingest.decode.reading import dcmread

SHIPPED = Path(pydicom.__file__).parent / "data" / "test_files"
CASES = int(os.environ.get("MEDGPT_FUZZ_CASES", "260"))
SLIDES = CASES if CASES > 1000 else 60
OPTIONS = DecodeOptions(frames="even:2", slices="even:2", scaled_px=16)


def seeds():
    names = ("CT_small.dcm", "MR_small_RLE.dcm", "MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm",
             "SC_rgb_jpeg_dcmtk.dcm", "SC_rgb_jpeg_gdcm.dcm", "JPGExtended.dcm", "image_dfl.dcm")  # fmt: skip
    volume = np.random.default_rng(0).integers(-1000, 1000, (20, 24, 16)).astype(np.int16)
    nifti = nibabel.Nifti1Image(volume, np.diag([1.0, 1.5, 4.0, 1.0])).to_bytes()
    palette = dicom(np.zeros((16, 16), np.uint8), modality="US", photometric="PALETTE COLOR",
                    RedPaletteColorLookupTableDescriptor=[256, 0, 16], RedPaletteColorLookupTableData=bytes(512),
                    GreenPaletteColorLookupTableDescriptor=[256, 0, 16], GreenPaletteColorLookupTableData=bytes(512),
                    BluePaletteColorLookupTableDescriptor=[256, 0, 16], BluePaletteColorLookupTableData=bytes(512),
                    )  # fmt: skip
    measures, anatomy, group, region = Header(), Header(), Header(), Header()
    region.PhysicalUnitsXDirection, region.PhysicalUnitsYDirection = 3, 3
    region.PhysicalDeltaX, region.PhysicalDeltaY = 0.1, 0.2
    measures.PixelSpacing, anatomy.FrameLaterality = [0.5, 0.25], "L"
    group.PixelMeasuresSequence, group.FrameAnatomySequence = [measures], [anatomy]
    oblong = dicom(np.eye(24, dtype=np.uint16), modality="MR", BodyPartExamined="KNEE", ViewPosition="AP",
                   PixelAspectRatio=[4, 3], SharedFunctionalGroupsSequence=[group])  # fmt: skip
    echo = dicom(np.eye(24, dtype=np.uint8), modality="US", SequenceOfUltrasoundRegions=[region])
    return [*((SHIPPED / name).read_bytes() for name in names), palette, oblong, echo, nifti, gzip.compress(nifti, 1),
            encoded("JPEG", picture()), encoded("PNG", picture())]  # fmt: skip


def damaged(content, rng):
    """A few bytes changed, half of the time in the first 4 KiB, where headers are; sometimes cut."""
    changed = bytearray(content)
    end = len(changed) if rng.random() < 0.5 else min(len(changed), 4096)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        changed[rng.randrange(end)] = rng.choice((0, 255, rng.randrange(256)))
    return bytes(changed[: rng.randrange(len(changed))] if rng.random() < 0.1 else changed)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(0 if CASES > 1000 else 1200)
def test_a_damaged_file_is_a_picture_or_a_refusal():
    rng, files, refused = random.Random(0), seeds(), 0
    for number in range(CASES):
        content = damaged(files[number % len(files)], rng)
        try:
            with capped():
                assert decode(content, OPTIONS, allow_burned_in=True)
        except PictureError:
            refused += 1
        except Exception as error:
            raise AssertionError(f"case {number}: {type(error).__name__}: {error}") from error
    assert 0.2 * CASES < refused < 0.8 * CASES


def slides(folder):
    """Two small slides, plain and deflated."""
    pixels = np.full((256, 256, 3), 244, np.uint8)
    pixels[64:192, 64:192] = 150, 60, 140
    for compression in (None, "zlib"):
        with tifffile.TiffWriter(folder / "slide.tif") as writer:
            for level, step in enumerate((1, 2)):
                writer.write(
                    pixels[::step, ::step], tile=(64, 64), photometric="rgb", subfiletype=int(level > 0), metadata=None,
                    resolution=(20_000 / step, 20_000 / step), resolutionunit="CENTIMETER", compression=compression,
                )  # fmt: skip
        yield (folder / "slide.tif").read_bytes()


@contextmanager
def capped_apart(other):
    """An AssertionError where the other process computes for longer than ``LONGEST_S``."""

    def alive_s():
        with open(f"/proc/{process.pid}/schedstat") as file:
            return int(file.read().split()[0]) / 1e9

    def dead_s():
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    process = other.process
    began, dead = alive_s(), dead_s()
    yield
    assert (alive_s() if process.poll() is None else dead_s() - dead) - began < LONGEST_S


@pytest.mark.timeout(0 if CASES > 1000 else 1200)
def test_a_damaged_slide_is_tiles_or_a_refusal(tmp_path):
    rng, files, refused, options = random.Random(0), list(slides(tmp_path)), 0, DecodeOptions(tile_px=64)
    assert decode_slide(tmp_path / "slide.tif", options)  # what the other process and its libraries need to start
    for number in range(SLIDES):
        (tmp_path / "slide.tif").write_bytes(damaged(files[number % 2], rng))
        try:
            with capped(), capped_apart(slide.openslide):
                assert decode_slide(tmp_path / "slide.tif", options)
        except PictureError:
            refused += 1
        except Exception as error:
            raise AssertionError(f"case {number}: {type(error).__name__}: {error}") from error
    assert 0.1 * SLIDES < refused < 0.9 * SLIDES


def test_a_slide_that_ends_openslides_process_costs_that_slide_alone(tmp_path):
    """GLib ends a process that cannot have the memory for a tile of half a million pixels squared."""
    whole = next(slides(tmp_path))
    expected = decode_slide(tmp_path / "slide.tif", DecodeOptions(tile_px=64))
    process = slide.openslide.process
    with tifffile.TiffFile(tmp_path / "slide.tif") as read:
        places = [read.pages[0].tags[name].valueoffset for name in ("TileWidth", "TileLength")]
    deadly = bytearray(whole)
    for place in places:
        struct.pack_into("<I", deadly, place, 0x7FFF0)
        struct.pack_into("<H", deadly, place - 6, 4)  # a number of 32 bits
    (tmp_path / "slide.tif").write_bytes(deadly)
    with pytest.raises(PictureError, match="truncated-or-corrupt"):
        decode_slide(tmp_path / "slide.tif", DecodeOptions(tile_px=64))
    assert process.wait(300) == -signal.SIGABRT
    (tmp_path / "slide.tif").write_bytes(whole)
    again = decode_slide(tmp_path / "slide.tif", DecodeOptions(tile_px=64))
    assert [tile.picture.encoded for tile in again] == [tile.picture.encoded for tile in expected]


def test_a_frame_that_ends_gdcms_process_costs_that_frame_alone():
    whole = (SHIPPED / "JPGExtended.dcm").read_bytes()
    deadly = whole[:3091] + b"\xff" + whole[3092:]
    (expected,) = decode(whole, allow_burned_in=True)
    process = gdcm_frames.gdcm.process
    with pytest.raises(PictureError, match="truncated-or-corrupt"):
        decode(deadly, allow_burned_in=True)
    assert process.returncode not in (0, None)  # GDCM 3.2.6 aborts; where it no longer does, it may come home
    (again,) = decode(whole, allow_burned_in=True)
    assert again.picture.encoded == expected.picture.encoded


def test_a_frame_that_keeps_gdcm_busy_is_given_up(monkeypatch):
    monkeypatch.setattr(apart, "LONGEST_S", 0.2)
    os.kill(gdcm_frames.gdcm.process.pid, signal.SIGSTOP)  # as busy as can be
    ds = pydicom.dcmread(SHIPPED / "SC_rgb_jpeg_gdcm.dcm")
    with pytest.raises(RuntimeError, match="GDCM died"):
        pixel_array(ds, decoding_plugin=gdcm_frames.PLUGIN)
    monkeypatch.undo()
    assert pixel_array(ds, decoding_plugin=gdcm_frames.PLUGIN).shape == (100, 100, 3)


def test_a_file_that_keeps_a_library_computing_is_given_up(tmp_path, monkeypatch):
    (tmp_path / "busy.py").write_text(
        "from megatron_medgpt.ingest.decode import apart\napart.LONGEST_CPU_S = 1\n"
        "def answers(facts, content):\n    for piece in range(facts['pieces']):\n        yield b'done'\n"
        "    while facts['pieces'] < 3:\n        pass\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    busy = apart.Apart("busy")
    process = busy.process
    answer = busy.ask({"pieces": 2})
    assert [next(answer), next(answer)] == [b"done", b"done"]
    with pytest.raises(apart.Died):
        next(answer)
    assert process.returncode == -signal.SIGXCPU
    assert list(busy.ask({"pieces": 3})) == [b"done"] * 3  # a process of its own, anew
    busy.process.kill()
    busy.process.wait()


def test_a_transfer_syntax_that_became_two_is_refused():
    content = (SHIPPED / "CT_small.dcm").read_bytes()
    place = content.index(b"1.2.840.10008.1.2.1\0") + 5
    with pytest.raises(PictureError, match="unsupported-transfer-syntax"):
        decode(content[:place] + b"\\" + content[place + 1 :])


def test_a_panic_of_a_codec_in_rust_is_a_refusal():
    ds = pydicom.dcmread(SHIPPED / "MR_small_RLE.dcm")
    frame = bytearray(next(generate_frames(ds.PixelData, number_of_frames=1)))
    frame[64] = 129  # the first count of the first segment: its bytes become more than the frame has
    ds.PixelData = encapsulate([bytes(frame)])
    out = io.BytesIO()
    ds.save_as(out)
    with pytest.raises(PictureError, match="truncated-or-corrupt"):
        decode(out.getvalue())


def test_nothing_of_a_damaged_header_is_printed(caplog):
    """pydicom's warnings quote the values they complain of."""
    content = (SHIPPED / "CT_small.dcm").read_bytes()
    place = content.index(b"1.3.6.1.4.1.5962.1.2.1")
    content = content[:place] + b"name: Jane Doe" + content[place + 14 :]
    with warnings.catch_warnings(record=True) as warned, caplog.at_level("DEBUG"):
        warnings.simplefilter("always")
        ds = dcmread(io.BytesIO(content))
        assert any("Jane" in str(element.value) for element in ds if element.VR == "UI")
        decode(content)
    assert not [message for message in (*map(str, warned), *caplog.messages) if "Jane" in message]
