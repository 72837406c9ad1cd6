"""How much memory an ingest takes: of many samples against few, and of one large file.

    python tools/profile/ingest_memory.py --work build/ingest-memory --out ingest-memory.json

Every ingest is a process of its own with two workers. Of it and of the larger of its workers the peak of resident
memory is given, which holds what torch, pydicom and the other libraries take by being imported. Pictures are a few
files under many names (hard links): each name is read, checked and written for itself.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

os.environ.setdefault("OMP_NUM_THREADS", "1")

DISTINCT = 8
WORKERS = 2
MANY = {"jpeg": (1_000, 20_000), "dicom": (500, 6_000), "text": (10_000, 1_000_000)}
FILES = (
    "JPEG 1024 x 1024", "DICOM 5000 x 4000, 12 bits", "DICOM 2048 x 2048, JPEG 2000", "DICOM 8000 x 8000, 12 bits",
    "DICOM 8000 x 8000, colours", "PNG 8000 x 8000 with alpha", "NIfTI 512 x 512 x 600, gzipped",
    "NIfTI 512 x 512 x 790, noise, gzipped, all slices", "NIfTI 8000 x 8000 x 3, noise, gzipped, all slices",
)  # fmt: skip


def make_input(kind: str, folder: Path) -> None:
    """Pictures under as many names as the larger ingest has records, and the tables of both."""
    import numpy as np
    from ingest import dicom_file, jpegs, smooth

    from megatron_medgpt.data.text import train_tokenizer

    rng = np.random.default_rng(0)
    train_tokenizer(["Describe the image.", "The lesion, in words."], folder / "tokenizer", 320)
    if kind == "jpeg":
        files = jpegs(DISTINCT, side_px=512)
    elif kind == "dicom":
        slices = [np.clip(smooth(rng, 512, 1)[..., 0] * 16, 0, 4095).astype(np.uint16) for _ in range(DISTINCT)]
        files = [dicom_file(stored, j2k=False) for stored in slices]
    else:
        files = []
    for number, content in enumerate(files):
        (folder / f"file-{number}").write_bytes(content)
    for count in MANY[kind]:
        with open(folder / f"{count}.jsonl", "w", encoding="utf-8") as table:
            for number in range(count):
                words = f"Picture {number}: " + "a lesion in the left lobe, " * (1 + number % 8)
                if files and not (folder / f"{number}").exists():
                    os.link(folder / f"file-{number % DISTINCT}", folder / f"{number}")
                row = {"image": f"{number}", "caption": words} if files else {"messages": dialogue(words)}
                table.write(json.dumps(row) + "\n")


def dialogue(words: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": "What is seen?"}, {"role": "assistant", "content": words}]


def ingest(folder: Path, count: int) -> dict[str, float]:
    """Peaks in MiB of this process and of the larger of its workers."""
    from megatron_medgpt.ingest.command import run_ingest

    began = time.perf_counter()
    made = run_ingest([folder / f"{count}.jsonl"], out=folder / "out", tokenizer=folder / "tokenizer", workers=WORKERS,
                      key_file=folder / "key", echo=lambda _: None)  # fmt: skip
    assert made.num_samples == count
    peaks = [resource.getrusage(who).ru_maxrss // 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {"records": count, "main_mib": peaks[0], "worker_mib": peaks[1], "s": round(time.perf_counter() - began, 1)}


def make_file(which: str, path: Path) -> None:
    import numpy as np
    from ingest import dicom_file, jpegs, smooth
    from PIL import Image

    if which.startswith("JPEG"):
        path.write_bytes(jpegs(1)[0])
    elif which.startswith("NIfTI"):
        import nibabel

        shape = tuple(int(number) for number in re.findall("[0-9]+", which))[:3]
        voxels = np.full(shape, 7, np.int16)
        if "noise" in which:  # 10 bits: the zipped file is nearly as large as is allowed
            voxels[:] = np.random.default_rng(0).integers(-300, 300, shape, dtype=np.int16)
        path.write_bytes(gzip.compress(nibabel.Nifti1Image(voxels, np.diag([1.0, 1.0, 3.0, 1.0])).to_bytes(), 1))
    elif which.startswith("PNG"):
        noise = np.random.default_rng(0).integers(0, 256, (8000, 8000, 4), dtype=np.uint8) & 0xF0
        Image.fromarray(noise).save(path, "PNG", compress_level=1)
    elif "colours" in which:
        pixels = np.random.default_rng(0).integers(0, 256, (8000, 8000, 3), dtype=np.uint8)
        path.write_bytes(in_colour(dicom_file(np.zeros((8, 8), np.uint16), j2k=False), pixels))
    else:
        grey = np.clip(smooth(np.random.default_rng(0), 2048, 1)[..., 0] * 16, 0, 4095).astype(np.uint16)
        rows, columns = (int(number) for number in re.findall("[0-9]+", which)[:2])
        stored = np.tile(grey, (-(-rows // 2048), -(-columns // 2048)))[:rows, :columns].copy()
        path.write_bytes(dicom_file(stored, j2k="2000" in which.split(",")[-1]))


def in_colour(content: bytes, pixels: np.ndarray) -> bytes:
    """A DICOM file with these pixels in place of its own, which says that no text is burned in."""
    import pydicom

    ds = pydicom.dcmread(io.BytesIO(content))
    ds.Modality, ds.PhotometricInterpretation, ds.BurnedInAnnotation = "XC", "RGB", "NO"
    ds.Rows, ds.Columns, ds.SamplesPerPixel = pixels.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PlanarConfiguration = 8, 8, 7, 0
    ds.PixelData = pixels.tobytes()
    out = io.BytesIO()
    ds.save_as(out)
    return out.getvalue()


def decode_alone(which: str, path: Path) -> list[int]:
    """Peak MiB of a process of its own that decodes one file, to PNG and to a square of 336 px."""
    return [json.loads(alone("--work", path, "--step", store, which)) for store in ("png", "square")]


def peak_of(which: str, path: Path, store: str) -> int:
    from megatron_medgpt.data.manifest import Store
    from megatron_medgpt.ingest.decode import DecodeOptions, decode

    options = DecodeOptions(slices="all" if "all slices" in which else "middle")
    square = Store(kind="pixels", size_px=336, pad_rgb=(122, 116, 104))
    assert decode(path.read_bytes(), options, store=square if store == "square" else Store())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def alone(*arguments: str | Path) -> str:
    """What this program prints with these arguments, as a process of its own."""
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/ingest-memory"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", choices=(*MANY, "files"))
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)  # what a process of its own does
    chosen = parser.parse_args()
    if chosen.step:
        what, which = chosen.step
        step = {"input": make_input, "file": make_file}.get(what)
        if step:
            step(which, chosen.work)
        else:
            of_file = what in ("png", "square")
            print(json.dumps(peak_of(which, chosen.work, what) if of_file else ingest(chosen.work, int(which))))
        return
    result: dict[str, object] = {}
    for kind, counts in MANY.items():
        if chosen.only not in (None, kind):
            continue
        folder = chosen.work / kind
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        alone("--work", folder, "--step", "input", kind)
        result[kind] = []
        for count in counts:
            measured = json.loads(alone("--work", folder, "--step", "ingest", count))
            shutil.rmtree(folder / "out")
            result[kind].append(measured)
            print(kind, json.dumps(measured), flush=True)
        shutil.rmtree(folder)
    if chosen.only in (None, "files"):
        chosen.work.mkdir(parents=True, exist_ok=True)
        for which in FILES:
            path = chosen.work / "one"
            alone("--work", path, "--step", "file", which)
            result[which] = decode_alone(which, path)
            print(which, "to PNG {} MiB, to a square {} MiB".format(*result[which]), flush=True)
            path.unlink()
    if chosen.out:
        chosen.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
