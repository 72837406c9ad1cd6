"""The audit finds an identifier wherever it can hide, and prints where, not what."""

import base64
import gzip
import hashlib
import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from medical_files import dicom, encoded, picture
from PIL import PngImagePlugin

from megatron_medgpt.ingest.command import run_ingest

TOOL = Path(__file__).parents[3] / "tools" / "data" / "audit_identity.py"
SECRET = "Mustermann-Müller 4711"


def audit(*arguments):
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def png_text(compressed):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("Comment", "x" * 100 + SECRET, zip=compressed)
    return encoded("PNG", picture(), pnginfo=info)


def zipped():
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/b.json", json.dumps({"name": SECRET}))
    return out.getvalue()


HIDDEN = {
    "plain": b"\0\1" + SECRET.encode() + b"\xff",
    "upper case": SECRET.upper().encode(),
    "utf-16": SECRET.encode("utf-16-le"),
    "latin-1": SECRET.encode("latin-1"),
    "json escapes": json.dumps({"name": SECRET}).encode(),
    "across two blocks": b"x" * ((4 << 20) - 5) + SECRET.encode(),
    "base64": base64.b64encode(b"ab" + SECRET.encode() + b"cd"),
    "plain hash": hashlib.sha256(SECRET.encode()).hexdigest().encode(),
    "gzip": gzip.compress(SECRET.encode()),
    "zip": zipped(),
    "png text": png_text(False),
    "png compressed text": png_text(True),
    "png inside of a shard": b"0" * 1000 + png_text(True) + b"0" * 1000 + encoded(),
    "png in a report": b"<img src='data:image/png;base64," + base64.b64encode(png_text(True)) + b"'>",
    "exif": encoded("JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0" + SECRET.encode()),
}


def test_every_hiding_place_is_found_and_the_identifier_is_not_printed(tmp_path):
    (tmp_path / "secrets").write_text(f"{SECRET}\nabc\n")
    folder = tmp_path / "run"
    folder.mkdir()
    for number, content in enumerate(HIDDEN.values()):
        (folder / f"{number:02d}.bin").write_bytes(content)
    (folder / f"{SECRET}.txt").write_text("its name")
    done = audit(folder, "--identifiers", tmp_path / "secrets")
    assert done.returncode == 1
    found = {line.split(":")[0] for line in done.stdout.splitlines()}
    hidden = {f"{number:02d}.bin": place for number, place in enumerate(HIDDEN)}
    assert [place for name, place in hidden.items() if name not in found] == []
    assert "(a file name)" in found
    assert "ustermann" not in (done.stdout + done.stderr).lower()


def test_a_text_that_is_token_ids_is_found(tmp_path, tokenizer_folder, key_file):
    (tmp_path / "a.png").write_bytes(encoded())
    (tmp_path / "t.jsonl").write_text(json.dumps({"image": "a.png", "caption": "Of Erika Mustermann, a lesion."}))
    run_ingest(
        [tmp_path / "t.jsonl"], out=tmp_path / "out", tokenizer=tokenizer_folder, key_file=key_file, workers=1,
        echo=lambda line: None,
    )  # fmt: skip
    (tmp_path / "secrets").write_text("erika mustermann\n")
    done = audit(tmp_path / "out", "--identifiers", tmp_path / "secrets")
    assert done.stdout == "dataset.json: text of sample 0: identifier 1 as utf-8\n"
    assert done.returncode == 1


def test_identifiers_are_taken_from_headers_tables_and_file_names(tmp_path):
    (tmp_path / "pacs").mkdir()
    (tmp_path / "pacs" / "SCAN-NAME-77.dcm").write_bytes(
        dicom(np.zeros((16, 16), np.uint16), StudyDate="20140302", InstitutionName="Clinic of Nowhere")
    )
    (tmp_path / "table.csv").write_text("mrn,caption\nMRN-0815,a lesion\n")
    sources = (
        "--dicom",
        tmp_path / "pacs",
        "--table",
        f"{tmp_path / 'table.csv'}:mrn",
        "--names-of",
        tmp_path / "pacs",
    )
    secrets = ("Canary^Patient", "CANARY-4711", "20140302", "clinic of nowhere", "1.2.3.9", "MRN-0815", "SCAN-NAME-77")
    logs = tmp_path / "logs"
    logs.mkdir()
    for number, secret in enumerate(secrets):
        (logs / str(number)).write_text(f"epoch 1 {secret} loss 2")
    done = audit(logs, *sources)
    assert done.returncode == 1
    assert {line.split(":")[0] for line in done.stdout.splitlines()} == {str(number) for number in range(len(secrets))}
    clean = tmp_path / "clean.log"
    clean.write_text("epoch 1 loss 2")
    assert audit(clean, *sources).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "no identifier of at least 4"),
        (("--table", "x.csv"), "give FILE:column"),
        (("--identifiers", "none"), "none"),
    ],
)
def test_an_audit_of_nothing_is_an_error(tmp_path, arguments, says):
    done = audit(tmp_path, *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
