"""Small image files of many kinds, good and bad, made on the spot."""

import io
import struct
import zlib

import numpy as np
import pydicom
import tifffile
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian


def picture(width=40, height=30, mode="RGB", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(kind="PNG", image=None, **options):
    out = io.BytesIO()
    (image or picture()).save(out, kind, **options)
    return out.getvalue()


def dicom(stored, *, modality="CT", photometric="MONOCHROME2", compress=None, **tags):
    """Bytes of a DICOM file around stored values (uint8 or uint16; rows, columns and perhaps 3 colours)."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = CTImageStorage
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4.5"
    ds.StudyInstanceUID, ds.PatientName, ds.PatientID = "1.2.3.9", "Canary^Patient", "CANARY-4711"
    ds.Modality, ds.PhotometricInterpretation = modality, photometric
    ds.Rows, ds.Columns = stored.shape[:2]
    ds.SamplesPerPixel = 3 if stored.ndim == 3 else 1
    if stored.ndim == 3:
        ds.PlanarConfiguration = 0
    bits = 8 * stored.dtype.itemsize
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = bits, bits, bits - 1, 0
    for name, value in tags.items():
        setattr(ds, name, value)
    ds.PixelData = stored.tobytes()
    ds["PixelData"].VR = "OB" if bits == 8 else "OW"
    if compress:
        ds.compress(compress, generate_instance_uid=False)
    out = io.BytesIO()
    pydicom.dcmwrite(out, ds, enforce_file_format=True)
    return out.getvalue()


def png_claiming(width, height, rows=0):
    """A PNG whose header claims a size; its data are ``rows`` rows of zeros."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = zlib.compress(b"\0" * ((width + 1) * rows), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def series(folder, positions, *, uid="1.2.7", cosines=(1, 0, 0, 0, 1, 0), **tags):
    """Slices at these places along z; names and instance numbers run against the places."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, z in enumerate(positions):
        content = dicom(
            np.full((16, 16), number, np.uint16), SeriesInstanceUID=uid, StudyInstanceUID="1.2.9",
            SOPInstanceUID=f"{uid}.{number}", InstanceNumber=100 - number, ImagePositionPatient=[3, 4, z],
            ImageOrientationPatient=list(cosines), **tags,
        )  # fmt: skip
        (folder / f"{uid}-{number}.dcm").write_bytes(content)


def slide_file(path, um=0.5, tissue=True):
    """A pyramid of 2048 x 1536 px: white, with a textured purple block of 1024 x 768 px in the middle."""
    rng = np.random.default_rng(0)
    pixels = np.full((1536, 2048, 3), 244, np.uint8)
    if tissue:
        pixels[384:1152, 512:1536] = (150, 60, 140)
        pixels[384:1152, 512:1536] += rng.integers(0, 30, (768, 1024, 1), dtype=np.uint8)
    per_cm = 10_000 / um
    with tifffile.TiffWriter(path) as writer:
        for level, step in enumerate((1, 4)):
            writer.write(
                pixels[::step, ::step], tile=(256, 256), photometric="rgb", subfiletype=int(level > 0),
                resolution=(per_cm / step, per_cm / step), resolutionunit="CENTIMETER", metadata=None,
            )  # fmt: skip
    return pixels


BAD_FILES = {
    "empty": (b"", "empty-file"),
    "html": (b"<!DOCTYPE html><html><body>404</body></html>", "not-an-image"),
    "half a jpeg": (encoded("JPEG")[:400], "truncated-or-corrupt"),
    "jpeg without its end": (encoded("JPEG")[:-2], "truncated-or-corrupt"),
    "half a png": (encoded("PNG")[:900], "truncated-or-corrupt"),
    "png with a flipped byte": (
        (lambda b: b[:500] + bytes([b[500] ^ 1]) + b[501:])(encoded("PNG")), "truncated-or-corrupt",
    ),
    "only a jpeg's first bytes": (b"\xff\xd8\xff\xe0", "truncated-or-corrupt"),
    "gif": (encoded("GIF", picture(mode="P")), "unsupported-format"),
    "tiff": (encoded("TIFF"), "unsupported-format"),
    "pixel bomb": (png_claiming(20_000, 20_000), "too-many-pixels"),
    "65000 squared": (png_claiming(65_000, 65_000), "too-many-pixels"),
    "one pixel": (encoded("PNG", picture(1, 1)), "too-small-or-narrow"),
    "a thread": (encoded("PNG", picture(2000, 9)), "too-small-or-narrow"),
    "half a dicom": (dicom(np.zeros((64, 64), np.uint16))[:4000], "truncated-or-corrupt"),
    "dicom of nothing": (dicom(np.zeros((64, 64), np.uint16))[:300], "dicom-without-image"),
    "burned in": (dicom(np.zeros((16, 16), np.uint16), BurnedInAnnotation="YES"), "burned-in-text"),
    "ultrasound that says nothing": (
        dicom(np.zeros((16, 16), np.uint16), modality="US"), "burned-in-text-not-ruled-out",
    ),
    "a million frames": (dicom(np.zeros((16, 16), np.uint16), NumberOfFrames=1_000_000), "too-many-frames"),
}  # fmt: skip
"""Name -> (bytes, reason of the refusal)."""
