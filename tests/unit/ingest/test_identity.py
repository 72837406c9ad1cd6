"""Texts that look identifying, names on the terminal, and the datasheet."""

import json

import pytest
from medical_files import encoded

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.data.inspect import inspect
from megatron_medgpt.data.shards import Dataset
from megatron_medgpt.data.text import Tokenizer
from megatron_medgpt.ingest.command import run_ingest
from megatron_medgpt.ingest.identity import masked

FOUND = {
    "CT of 12.03.1987 shows a nodule": "CT of [date] shows a nodule",
    "seen on 2014-03-02": "seen on [date]",
    "seen 20140302.": "seen [date].",
    "on March 3rd, 2014 and 4 May 2015": "on [date] and [date]",
    "MRN: 4711-A": "[record number]",
    "accession A99812 of": "[record number] of",
    "patient id #77": "[record number]",
    "number 12345678": "number [long number]",
    "AB1234567": "[long number]",
    "1.2.840.113619.2.55": "[UID]",
    "referred by Dr. Anna Mustermann.": "referred by [name].",
    "Mustermann^Erika": "[name]",
    "call +49 30 123 4567": "call [phone number]",
    "write to a.b@clinic.org.": "write to [e-mail].",
}
NOT_FOUND = (
    "a lesion of 3 x 4 mm at 3/4 of the length", "T2 FLAIR, TR 9000 ms, TE 120 ms", "12-15 mm", "grade 2.5 of 3.0",
    "C5-C6 and L4/L5", "may 5 lesions", "the record number of lesions was 3", "IDH1 p.R132H, 1p/19q", "2014",
)  # fmt: skip


@pytest.mark.parametrize("text", FOUND)
def test_what_looks_identifying_is_found_and_masked(text):
    clean, kinds = masked(text)
    assert clean == FOUND[text]
    assert kinds
    assert masked(clean) == (clean, ())


@pytest.mark.parametrize("text", NOT_FOUND)
def test_measures_sequences_and_grades_are_left_alone(text):
    assert masked(text) == (text, ())


@pytest.fixture
def ingest(tokenizer_folder, key_file, tmp_path):
    folder = tmp_path / "of-MUSTERMANN"
    folder.mkdir()
    captions = ["A round lesion.", "Seen on 12.03.1987, MRN 4711.", "A lesion, 20140302."]
    rows = [{"image": "MUSTERMANN.png", "caption": caption} for caption in captions]
    rows.append({"image": "NO-MUSTERMANN.png", "caption": "Nothing."})
    (folder / "MUSTERMANN.png").write_bytes(encoded())
    (folder / "MUSTERMANN.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = []

    def run(**options):
        summary = run_ingest(
            [folder], out=tmp_path / "out", tokenizer=tokenizer_folder, key_file=key_file, workers=1,
            max_reject_rate=0.9, echo=lines.append, **options,
        )  # fmt: skip
        return summary, "\n".join(lines)

    return run


def texts(folder, tokenizer_folder):
    dataset, tokenizer = Dataset(folder), Tokenizer.load(tokenizer_folder)
    return "\n".join(tokenizer.decode(dataset[i].token_ids) for i in range(len(dataset)))


def test_suspicious_texts_are_counted_by_kind_and_kept(ingest, tmp_path, tokenizer_folder):
    summary, said = ingest()
    assert summary.notes == {"texts with a date": 2, "texts with a record number": 1}
    assert "2 texts with a date (--suspicious-text mask or refuse)" in said
    assert "12.03.1987" in texts(tmp_path / "out", tokenizer_folder)


def test_suspicious_texts_are_masked_by_choice(ingest, tmp_path, tokenizer_folder):
    summary, _ = ingest(suspicious_text="mask")
    assert summary.notes == {"texts with a date masked": 2, "texts with a record number masked": 1}
    written = texts(tmp_path / "out", tokenizer_folder)
    assert "Seen on [date], [record number]." in written
    assert not any(number in written for number in ("12.03", "4711", "2014"))


def test_suspicious_texts_are_refused_by_choice(ingest, tmp_path, tokenizer_folder):
    summary, _ = ingest(suspicious_text="refuse")
    assert summary.rejects == {"missing-file": 1, "suspicious-text": 2}
    assert "1987" not in texts(tmp_path / "out", tokenizer_folder)


def test_an_unknown_choice_is_refused(ingest):
    with pytest.raises(UsageError, match="allowed: count, mask, refuse"):
        ingest(suspicious_text="delete")


def test_the_terminal_shows_no_file_name_and_no_identifier_of_a_text(ingest):
    _, said = ingest()
    assert "input 1: format caption" in said
    assert not any(canary in said for canary in ("MUSTERMANN", "1987", "4711", "2014"))


def test_a_folder_whose_name_is_a_word_of_the_line_leaves_the_line_whole(tokenizer_folder, key_file, tmp_path):
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "a.png").write_bytes(encoded())
    (tmp_path / "pairs" / "a.txt").write_text("A round lesion.")
    lines = []
    run_ingest([tmp_path / "pairs"], out=tmp_path / "out", tokenizer=tokenizer_folder, key_file=key_file, workers=1,
               echo=lines.append)  # fmt: skip
    assert lines[0] == "input 1: format caption (image=image, text=caption); pairs of files"


def test_the_terminal_shows_names_where_asked_and_no_file_does(ingest, tmp_path):
    _, said = ingest(show_names=True)
    assert "MUSTERMANN.jsonl: format caption" in said
    assert "record 3: missing-file: NO-MUSTERMANN.png" in said
    assert not any(b"MUSTERMANN" in path.read_bytes() for path in (tmp_path / "out").iterdir())


def test_a_datasheet_says_what_is_known_and_asks_for_the_rest(ingest, tmp_path):
    ingest(licence="CC BY-NC 4.0", suspicious_text="mask")
    said = inspect(tmp_path / "out")
    assert "CC BY-NC 4.0 3" in said and "2 texts with a date masked" in said and "1 missing-file" in said
    sheet = (tmp_path / "out" / "DATASHEET.md").read_text()
    for fact in ("| samples | 3 |", "| CC BY-NC 4.0 | 3 |", "| missing-file | 1 |", "| unknown | 3 |",
                 "2 texts with a date masked", "not a legal de-identification"):  # fmt: skip
        assert fact in sheet
    assert sheet.count("**?**") > 5


def test_licences_of_records_are_counted_and_the_rest_is_that_of_the_call(tokenizer_folder, key_file, tmp_path):
    (tmp_path / "a.png").write_bytes(encoded())
    stated = ["CC BY 4.0", "CC BY 4.0", "", "of Dr. Mustermann, 12.03.1987", "x" * 90]
    rows = [{"image": "a.png", "caption": f"Number {n}.", "license": name} for n, name in enumerate(stated)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"tokenizer": tokenizer_folder, "key_file": key_file, "workers": 1, "echo": lambda line: None}
    for out, licence, rest in (("one", "CC0", "CC0"), ("two", "", "not stated")):
        run_ingest([tmp_path / "t.jsonl"], out=tmp_path / out, licence=licence, **options)
        found = Dataset(tmp_path / out).manifest.provenance["licences"]
        assert found == {"CC BY 4.0": 2, rest: 1, "other": 2}
        assert "| CC BY 4.0 | 2 |" in (tmp_path / out / "DATASHEET.md").read_text()
    assert not any(b"Mustermann" in path.read_bytes() for path in (tmp_path / "one").iterdir())
