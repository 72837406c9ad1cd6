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

import pyarrow
import pyarrow.parquet
import pydicom


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


def main(phantoms: Path, out: Path) -> None:
    captions = [json.loads(line) for line in (phantoms / "train" / "captions.jsonl").read_text().splitlines()]
    dialogues = json.loads((phantoms / "train" / "dialogues.json").read_text())
    tables = sorted((phantoms / "test" / "QA_information" / "Open-access").glob("*.json"))
    questions = [row for table in tables for row in json.loads(table.read_text())]
    for name in ("llava", "messages", "roco", "vqa_rad", "pmc_vqa", "slake/imgs", "webdataset", "energon/.nv-meta",
                 "pairs", "dicom/tree"):  # fmt: skip
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


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
