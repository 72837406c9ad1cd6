"""Identifiers planted wherever a medical file can carry them; every byte that a run writes is searched for them."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
from PIL import Image, PngImagePlugin
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from megatron_medgpt.config.load import to_yaml
from megatron_medgpt.config.schema import BlendConfig
from tests.small_data import small_run

ROOT = Path(__file__).parents[2]

CANARIES = {
    "patient name": "Zyxmann^Quirina", "patient id": "QZX-990817", "birth date": "19310704", "study date": "20110923",
    "accession number": "ACQ7719043", "institution": "Klinikum Quarzhausen", "referring physician": "Dr. Vexillar",
    "study uid": "1.2.826.0.1.9971.55.1", "instance uid": "1.2.826.0.1.9971.55.2", "device serial": "SERQX-44119",
    "private tag": "privQ-Zebulon", "nested sequence": "nestedQ-Yolanda", "overlay bits": "overlayQ-Xaverius",
    "overlay label": "labelQ-Walpurga", "file name": "fileQ-Valentin", "folder name": "folderQ-Ulrike",
    "exif": "exifQ-Thaddeus", "png text": "textQ-Severin", "png compressed text": "ztxtQ-Roswitha",
    "jpeg comment": "commQ-Quintus", "behind the end of a jpeg": "tailQ-Philomena", "table name": "tableQ-Ottokar",
    "record id": "recordQ-Notburga", "number in a caption": "7719208841", "mrn in a caption": "QX-118",
    "name of a missing file": "missQ-Methusalem", "body part": "bodyQ-Leopold", "view": "viewQ-Kunigunde",
    "laterality": "sideQ-Jolanthe", "column of sides": "columnQ-Isidora",
}  # fmt: skip


def scan() -> bytes:
    """A CT with nineteen canaries."""
    say = CANARIES
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = CTImageStorage
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = say["instance uid"]
    ds.StudyInstanceUID, ds.PatientName, ds.PatientID = say["study uid"], say["patient name"], say["patient id"]
    ds.PatientBirthDate, ds.StudyDate, ds.AccessionNumber = (
        say["birth date"],
        say["study date"],
        say["accession number"],
    )
    ds.InstitutionName, ds.ReferringPhysicianName = say["institution"], say["referring physician"]
    ds.DeviceSerialNumber, ds.Modality, ds.PhotometricInterpretation = say["device serial"], "CT", "MONOCHROME2"
    for keyword, name in (
        ("BodyPartExamined", "body part"),
        ("ViewPosition", "view"),
        ("ImageLaterality", "laterality"),
    ):
        setattr(ds, keyword, say[name])
    ds.private_block(0x0011, "QUARZ", create=True).add_new(0x01, "LO", say["private tag"])
    inner = Dataset()
    inner.ScheduledProcedureStepDescription = say["nested sequence"]
    ds.RequestAttributesSequence = [inner]
    bits = say["overlay bits"].encode().ljust(128, b"\0")
    for element, vr, value in (
        (0x0010, "US", 32), (0x0011, "US", 32), (0x0040, "CS", "G"), (0x0050, "SS", [1, 1]), (0x0100, "US", 1),
        (0x0102, "US", 0), (0x1500, "LO", say["overlay label"]), (0x3000, "OW", bits),
    ):  # fmt: skip
        ds.add_new((0x6000, element), vr, value)
    ds.Rows = ds.Columns = 32
    ds.SamplesPerPixel, ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 1, 16, 16, 15, 0
    ds.PixelData = np.arange(1024, dtype=np.uint16).tobytes()
    out = io.BytesIO()
    pydicom.dcmwrite(out, ds, enforce_file_format=True)
    return out.getvalue()


def study(folder: Path) -> Path:
    """A table of four good records and a bad one, and their files."""
    images = folder / CANARIES["folder name"]
    images.mkdir(parents=True)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x013B] = CANARIES["exif"]
    info = PngImagePlugin.PngInfo()
    info.add_text("Patient", CANARIES["png text"])
    info.add_text("More", CANARIES["png compressed text"] * 20, zip=True)
    picture.save(images / "a.jpg", exif=exif, comment=CANARIES["jpeg comment"])
    with open(images / "a.jpg", "ab") as file:
        file.write(CANARIES["behind the end of a jpeg"].encode())
    picture.save(images / f"{CANARIES['file name']}.png", pnginfo=info)
    (images / "c.dcm").write_bytes(scan())
    texts = {
        "a.jpg": f"A lesion, number {CANARIES['number in a caption']}.", f"{CANARIES['file name']}.png": "Nothing.",
        "c.dcm": f"MRN {CANARIES['mrn in a caption']}: a nodule.", f"{CANARIES['name of a missing file']}.png": "Lost.",
    }  # fmt: skip
    rows = [
        {
            "id": f"{CANARIES['record id']}-{n}",
            "image": f"{images.name}/{name}",
            "caption": text,
            "side": CANARIES["column of sides"],
        }
        for n, (name, text) in enumerate(texts.items())
    ]
    table = folder / f"{CANARIES['table name']}.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return table


def medgpt(*arguments: object, log: Path) -> None:
    """Run the command; what it says goes where a cluster would keep it."""
    command = [sys.executable, "-m", "megatron_medgpt.cli", *map(str, arguments)]
    with open(log, "ab") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, timeout=600)
    assert done.returncode == 0, log.read_text()


def audit(folder: Path, secrets: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "tools/data/audit_identity.py", folder, "--identifiers", secrets]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)


def test_no_planted_identifier_is_in_any_byte_that_ingest_training_and_report_write(tmp_path):
    secrets = tmp_path / "secrets.txt"
    secrets.write_text("\n".join([*CANARIES.values(), "Zyxmann", "Quirina"]), encoding="utf-8")
    table = study(tmp_path / "hospital")
    assert len(CANARIES) >= 18
    assert audit(tmp_path / "hospital", secrets).returncode == 1

    written = tmp_path / "written"
    written.mkdir()
    run = small_run(written)
    shutil.rmtree(written / "data")
    log = written / "job.log"
    medgpt(
        "ingest", table, "--out", written / "scans", "--tokenizer", run.tokenizer, "--key-file", tmp_path / "key",
        "--suspicious-text", "mask", "--max-reject-rate", 0.5, "--workers", 1, log=log,
    )  # fmt: skip
    medgpt("inspect", written / "scans", "--verify", "--sample", 3, "--png", written / "samples.png", log=log)
    data = (BlendConfig(path=str(written / "scans")),)
    stage = replace(run.stages[0], data=data, validation_data=data, num_steps=3, global_batch_rows=2, validation_rows=2)
    (written / "run.yaml").write_text(to_yaml(replace(run, stages=(stage,))), encoding="utf-8")
    medgpt("train", written / "run.yaml", log=log)
    medgpt("report", run.out, log=log)

    names = [path.name for path in written.rglob("*") if path.is_file()]
    for part in ("shard-00000.image.bin", "rejects.jsonl", "DATASHEET.md", "metrics.jsonl", "report.html"):
        assert part in names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert any(name.endswith(".distcp") for name in names)
    done = audit(written, secrets)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout
    assert "32 identifiers looked for, 0 found" in done.stderr
