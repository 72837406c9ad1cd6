"""How fast pictures are ingested: against plain DALI, exactly and scaled; JPEG 2000; two workers.

    python tools/profile/ingest.py --out ingest.json

One core and one process a side, the sides take turns round by round; a ratio is the median over the rounds. CPU seconds
are given beside wall time, which on a shared machine holds the others' work too.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, JPEG2000Lossless

from megatron_medgpt.data.manifest import Store
from megatron_medgpt.data.square import square
from megatron_medgpt.data.text import train_tokenizer
from megatron_medgpt.ingest.command import run_ingest
from megatron_medgpt.ingest.decode import DecodeOptions, decode

SIZE_PX = 336
STORE = Store(kind="pixels", size_px=SIZE_PX, pad_rgb=(122, 116, 104))
ROUNDS = 5


def smooth(rng: np.random.Generator, side_px: int, channels: int) -> np.ndarray:
    """float (side, side, channels), 0 ... 255: shapes of many sizes and a little noise, as pictures have."""
    coarse = rng.integers(0, 256, (channels, side_px // 24, side_px // 24), dtype=np.uint8)
    planes = [Image.fromarray(plane).resize((side_px, side_px), Image.Resampling.BICUBIC) for plane in coarse]
    return np.stack([np.asarray(plane) for plane in planes], axis=-1) + rng.normal(0, 4, (side_px, side_px, channels))


def jpegs(count: int, side_px: int = 1024) -> list[bytes]:
    rng = np.random.default_rng(0)
    files = []
    for _ in range(count):
        out = io.BytesIO()
        Image.fromarray(np.clip(smooth(rng, side_px, 3), 0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
        files.append(out.getvalue())
    return files


def dicom_file(stored: np.ndarray, *, j2k: bool, modality: str = "MR") -> bytes:
    """Bytes of a DICOM file of 12-bit values."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = JPEG2000Lossless if j2k else ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = CTImageStorage
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    ds.Modality, ds.PhotometricInterpretation, ds.SamplesPerPixel = modality, "MONOCHROME2", 1
    ds.Rows, ds.Columns = stored.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    if j2k:
        from openjpeg.utils import encode_array

        ds.PixelData = encapsulate([encode_array(stored, bits_stored=12, photometric_interpretation=0)])
        ds["PixelData"].VR = "OB"
    else:
        ds.PixelData = stored.tobytes()
        ds["PixelData"].VR = "OW"
    out = io.BytesIO()
    pydicom.dcmwrite(out, ds, enforce_file_format=True)
    return out.getvalue()


def plain_dali(files: list[bytes]) -> Callable[[], object]:
    """DALI as its documentation decodes and resizes: one thread, all files one batch."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=len(files), num_threads=1, device_id=None, prefetch_queue_depth=1)
    def pipeline():
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        image = fn.decoders.image(encoded, device="cpu", output_type=types.RGB)
        return fn.resize(image, size=(SIZE_PX, SIZE_PX), interp_type=types.INTERP_CUBIC, antialias=True)

    built = pipeline()
    built.build()
    batch = [np.frombuffer(file, np.uint8) for file in files]
    return lambda: built.run(encoded=batch)[0].as_cpu().as_array()


def plain_pillow(files: list[bytes]) -> Callable[[], object]:
    return lambda: [np.asarray(square(Image.open(io.BytesIO(f)), SIZE_PX, STORE.pad_rgb)) for f in files]


def ours(files: list[bytes], **options) -> Callable[[], object]:
    chosen = DecodeOptions(**options)
    return lambda: [decode(file, chosen, store=STORE) for file in files]


def turns(sides: dict[str, Callable[[], object]], count: int, base: str) -> dict[str, dict[str, float]]:
    """Images a second of each side, and its ratio to ``base``, in CPU and in wall time."""
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    wall: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side()
    for _ in range(ROUNDS):
        for name, side in sides.items():
            began, used = time.perf_counter(), time.process_time()
            side()
            cpu[name].append((time.process_time() - used) / count)
            wall[name].append((time.perf_counter() - began) / count)
    return {
        name: {
            "images_per_cpu_s": round(1 / statistics.median(cpu[name]), 1),
            "images_per_s": round(1 / statistics.median(wall[name]), 1),
            "ratio_cpu": round(statistics.median(b / a for a, b in zip(cpu[name], cpu[base])), 2),
            "ratio_wall": round(statistics.median(b / a for a, b in zip(wall[name], wall[base])), 2),
        }
        for name in sides
    }


def workers(folder: Path, files: list[bytes], step: int) -> dict[str, float]:
    """Records a second of one and of two workers: the slope between two lengths, without what starting costs.

    ``work_ratio`` is twice the CPU seconds of a record with one worker over those with two: the speed-up where nothing
    else runs, as far as the two do not wait for each other.
    """
    train_tokenizer(["Describe the image.", "A picture."], folder / "tokenizer", 320)
    (folder / "images").mkdir()
    for number in range(3 * step):
        (folder / "images" / f"{number}.jpg").write_bytes(files[number % len(files)])
    wall, cpu = {}, {}
    for count in (1, 2):
        for length in (8, step, 3 * step):  # the first imports what the one worker, this process, needs
            table, out = folder / "table.jsonl", folder / f"{count}-{length}"
            rows = [json.dumps({"image": f"{n}.jpg", "caption": f"Picture {n}."}) for n in range(length)]
            table.write_text("\n".join(rows))
            began, used = time.perf_counter(), _cpu_s()
            run_ingest([table], image_root=folder / "images", out=out, tokenizer=folder / "tokenizer", store="pixels",
                       workers=count, key_file=folder / "key", records_per_shard=32, echo=lambda _: None)  # fmt: skip
            wall[count, length], cpu[count, length] = time.perf_counter() - began, _cpu_s() - used
    slope = {count: (wall[count, 3 * step] - wall[count, step]) / (2 * step) for count in (1, 2)}
    work = {count: (cpu[count, 3 * step] - cpu[count, step]) / (2 * step) for count in (1, 2)}
    return {
        "one_per_s": round(1 / slope[1], 1), "two_per_s": round(1 / slope[2], 1),
        "ratio": round(slope[1] / slope[2], 2),
        "cpu_ms_one": round(1000 * work[1], 2), "cpu_ms_two": round(1000 * work[2], 2),
        "work_ratio": round(2 * work[1] / work[2], 2),
    }  # fmt: skip


def _cpu_s() -> float:
    """CPU seconds of this process and of its ended children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", choices=("jpeg", "j2k", "workers"))
    parser.add_argument("--step", type=int, default=320, help="records of the shorter run that measures workers")
    only, step = parser.parse_args().only, parser.parse_args().step
    result: dict[str, object] = {"versions": versions()}
    files = jpegs(16)
    if only in (None, "jpeg"):
        sides = {
            "plain DALI": plain_dali(files), "plain Pillow": plain_pillow(files), "ours, exact": ours(files),
            "ours, scaled": ours(files, scaled_px=SIZE_PX),
        }  # fmt: skip
        result["JPEG 1024 x 1024 to 336"] = turns(sides, len(files), "plain DALI")
    if only in (None, "j2k"):
        rng = np.random.default_rng(1)
        values = [np.clip(smooth(rng, 2048, 1)[..., 0] * 16, 0, 4095).astype(np.uint16) for _ in range(2)]
        slides = [dicom_file(value, j2k=True) for value in values]
        sides = {"exact": ours(slides), "reduce": ours(slides, scaled_px=SIZE_PX)}
        result["DICOM JPEG 2000 2048 x 2048, 12 bits, to 336"] = turns(sides, len(slides), "exact")
    with tempfile.TemporaryDirectory() as name:
        if only in (None, "workers"):
            result["workers"] = workers(Path(name), files, step)
    text = json.dumps(result, indent=1)
    print(text)
    out = parser.parse_args().out
    if out:
        out.write_text(text)


def versions() -> dict[str, str]:
    listed = subprocess.run([sys.executable, "-m", "pip", "list", "--format=json"], capture_output=True, check=True)
    wanted = ("torch", "pillow", "pydicom", "nvidia-dali-cuda130", "pylibjpeg-openjpeg", "nibabel")
    return {p["name"]: p["version"] for p in json.loads(listed.stdout) if p["name"].lower() in wanted}


if __name__ == "__main__":
    main()
