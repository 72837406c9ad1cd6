"""Inputs as spreadsheets, Macs, PACS discs and full disks leave them: read, or refused with what to do."""

import csv
import errno
import io
import json

import numpy as np
import pytest
from medical_files import dicom, encoded, picture
from tars import tar_of
from typer.testing import CliRunner

from megatron_medgpt.cli import app
from megatron_medgpt.config.errors import UsageError, WorkError
from megatron_medgpt.data.shards import Dataset
from megatron_medgpt.ingest import write
from megatron_medgpt.ingest.command import run_ingest
from megatron_medgpt.ingest.sources import open_source

PNG = encoded("PNG", picture(20, 20))
CAPTIONS = [
    "R\u00f6ntgen; kein Infiltrat",
    'an "odd" quote',
    "two\nlines",
    "\u05e9\u05dc\u05d5\u05dd \u0633\u0644\u0627\u0645",
]


def table(delimiter, *, head=("image", "caption"), before="", after=""):
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerow(head)
    writer.writerows([f"{number}.png", caption] for number, caption in enumerate(CAPTIONS))
    return before + out.getvalue() + after


@pytest.fixture
def ingest(tokenizer_folder, key_file, tmp_path):
    def run(*inputs, **options):
        defaults = {"workers": 1, "key_file": key_file, "echo": lambda line: None, "out": tmp_path / "out"}
        return run_ingest(inputs, tokenizer=tokenizer_folder, **{**defaults, **options})

    return run


@pytest.mark.parametrize(
    "content",
    [
        table(";"), table("\t"), table(";", before="\ufeff"), table(";", before="sep=;\r\n"),
        table(",", before="sep=,\n"),
        table(",", after=",\r\n,\r\n\r\n"), table(",", head=("image ", " Caption")),
        table(",").replace(",caption", ",caption,,").replace("\r\n", ",,\r\n").replace(",,,,", ",,"),
    ],
)  # fmt: skip
def test_a_table_is_the_same_whatever_spreadsheet_wrote_it(tmp_path, content):
    (tmp_path / "t.csv").write_text(content, encoding="utf-8", newline="")
    records = list(open_source(tmp_path / "t.csv").read())
    assert [(record.images, record.turns[-1].text) for record in records] == [
        ((f"{number}.png",), caption) for number, caption in enumerate(CAPTIONS)
    ]


@pytest.mark.parametrize(
    ("name", "mend"),
    [
        ("all.zip", "unpack it first"), ("t.csv.gz", "unpack it first"), ("t.xlsx", "save the sheet as CSV in UTF-8"),
        ("t.arrow", "write it as parquet"), ("t.txt", r"name a table \.csv or \.tsv"),
        ("v.nii.gz", "name a table of its texts"), ("DICOMDIR", "name a table of its texts"),
        ("IM000001", "name a table of its texts"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_input_is_refused_with_what_to_do(tmp_path, name, mend):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UsageError, match=mend):
        open_source(tmp_path / name)
    if name == "all.zip":
        (tmp_path / "t.csv").write_text("image,caption\n0.png,x\n")
        with pytest.raises(UsageError, match="is not a folder; unpack it first"):
            open_source(tmp_path / "t.csv", image_root=tmp_path / name)


def test_what_a_mac_puts_into_archives_and_folders_is_no_part_of_the_data(tmp_path, ingest):
    parts = {
        "set/._a.png": b"mac", "set/a.png": PNG, "set/._a.txt": b"mac", "set/a.txt": b"one", "set/.DS_Store": b"mac",
        "set/b.png": PNG, "set/Thumbs.db": b"windows", "set/b.txt": b"two", "__MACOSX/set/._b.png": b"mac",
        "__MACOSX/set/b.txt": b"mac",
    }  # fmt: skip
    (tmp_path / "t.tar").write_bytes(tar_of(parts.items()))
    for name, content in parts.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(content)
    for number, place in enumerate((tmp_path / "t.tar", tmp_path / "folder")):
        made = ingest(place, out=tmp_path / f"out{number}")
        assert (made.num_records, made.num_samples) == (2, 2)
    assert "6 other files are not read" in open_source(tmp_path / "folder").describe()


@pytest.mark.parametrize("names", [("a.png", "b.png", "a.txt", "b.txt"), ("captions.csv", "images/a.png")])
def test_a_tar_whose_samples_are_not_together_is_refused_with_what_to_do(tmp_path, names):
    (tmp_path / "t.tar").write_bytes(tar_of([(name, PNG if name.endswith("png") else b"x") for name in names]))
    with pytest.raises(UsageError, match="--sort=name, and unpack tars of any other kind"):
        open_source(tmp_path / "t.tar")


def test_an_option_of_a_question_that_is_only_a_letter_is_none(tmp_path):
    (tmp_path / "t.csv").write_text(
        "Figure_path,Question,Answer,Choice A,Choice B,Choice C,Choice D,Answer_label\n"
        "a.png,Where?,left, A:left, B:right, C: , D:,A\n"
    )
    (record,) = open_source(tmp_path / "t.csv").read()
    assert record.turns[0].text.endswith("Where?\nA. left\nB. right")


def test_blanks_around_a_uid_do_not_hide_its_file(tmp_path):
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "IM0").write_bytes(dicom(np.zeros((16, 16), np.uint16), SOPInstanceUID="1.2.3"))
    (tmp_path / "t.csv").write_text("SOPInstanceUID;report\n 1.2.3 ;x\n")
    (record,) = open_source(tmp_path / "t.csv", image_root=tmp_path / "tree").read()
    assert record.images == ("IM0",)


@pytest.mark.parametrize(
    ("row", "mend"),
    [
        ({"image": "none.png"}, "--image-root"), ({"image": "/etc/hosts"}, "relative to --image-root"),
        ({"image": "us.dcm"}, "--allow-burned-in"), ({"image": "0.png", "id": 7}, "--map id=COLUMN"),
    ],
)  # fmt: skip
def test_too_many_rejects_of_one_kind_come_with_what_to_do(tmp_path, ingest, row, mend):
    (tmp_path / "0.png").write_bytes(PNG)
    (tmp_path / "us.dcm").write_bytes(dicom(np.zeros((16, 16), np.uint16), modality="US"))
    lines = [json.dumps({**row, "caption": f"text {number}"}) for number in range(3)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    with pytest.raises(WorkError, match=f"rejects.jsonl; .*{mend}.*, or raise the rate"):
        ingest(tmp_path / "t.jsonl")


def test_records_without_ids_of_their_own_are_told_apart_by_content(tmp_path, tokenizer_folder, key_file):
    (tmp_path / "0.png").write_bytes(PNG)
    rows = [{"id": "patient 7", "image": "0.png", "caption": text} for text in ("one", "two", "two")]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = CliRunner().invoke(app, [
        "ingest", str(tmp_path / "t.jsonl"), "--out", str(tmp_path / "out"), "--tokenizer", str(tokenizer_folder),
        "--key-file", str(key_file), "--workers", "1", "--map", "id=", "--max-reject-rate", "0.5",
    ])  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "id=by content" in done.output and "2 samples" in done.output and "1 duplicate-id" in done.output


def test_a_dataset_inside_of_the_folder_that_is_read_is_refused(tmp_path, ingest):
    for name in ("a.png", "a.txt"):
        (tmp_path / name).write_bytes(PNG if name.endswith("png") else b"text")
    with pytest.raises(UsageError, match="lies inside of the input"):
        ingest(tmp_path, out=tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()


def test_what_differs_from_an_unfinished_ingest_is_named(tmp_path, ingest):
    (tmp_path / "t.jsonl").write_text(json.dumps({"image": "none.png", "caption": "x"}))
    with pytest.raises(WorkError):
        ingest(tmp_path / "t.jsonl")
    with pytest.raises(UsageError, match=r"other inputs or settings \(suspicious text\); remove it"):
        ingest(tmp_path / "t.jsonl", suspicious_text="mask")


def test_a_full_disk_is_named_and_the_same_command_continues(tmp_path, ingest, monkeypatch):
    (tmp_path / "0.png").write_bytes(PNG)
    (tmp_path / "t.jsonl").write_text(
        "\n".join(json.dumps({"image": "0.png", "caption": f"text {number}"}) for number in range(4))
    )
    add, calls = write.ShardWriter.add_images, []

    def full(self, images):
        calls.append(self)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return add(self, images)

    monkeypatch.setattr(write.ShardWriter, "add_images", full)
    with pytest.raises(WorkError, match=r"--out .*out: No space left on device; make room and run the same command"):
        ingest(tmp_path / "t.jsonl", records_per_shard=2)
    assert ingest(tmp_path / "t.jsonl", records_per_shard=2).num_samples == 4
    assert len(Dataset(tmp_path / "out")) == 4
