"""Readers of evaluation sets: what they find, what they refuse, and that nothing leaves the denominator."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace

import pytest
from question_folders import (
    OPTIONS,
    omnimedvqa_folder,
    picture,
    questions_file,
    read_questions,
    write_predictions,
    write_questions,
)

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.evaluate.score import score
from megatron_medgpt.evaluate.tasks import TASKS, load_task
from megatron_medgpt.evaluate.tasks.omnimedvqa import (
    OPEN_ACCESS_BY_MODALITY,
    OPEN_ACCESS_BY_TYPE,
    OPEN_ACCESS_TOTAL,
    count_differences,
)
from megatron_medgpt.evaluate.tasks.question import Question
from megatron_medgpt.evaluate.tasks.reports import findings


def test_omnimedvqa_folder_is_read_whole_and_in_order(tmp_path):
    task = load_task("omnimedvqa", omnimedvqa_folder(tmp_path))
    assert [question.question_id for question in task.questions] == [f"P_{i:04d}" for i in range(16)]
    assert task.problems == ()
    first = task.questions[0]
    assert (first.options, first.answer, first.answer_index) == (OPTIONS, "PET scan", 0)
    assert first.image_bytes() == picture(0)
    assert task.questions[0].image_key == task.questions[1].image_key != task.questions[2].image_key


def test_two_and_three_options_are_read(tmp_path):
    rows = read_questions(omnimedvqa_folder(tmp_path))
    del rows[0]["option_C"], rows[0]["option_D"], rows[1]["option_D"]
    write_questions(tmp_path, rows)
    task = load_task("phantoms", tmp_path)
    assert [len(question.options) for question in task.questions[:3]] == [2, 3, 4]
    assert task.name == "phantoms"


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"gt_answer": "Biopsy"}, "answer_not_among_options"),
        ({"question_id": "P_0002"}, "repeated_id"),
        ({"image_path": "Images/gone.png"}, "missing_image"),
        ({"image_path": "../secret.png"}, "image_outside_folder"),
        ({"image_path": "/etc/hostname"}, "image_outside_folder"),
        ({"option_B": "PET scan"}, "repeated_option"),
        ({"option_B": None, "option_C": None, "option_D": None}, "option_count"),
    ],
)
def test_a_bad_question_is_named_counted_and_kept(tmp_path, change, kind):
    rows = read_questions(omnimedvqa_folder(tmp_path))
    rows[4] |= change
    write_questions(tmp_path, rows)
    task = load_task("omnimedvqa", tmp_path)
    assert len(task.questions) == 16
    assert task.problem_counts == {kind: 1}
    assert len({question.question_id for question in task.questions}) == 16


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe[]", "not UTF-8"),
        (b"[", "not JSON"),
        (b"[1, 2]", "list of objects"),
        (b'[{"question_id": "a"}]', "no field image_path"),
        (b"[]", "no questions"),
    ],
)
def test_a_broken_file_is_refused_by_name(tmp_path, content, words):
    omnimedvqa_folder(tmp_path)
    questions_file(tmp_path).write_bytes(content)
    with pytest.raises(UsageError, match=words) as caught:
        load_task("omnimedvqa", tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_unknown_tasks_and_folders_say_what_is_allowed(tmp_path):
    with pytest.raises(UsageError, match=", ".join(TASKS)):
        load_task("omni", tmp_path)
    with pytest.raises(UsageError, match="no such folder"):
        load_task("omnimedvqa", tmp_path / "gone")
    with pytest.raises(UsageError, match="QA_information"):
        load_task("omnimedvqa", tmp_path)


def test_published_counts_of_the_open_access_part_are_consistent():
    assert sum(OPEN_ACCESS_BY_TYPE.values()) == OPEN_ACCESS_TOTAL
    assert sum(OPEN_ACCESS_BY_MODALITY.values()) == OPEN_ACCESS_TOTAL - 1


def test_slake_takes_the_english_questions(tmp_path):
    (tmp_path / "imgs").mkdir()
    (tmp_path / "imgs" / "a.jpg").write_bytes(picture(1))
    rows = [
        {"qid": 1, "img_name": "a.jpg", "question": "What?", "answer": "Liver", "answer_type": "OPEN", "q_lang": "en",
         "modality": "CT"},
        {"qid": 2, "img_name": "a.jpg", "question": "什么?", "answer": "肝", "answer_type": "OPEN", "q_lang": "zh"},
        {"qid": 3, "img_name": "a.jpg", "question": "Is it?", "answer": "Yes", "answer_type": "CLOSED", "q_lang": "en"},
    ]  # fmt: skip
    (tmp_path / "test.json").write_text(json.dumps(rows))
    task = load_task("slake", tmp_path)
    assert [(q.question_id, q.question_type) for q in task.questions] == [("1", "open"), ("3", "closed")]
    assert task.problems == ()


def test_vqa_rad_takes_the_test_phrases_of_the_release(tmp_path):
    rows = [
        {"qid": 1, "phrase_type": "test_freeform", "image_name": "a.jpg", "question": "Q?", "answer": "Yes",
         "answer_type": "CLOSED ", "image_organ": "CHEST"},
        {"qid": 2, "phrase_type": "freeform", "image_name": "a.jpg", "question": "Q?", "answer": "no"},
    ]  # fmt: skip
    (tmp_path / "VQA_RAD Dataset Public.json").write_text(json.dumps(rows))
    task = load_task("vqa-rad", tmp_path, check_images=False)
    assert [(q.question_id, q.question_type, q.modality) for q in task.questions] == [("1", "closed", "CHEST")]


@pytest.mark.parametrize("name", ["vqa-rad", "path-vqa"])
def test_parquet_mirrors_are_read_with_their_pictures(tmp_path, name):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    image = {"bytes": picture(3), "path": None}
    table = pyarrow.table({"image": [image, image], "question": ["a?", "b?"], "answer": ["yes", "liver"]})
    (tmp_path / "data").mkdir()
    parquet.write_table(table, tmp_path / "data" / "test-00000-of-00001.parquet")
    task = load_task(name, tmp_path)
    assert [q.question_type for q in task.questions] == ["closed", "open"]
    assert task.questions[0].image_bytes() == picture(3)
    assert task.questions[0].image_key == task.questions[1].image_key


@pytest.mark.parametrize(("version", "name", "images"), [(1, "test.csv", "images"), (2, "test_2.csv", "figures")])
def test_pmc_vqa_options_lose_their_letters(tmp_path, version, name, images):
    (tmp_path / images).mkdir()
    (tmp_path / images / "f.jpg").write_bytes(picture(1))
    if version == 1:
        header = ["Figure_path", "Question", "Answer", "Choice A", "Choice B", "Choice C", "Choice D", "Answer_label"]
        row = ["f.jpg", " What? ", " B:CT ", " A:MR ", " B:CT ", " C:PET ", " D:US ", "B"]
    else:
        header = ["index", "Figure_path", "Caption", "Question", "Choice A", "Choice B", "Choice C", "Choice D",
                  "Answer", "split"]  # fmt: skip
        row = ["7", "f.jpg", "c", "What?", " A:MR ", "B:CT", " C:PET ", " D:US ", "B", "test"]
    with open(tmp_path / name, "w", newline="") as file:
        csv.writer(file).writerows([header, row])
    task = load_task(f"pmc-vqa-v{version}", tmp_path)
    assert task.questions[0].options == ("MR", "CT", "PET", "US")
    assert task.questions[0].answer == "CT"
    assert task.problems == ()


def test_a_users_own_table_needs_only_question_and_answer(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("question,answer,option_A,option_B\nLeft?,left,left,right\nOpen?,yes,,\n")
    task = load_task("table", path)
    assert [q.options for q in task.questions] == [("left", "right"), ()]
    assert [q.question_id for q in task.questions] == ["mine_000000", "mine_000001"]


def test_a_line_separator_within_a_text_ends_no_line(tmp_path):
    path = tmp_path / "mine.jsonl"
    rows = [{"question": f"What\u2028is\x85number {n}?", "answer": "a"} for n in range(2)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert [q.question for q in load_task("table", path).questions] == [row["question"] for row in rows]


def published_set(change: int = 0) -> list[Question]:
    """Questions with exactly the published counts of modalities and types; ``change`` more of the last type."""
    modalities = [name for name, n in OPEN_ACCESS_BY_MODALITY.items() for _ in range(n)]
    kinds = [name for name, n in OPEN_ACCESS_BY_TYPE.items() for _ in range(n)] + [
        "Other biological attributes"
    ] * change
    modalities += ["X-Ray"] * (len(kinds) - len(modalities))
    return [
        Question(question_id=str(n), question="Q?", answer="A", modality=modality.upper(), question_type=kind)
        for n, (modality, kind) in enumerate(zip(modalities, kinds))
    ]


def test_the_published_open_access_part_has_no_difference_and_others_are_named():
    assert count_differences(published_set()) == []
    assert count_differences(published_set(2)) == [
        "88,998 questions, published 88,996", "7,919 X-Ray, published 7,916",
        "3,500 Other Biological Attributes, published 3,498",
    ]  # fmt: skip
    assert "1 of 'gait', which is not in the table" in count_differences([replace(published_set()[0], modality="Gait")])


def test_a_part_of_omnimedvqa_warns_and_its_evaluation_file_says_so(tmp_path, caplog):
    folder = omnimedvqa_folder(tmp_path / "set")
    assert load_task("omnimedvqa", folder).notes == ()
    write_questions(folder, [row | {"dataset": "ACRIMA"} for row in read_questions(folder)])
    with caplog.at_level("WARNING", "megatron_medgpt"):
        task = load_task("omnimedvqa", folder)
    assert "16 questions, published 88,996" in caplog.text
    predictions = write_predictions(tmp_path / "p.jsonl", {"P_0000": "A"})
    assert score("omnimedvqa", folder, predictions)["notes"] == list(task.notes)


REPORT = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  cough // eval for pneumonia

 FINDINGS:

 The lungs are clear.
 The heart is   normal.

 IMPRESSION:  No acute process.
"""


def test_findings_are_cut_out_of_a_report():
    assert findings(REPORT) == "The lungs are clear. The heart is normal."
    assert findings(REPORT.replace("FINDINGS:", "\n")) == "No acute process."
    assert findings("Normal\n chest.") == "Normal chest."


def test_mimic_cxr_asks_once_a_study_about_its_best_frontal_view(tmp_path):
    (tmp_path / "mimic-cxr-2.0.0-split.csv").write_text(
        "dicom_id,study_id,subject_id,split\nlat,50000001,10000032,test\nap,50000001,10000032,test\n"
        "pa,50000001,10000032,test\nx,50000002,10000032,train\nonly,50000003,10000032,test\n"
    )
    (tmp_path / "mimic-cxr-2.0.0-metadata.csv").write_text(
        "dicom_id,ViewPosition\nlat,LATERAL\nap,AP\npa,PA\nonly,LL\n"
    )
    patient = tmp_path / "files" / "p10" / "p10000032"
    for study in ("s50000001", "s50000003"):
        (patient / study).mkdir(parents=True)
        (patient / f"{study}.txt").write_text(REPORT if study.endswith("1") else "FINDINGS:\n")
    (patient / "s50000001" / "pa.jpg").write_bytes(picture(1))
    task = load_task("reports", tmp_path)
    assert [(q.question_id, q.question_type, q.image.name) for q in task.questions] == [
        ("s50000001", "report", "pa.jpg"), ("s50000003", "report", "only.jpg"),
    ]  # fmt: skip
    assert task.questions[0].answer == "The lungs are clear. The heart is normal."
    assert task.problem_counts == {"missing_image": 1}
    (patient / "s50000003.txt").unlink()
    with pytest.raises(UsageError, match=r"s50000003\.txt is missing"):
        load_task("reports", tmp_path)


def test_a_table_of_reports_is_scored_by_words_and_refuses_letters(tmp_path):
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    table = tmp_path / "reports.csv"
    table.write_text("id,image,report\na,1.png,The lungs are clear.\nb,2.png,A small left effusion is seen.\n")
    answers = {"a": "The lungs are\nclear.", "b": "No effusion."}
    result = score("reports", tmp_path, write_predictions(tmp_path / "p.jsonl", answers))
    assert (result["protocol"], result["correct"], result["text"]["exact"]) == ("report", 1, 0.5)
    # unigrams by hand: outputs have 5 + 3 tokens ("." is one), of which 5 + 2 stand in their references of 5 + 7;
    # brevity penalty exp(1 - 12/8)
    assert result["text"]["bleu1"] == pytest.approx(7 / 8 * math.exp(1 - 12 / 8), abs=1e-6)
    # longest common subsequences: 4 of 4 and 4; "effusion" alone of 2 and 6 words
    assert result["text"]["rougeL"] == pytest.approx((1 + 2 * (1 / 2) * (1 / 6) / (1 / 2 + 1 / 6)) / 2, abs=1e-6)
    assert "tok:13a" in result["text"]["bleu_signature"]
    with pytest.raises(UsageError, match="--protocol report"):
        score("reports", tmp_path, tmp_path / "p.jsonl", "letter")
    plain = tmp_path / "q.csv"
    plain.write_text("question_id,question,answer\na,Q?,yes\n")
    with pytest.raises(UsageError, match="set of reports"):
        score("table", plain, tmp_path / "p.jsonl", "report")
