"""Files that would become gigabytes are refused before anything is decoded: measured in a fresh process."""

import gzip
import io
import json
import struct
import subprocess
import sys
import zlib

import nibabel
import numpy as np
import pydicom
from medical_files import dicom, png_claiming
from openjpeg.utils import encode_array
from pydicom.encaps import encapsulate
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEG2000Lossless

LARGEST_GROWTH_MIB = 64
_CHILD = """
import json, resource, sys
from pathlib import Path
from megatron_medgpt.data.picture import PictureError
from megatron_medgpt.ingest.decode import DecodeOptions, decode

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

decode(Path(sys.argv[1]).read_bytes())  # what a codec and its libraries need for a small file
found = {}
for path in map(Path, sys.argv[2:]):
    content, before = path.read_bytes(), peak()
    try:
        decode(content, DecodeOptions(frames="all"))
        found[path.name] = "decoded", peak() - before
    except PictureError as error:
        found[path.name] = error.reason, peak() - before
print(json.dumps(found))
"""


def j2k(stored, stream):
    ds = pydicom.dcmread(io.BytesIO(dicom(stored, modality="MR", BitsStored=12, HighBit=11)))
    ds.file_meta.TransferSyntaxUID = JPEG2000Lossless
    ds.PixelData = encapsulate([stream])
    out = io.BytesIO()
    pydicom.dcmwrite(out, ds, enforce_file_format=True)
    return out.getvalue()


def deflated_zeros(megabytes):
    ds = pydicom.dcmread(io.BytesIO(dicom(np.zeros((16, 16), np.uint16))))
    ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    out = io.BytesIO()
    pydicom.dcmwrite(out, ds, enforce_file_format=True)
    content = out.getvalue()
    squeeze, zeros = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS), bytes(1 << 20)
    body = b"".join(squeeze.compress(zeros) for _ in range(megabytes)) + squeeze.flush()
    return content[: 144 + int.from_bytes(content[140:144], "little")] + body


def test_bombs_are_refused_without_their_memory(tmp_path):
    stored = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)
    stream = encode_array(stored, bits_stored=12, photometric_interpretation=0)
    size_at = stream.index(b"\xff\x4f\xff\x51") + 8
    volume = bytearray(nibabel.Nifti1Image(np.zeros((16, 16, 16), np.int16), np.eye(4)).to_bytes())
    struct.pack_into("<4h", volume, 40, 3, 4000, 4000, 40)
    bombs = {
        "png-20000": (png_claiming(20_000, 20_000, rows=20), "too-many-pixels"),
        "png-65000": (png_claiming(65_000, 65_000), "too-many-pixels"),
        "dicom-65000": (dicom(stored, Rows=65_000, Columns=65_000), "too-many-pixels"),
        "dicom-frames": (dicom(stored, NumberOfFrames=1_000_000), "too-many-frames"),
        "dicom-9000-frames": (dicom(stored, NumberOfFrames=9_000), "too-many-frames"),
        "j2k-65000": (
            j2k(stored, stream[:size_at] + struct.pack(">2I", 65_000, 65_000) + stream[size_at + 8 :]),
            "truncated-or-corrupt",
        ),
        "deflated": (deflated_zeros(300), "file-too-large"),
        "nifti": (gzip.compress(bytes(volume) + bytes(64 << 20), 1), "volume-too-large"),
    }
    for name, (content, _) in bombs.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "small").write_bytes(j2k(stored, stream))
    paths = [str(tmp_path / name) for name in ("small", *bombs)]
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, *paths], capture_output=True, text=True, timeout=600, check=True
    )
    found = json.loads(done.stdout)
    assert {name: reason for name, (reason, _) in found.items()} == {
        name: reason for name, (_, reason) in bombs.items()
    }
    growth = {name: megabytes for name, (_, megabytes) in found.items() if megabytes > LARGEST_GROWTH_MIB}
    assert not growth
