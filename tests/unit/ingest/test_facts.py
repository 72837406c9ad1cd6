"""Modality, body part, view and laterality go on as words of closed lists; everything else stays behind, counted."""

import io
import json

import numpy as np
import pydicom
import pytest
from medical_files import dicom, encoded
from pydicom.dataset import Dataset as Header
from pydicom.sr._concepts_dict import concepts
from pydicom.sr._snomed_dict import mapping as snomed

from megatron_medgpt.data.inspect import facts_of, inspect
from megatron_medgpt.data.manifest import LISTED
from megatron_medgpt.data.shards import Dataset
from megatron_medgpt.ingest import facts
from megatron_medgpt.ingest.command import run_ingest
from megatron_medgpt.ingest.facts import Facts, facts_of_header, facts_of_sample, place_in_list
from megatron_medgpt.types import BODY_PARTS, LATERALITIES, VIEWS

LISTS = {"body_part": BODY_PARTS, "view": VIEWS, "laterality": LATERALITIES}


def header(**tags):
    return pydicom.dcmread(io.BytesIO(dicom(np.zeros((16, 16), np.uint16), **tags)))


def code(value):
    item = Header()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "SCT", "Meier^Rosa"
    return [item]


def named(found):
    return BODY_PARTS[found.body_part], VIEWS[found.view], LATERALITIES[found.laterality]


@pytest.mark.parametrize(
    ("field", "stated", "name"),
    [
        ("body_part", "CHEST", "chest"), ("body_part", "LSSPINE", "spine"), ("body_part", "Lower leg", "lower-leg"),
        ("body_part", "Cervical spine", "spine"), ("body_part", "Abdomen/Pelvis", "abdomen-and-pelvis"),
        ("body_part", "Chest, abdomen and pelvis", "chest-abdomen-pelvis"), ("body_part", "Chest_lung", "lung"),
        ("body_part", "Knee and hand", "several"), ("body_part", "", "unknown"), ("body_part", "unknown", "unknown"),
        ("view", "PA", "pa"), ("view", "AP supine", "ap"), ("view", "antero-posterior", "ap"),
        ("view", "R MLO", "mediolateral-oblique"),
        ("view", "PA and lateral", "several"), ("view", "Left lateral decubitus", "left-decubitus"),
        ("laterality", "L", "left"), ("laterality", "Right", "right"), ("laterality", "left and right", "both"),
        ("laterality", "U", "unpaired"),
    ],
)  # fmt: skip
def test_the_usual_spellings_are_found_in_the_list(field, stated, name):
    assert LISTS[field][place_in_list(field, stated)] == name


@pytest.mark.parametrize("field", LISTS)
@pytest.mark.parametrize("stated", ["Meier Rosa", "4711", "Station 7b, Dr. Q", "x" * 100_000, "\x00\ud800"])
def test_words_that_are_on_no_list_are_nothing(field, stated):
    assert place_in_list(field, stated) is None


def test_a_header_says_body_part_view_and_side_in_plain_words_or_in_codes():
    plain = header(modality="DX", BodyPartExamined="KNEE", ViewPosition="AP", ImageLaterality="L")
    assert named(facts_of_header(plain)) == ("knee", "ap", "left")
    coded = header(modality="MG", AnatomicRegionSequence=code("T-04000"), ViewCodeSequence=code("399162004"),
                   BodyPartExamined="MEIER ROSA", Laterality="R")  # fmt: skip
    assert named(facts_of_header(coded)) == ("breast", "craniocaudal", "right")
    assert facts_of_header(coded).left_out == set()


def test_an_enhanced_file_says_it_of_its_frames():
    anatomy, group = Header(), Header()
    anatomy.FrameLaterality, anatomy.AnatomicRegionSequence = "R", code("16982005")
    group.FrameAnatomySequence = [anatomy]
    found = facts_of_header(header(modality="MR", SharedFunctionalGroupsSequence=[group]))
    assert named(found) == ("shoulder", "unknown", "right")


@pytest.mark.filterwarnings("ignore:Invalid value for VR")
def test_what_a_header_says_in_other_words_is_left_out_and_named():
    found = facts_of_header(header(BodyPartExamined="Meier^Rosa", ViewPosition="4711", ImageLaterality="Q"))
    assert named(found) == ("unknown",) * 3
    assert found.left_out == {"body_part", "view", "laterality"}


def test_every_code_of_a_list_means_in_the_standard_what_it_means_here():
    """Codes are typed by hand; pydicom ships the tables of PS3.16 with the name of each."""
    meaning = {
        code: text for names in concepts.values() for entry in names.values() for code, (text, _) in entry.items()
    }
    meaning |= {old: meaning[new] for old, new in snomed["SRT"].items() if new in meaning}
    for field, table in (("body_part", facts._BODY_PARTS), ("view", facts._VIEWS), ("laterality", facts._LATERALITIES)):
        for name, words in table.items():
            for code in (word for word in words.split() if any(letter.isdigit() for letter in word)):
                place = place_in_list(field, meaning[code])
                assert place is not None and LISTS[field][place] == name, (code, meaning[code])


def test_pictures_of_a_study_that_differ_make_several_and_a_table_goes_before_them():
    frontal, lateral = Facts(3, 11, 3, 0), Facts(3, 11, 5, 2)
    together = facts_of_sample(Facts(), [frontal, lateral])
    assert named(together) == ("chest", "several", "left")
    assert named(facts_of_sample(Facts(0, 0, 2, 0), [frontal, lateral])) == ("chest", "ap", "left")
    assert facts_of_sample(Facts(), [Facts(left_out=frozenset({"view"}))]).left_out == {"view"}


@pytest.fixture
def study(tmp_path):
    """Three X-rays, one of which says nothing that may go on, and a JPEG of which the table speaks."""
    said = (
        {"BodyPartExamined": "CHEST", "ViewPosition": "PA"}, {"BodyPartExamined": "HAND", "ImageLaterality": "L"},
        {"BodyPartExamined": "ROSA MEIER", "ViewPosition": "WARD 7"},
    )  # fmt: skip
    for number, tags in enumerate(said):
        (tmp_path / f"{number}.dcm").write_bytes(dicom(np.eye(16, dtype=np.uint16), modality="DX", **tags))
    (tmp_path / "3.jpg").write_bytes(encoded("JPEG"))
    rows = [{"image": f"{n}.dcm", "caption": f"Text {n}."} for n in range(3)]
    rows += [{"image": "3.jpg", "caption": "Text.", "body_part": "Left knee", "side": "Miss Meier"}]
    # The first row decides which columns there are.
    rows = [{"body_part": "", "side": "", **row} for row in rows]
    (tmp_path / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


@pytest.mark.parametrize("store", ["encoded", "pixels"])
def test_facts_lie_in_the_shards_the_manifest_the_datasheet_and_the_tables_of_inspect(
    study, store, tokenizer_folder, key_file
):
    lines = []
    out = study / "out"
    made = run_ingest([study / "table.jsonl"], out=out, tokenizer=tokenizer_folder, key_file=key_file, workers=1,
                      store=store, pixel_size_px=28, echo=lines.append)  # fmt: skip
    dataset = Dataset(out)
    assert [dataset.described(n) for n in range(4)] == [
        ("xray", "chest", "pa"), ("xray", "hand", "left"), ("xray",), ("knee",)
    ]  # fmt: skip
    counts = facts_of(dataset, 256, 4)
    assert counts["body_parts"] == {"chest": 1, "hand": 1, "knee": 1}
    assert (counts["views"], counts["lateralities"]) == ({"pa": 1}, {"left": 1})
    assert made.notes == {f"records with a {field} on no list": 1 for field in ("body part", "view", "laterality")}
    assert any("1 records with a view on no list" in line and "suspicious" not in line for line in lines)
    assert "chest 1" in inspect(out) and "| chest | 1 |" in (out / "DATASHEET.md").read_text()
    written = b"".join(path.read_bytes() for path in out.iterdir()).lower()
    assert b"meier" not in written and b"rosa" not in written and b"ward" not in written


def test_records_that_share_a_picture_share_its_facts(study, tokenizer_folder, key_file):
    rows = [{"image": "0.dcm", "caption": f"Text {n}."} for n in range(3)]
    (study / "same.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run_ingest([study / "same.jsonl"], out=study / "same", tokenizer=tokenizer_folder, key_file=key_file, workers=1,
               echo=lambda line: None)  # fmt: skip
    dataset = Dataset(study / "same")
    assert {dataset.described(n) for n in range(3)} == {("xray", "chest", "pa")}
    assert dataset.manifest.num_images == 1


def test_every_list_has_a_count_in_the_manifest():
    assert set(LISTED) == {"modalities", "body_parts", "views", "lateralities"}
    for names in LISTS.values():
        assert names[:2] == ("unknown", "several") and len(set(names)) == len(names)
