"""Phantoms written in the layout of every kind of input: what hospitals, papers and other trainers' users have.

python make_inputs.py PHANTOMS OUT
"""

from __future__ import annotations

import base64
import csv
import io
import json
import shutil
import sys
import tarfile
from pathlib import Path

import nibabel
import numpy as np
import pyarrow
import pyarrow.parquet
import pydicom
import tifffile
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid


def write_csv(path: Path, rows: list[dict]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def volume(seed: int) -> tuple[np.ndarray, str]:
    """Hounsfield units, int16 (x, y, z) to the patient's left, back and head, and what there is to see."""
    rng = np.random.default_rng(seed)
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in (48, 48, 8)), indexing="ij")
    right, down = rng.choice((-0.35, 0.35), 2)
    hu = np.where(np.hypot(x / 0.9, y / 0.75) < 1, 40, -1000)
    hu = np.where(np.hypot(x - right, y - down, z / 2) < 0.2, 230, hu) + rng.normal(0, 15, hu.shape)
    return hu.astype(np.int16), f"CT with one round lesion in the {'lower' if down > 0 else 'upper'} " + (
        "right." if right > 0 else "left."
    )


def write_series(folder: Path, voxels: np.ndarray) -> str:
    """A CT series, one file a slice, and its series UID. Names and numbers run against the order in the body."""
    series, study = generate_uid(), generate_uid()
    count = voxels.shape[2]
    for place in range(count):
        ds = Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, generate_uid()
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.InstanceNumber = study, series, count - place
        ds.PatientName, ds.PatientID = "PHANTOM", "PH0"
        ds.Modality, ds.PhotometricInterpretation, ds.SamplesPerPixel = "CT", "MONOCHROME2", 1
        ds.Columns, ds.Rows = voxels.shape[:2]
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
        ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = 1, 0, "HU"
        ds.PixelSpacing, ds.SliceThickness = [7, 7], 20
        ds.ImageOrientationPatient, ds.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, 20 * place]
        ds.PixelData = voxels[:, :, place].T.tobytes()
        ds["PixelData"].VR = "OW"
        ds.save_as(folder / f"{series.rpartition('.')[2]}-{count - place:03}", enforce_file_format=True)
    return series


def write_slide(path: Path, seed: int, um_per_px: float = 0.5) -> None:
    """A tiled TIFF with a pyramid: white, with one piece of purple tissue."""
    rng = np.random.default_rng(seed)
    y, x = np.ogrid[-1:1:768j, -1:1:768j]
    pixels = np.full((768, 768, 3), 244, np.uint8)
    tissue = np.hypot(x, y / rng.uniform(0.8, 1)) < 0.85
    pixels[tissue] = np.array((150, 60, 140)) + rng.integers(0, 30, (int(tissue.sum()), 1))
    per_cm = 10_000 / um_per_px
    with tifffile.TiffWriter(path) as writer:
        for step in (1, 4):
            writer.write(
                pixels[::step, ::step], tile=(256, 256), photometric="rgb", subfiletype=int(step > 1),
                resolution=(per_cm / step, per_cm / step), resolutionunit="CENTIMETER", metadata=None,
            )  # fmt: skip


def main(phantoms: Path, out: Path) -> None:
    captions = [json.loads(line) for line in (phantoms / "train" / "captions.jsonl").read_text().splitlines()]
    dialogues = json.loads((phantoms / "train" / "dialogues.json").read_text())
    tables = sorted((phantoms / "test" / "QA_information" / "Open-access").glob("*.json"))
    questions = [row for table in tables for row in json.loads(table.read_text())]
    for name in ("llava", "messages", "roco", "vqa_rad", "pmc_vqa", "slake/imgs", "webdataset", "energon/.nv-meta",
                 "pairs", "dicom/tree", "series/tree", "nifti/volumes", "slides/scans"):  # fmt: skip
        (out / name).mkdir(parents=True)

    def picture(row: dict) -> bytes:
        return (phantoms / "train" / row["image"]).read_bytes()

    def questioned(row: dict) -> bytes:
        return (phantoms / "test" / row["image_path"]).read_bytes()

    # LLaVA-Med's alignment file, with its misspelt key and the folder of images beside it.
    shutil.copytree(phantoms / "train" / "images", out / "llava" / "images")
    llava = [{**row, "conversatons": row["conversations"]} for row in dialogues]
    for row in llava:
        del row["conversations"]
    (out / "llava" / "alignment.json").write_text(json.dumps(llava))

    # Chat messages that carry their image.
    with open(out / "messages" / "chat.jsonl", "w") as file:
        for row in dialogues:
            uri = "data:application/octet-stream;base64," + base64.b64encode(picture(row)).decode()
            human, gpt = row["conversations"][:2]
            text = human["value"].replace("<image>", "").strip()
            content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": text}]
            turns = [{"role": "user", "content": content}, {"role": "assistant", "content": gpt["value"]}]
            file.write(json.dumps({"messages": turns}) + "\n")

    # ROCO: a CSV of captions.
    shutil.copytree(phantoms / "train" / "images", out / "roco" / "images")
    rows = [{"id": f"ROCO_{k:05}", "name": Path(row["image"]).name, "caption": row["caption"]}
            for k, row in enumerate(captions)]  # fmt: skip
    write_csv(out / "roco" / "traindata.csv", rows)

    # VQA-RAD, PathVQA: parquet with the bytes inside.
    table = {
        "image": [{"bytes": questioned(row), "path": None} for row in questions],
        "question": [row["question"] for row in questions], "answer": [row["gt_answer"] for row in questions],
    }  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.table(table), out / "vqa_rad" / "train-00000-of-00001.parquet")

    # PMC-VQA: a CSV with four choices; SLAKE: a JSON array with its images in imgs/.
    (out / "pmc_vqa" / "images").mkdir()
    choices, slake = [], []
    for number, row in enumerate(questions):
        name = f"{number}{Path(row['image_path']).suffix}"
        (out / "pmc_vqa" / "images" / name).write_bytes(questioned(row))
        (out / "slake" / "imgs" / name).write_bytes(questioned(row))
        options = {f"Choice {letter}": f" {letter}:{row[f'option_{letter}']} " for letter in "ABCD"}
        label = next(letter for letter in "ABCD" if row[f"option_{letter}"] == row["gt_answer"])
        choices.append({"Figure_path": name, "Question": row["question"], "Answer": row["gt_answer"], **options,
                        "Answer_label": label})  # fmt: skip
        slake.append({"img_name": name, "question": row["question"], "answer": row["gt_answer"], "q_lang": "en",
                      "modality": row["modality_type"], "answer_type": "OPEN", "qid": number})  # fmt: skip
    write_csv(out / "pmc_vqa" / "train.csv", choices)
    (out / "slake" / "train.json").write_text(json.dumps(slake))

    # OmniMedVQA as it is unpacked.
    shutil.copytree(phantoms / "test", out / "omnimedvqa")

    # WebDataset tars, and the same tars as an Energon folder.
    half = len(captions) // 2
    for number, part in enumerate((captions[:half], captions[half:])):
        members = []
        for row in part:
            stem, suffix = Path(row["image"]).stem, Path(row["image"]).suffix
            members += [(f"{stem}{suffix}", picture(row)), (f"{stem}.txt", row["caption"].encode())]
        write_tar(out / "webdataset" / f"train-{number:06}.tar", members)
        shutil.copy(out / "webdataset" / f"train-{number:06}.tar", out / "energon")
    (out / "energon" / ".nv-meta" / "dataset.yaml").write_text(
        "sample_type:\n  __module__: megatron.energon\n  __class__: CaptioningSample\n"
        'field_map:\n  image: "jpg,png,dcm"\n  caption: txt\n'
    )
    (out / "energon" / ".nv-meta" / "split.yaml").write_text(
        'split_parts:\n  train: ["train-{000000..000001}.tar"]\n  val: []\n  test: []\nexclude: []\n'
    )

    # A bare folder: each picture with its text beside it.
    for row in captions:
        name = Path(row["image"]).name
        (out / "pairs" / name).write_bytes(picture(row))
        (out / "pairs" / f"{Path(name).stem}.txt").write_text(row["caption"])

    # A tree of DICOM files, and reports by SOP instance UID.
    reports = []
    for row in captions:
        if row["image"].endswith(".dcm"):
            path = phantoms / "train" / row["image"]
            header = pydicom.dcmread(path, stop_before_pixels=True)
            folder = out / "dicom" / "tree" / header.Modality
            folder.mkdir(exist_ok=True)
            shutil.copy(path, folder / f"IM{len(reports):04}")
            reports.append({"SOPInstanceUID": header.SOPInstanceUID, "report": row["caption"]})
    write_csv(out / "dicom" / "reports.csv", reports)

    # CT in three dimensions: series of DICOM files with reports by series UID, and NIfTI volumes with a table.
    reports, volumes = [], []
    for seed in range(4):
        voxels, text = volume(seed)
        series = write_series(out / "series" / "tree", voxels)
        reports.append({"SeriesInstanceUID": series, "report": text})
        name = f"volumes/{seed}.nii.gz"
        nibabel.save(nibabel.Nifti1Image(voxels, np.diag([-7.0, -7.0, 20.0, 1.0])), out / "nifti" / name)
        volumes.append({"image": name, "modality": "CT", "report": text})
    write_csv(out / "series" / "reports.csv", reports)
    write_csv(out / "nifti" / "volumes.csv", volumes)

    # Whole slides and a table.
    slides = [{"image": f"scans/{seed}.tif", "caption": "A piece of purple tissue."} for seed in range(2)]
    for seed, row in enumerate(slides):
        write_slide(out / "slides" / row["image"], seed)
    write_csv(out / "slides" / "slides.csv", slides)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
