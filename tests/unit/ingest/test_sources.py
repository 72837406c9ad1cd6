"""Every shape that users' tables have becomes the same record; ambiguity is refused, bad rows carry their reason."""

import csv
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from medical_files import dicom

from megatron_medgpt.config.errors import MedgptError, UsageError
from megatron_medgpt.data.text import Turn
from megatron_medgpt.ingest.sources import open_source

ASK, ANSWER = Turn("user", "<image>\nWhat is it?"), Turn("assistant", "A lesion.")


def records_of(path, **options):
    return list(open_source(path, **options).read())


def write_json(path, rows):
    path.write_text(json.dumps(rows))
    return path


def llava(key="conversations", question="<image>\nWhat is it?", **more):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "A lesion."}]
    return {"id": "1", "image": "a.png", key: turns, **more}


@pytest.mark.parametrize("key", ["conversations", "conversatons"])
def test_llava_with_either_spelling(tmp_path, key):
    (record,) = records_of(write_json(tmp_path / "t.json", [llava(key)]))
    assert (record.images, record.turns, record.problem) == (("a.png",), (ASK, ANSWER), "")


def test_a_missing_mark_comes_before_the_first_question(tmp_path):
    (record,) = records_of(write_json(tmp_path / "t.json", [llava(question="What is it?", image=["a.png", "b.png"])]))
    assert record.turns[0].text == "<image><image>\nWhat is it?"
    assert record.images == ("a.png", "b.png")


def test_a_mark_at_the_end_stays_there(tmp_path):
    (record,) = records_of(write_json(tmp_path / "t.json", [llava(question="What is it?\n<image>")]))
    assert record.turns[0].text == "What is it?\n<image>"


def test_llava_meds_domain_is_the_modality(tmp_path):
    domain = {"chest_xray": False, "mri": True, "histology": False}
    (record,) = records_of(write_json(tmp_path / "t.json", [llava(domain=domain)]))
    assert record.modality == "mri"


def test_chat_messages_with_parts(tmp_path):
    content = [{"type": "image"}, {"type": "text", "text": "\nWhat is it?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "A lesion."}]
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"messages": messages, "images": ["a.png"]}) + "\n")
    (record,) = records_of(path)
    assert (record.images, record.turns) == (("a.png",), (ASK, ANSWER))


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "json"])
def test_a_caption_table_in_every_form(tmp_path, ending):
    path = tmp_path / f"t.{ending}"
    rows = [{"Figure_path": "a.png", "Caption": 'A "lesion",\nhere.'}]
    if ending in ("csv", "tsv"):
        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if ending == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text(json.dumps(rows if ending == "json" else rows[0]))
    source = open_source(path)
    assert source.describe() == f"t.{ending}: format caption (image=Figure_path, text=Caption)"
    (record,) = source.read()
    assert record.images == ("a.png",)
    assert record.turns[0].text.startswith("<image>\n")
    assert record.turns[1].text == 'A "lesion",\nhere.'


def test_a_multiple_choice_table_lists_its_options(tmp_path):
    row = {
        "question_id": "q", "question": "Where?", "gt_answer": "left", "image_path": "a.png", "option_A": "left",
        "option_B": "right",
    }  # fmt: skip
    good, bad = records_of(write_json(tmp_path / "t.json", [row, {**row, "gt_answer": "up", "question_id": "r"}]))
    assert good.turns == (Turn("user", "<image>\nWhere?\nA. left\nB. right"), Turn("assistant", "left"))
    assert bad.problem == "answer-is-no-option"


def test_a_table_by_uid_finds_the_files_of_a_dicom_tree(tmp_path):
    tree = tmp_path / "tree" / "deep"
    tree.mkdir(parents=True)
    for number in (2, 1):
        content = dicom(np.zeros((16, 16), np.uint16), InstanceNumber=number, StudyInstanceUID="1.2.9")
        (tree / f"file{number}").write_bytes(content)
    (tree / "notes.txt").write_text("not a picture")
    path = tmp_path / "reports.csv"
    path.write_text("StudyInstanceUID,report\n1.2.9,Two pictures.\n1.2.8,None.\n")
    found, missing = records_of(path, image_root=tmp_path / "tree")
    assert found.images == ("deep/file1", "deep/file2")
    assert found.turns[0].text.startswith("<image><image>\n")
    assert missing.problem == "missing-file"


def test_a_folder_with_one_table_is_that_table(tmp_path):
    write_json(tmp_path / "t.json", [llava()])
    assert open_source(tmp_path).image_root == tmp_path
    write_json(tmp_path / "u.json", [llava()])
    with pytest.raises(UsageError, match=r"exactly one table .* found t\.json, u\.json"):
        open_source(tmp_path)


def test_ambiguous_columns_are_refused_with_the_option_to_set(tmp_path):
    path = write_json(tmp_path / "t.json", [{"image": "a.png", "caption": "x", "report": "y"}])
    with pytest.raises(UsageError, match=r"several columns for text: caption, report; choose with --map text=caption"):
        open_source(path)
    (record,) = records_of(path, mapping={"text": "report"})
    assert record.turns[1].text == "y"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "parquet"}, "--format parquet; allowed"),
        ({"mapping": {"picture": "image"}}, "--map picture=image; allowed fields"),
        ({"mapping": {"image": "none"}}, "has only the columns"),
        ({"image_root": "/nowhere/at/all"}, "--image-root /nowhere/at/all does not exist"),
    ],
)
def test_wrong_options_name_what_is_allowed(tmp_path, change, message):
    path = write_json(tmp_path / "t.json", [{"image": "a.png", "caption": "x"}])
    with pytest.raises(UsageError, match=message):
        open_source(path, **change)


@pytest.mark.parametrize("content", ["", "[]", "{}", "[1]", "[" * 100_000, '[{"a": NaN}]', "nothing"])
def test_a_table_without_records_is_refused(tmp_path, content):
    path = tmp_path / "t.json"
    path.write_text(content)
    with pytest.raises(UsageError):
        open_source(path)


BAD_ROWS = {
    "marks-and-images-differ": llava(question="<image> <image>"),
    "no-conversation": {"id": "1", "image": "a.png"},
    "unknown-role": {"conversations": [{"from": "robot", "value": "x"}]},
    "bad-turn": {"conversations": ["x"]},
    "text-is-not-a-string": {"conversations": [{"from": "human", "value": 3}]},
    "no-answer": {"conversations": [{"from": "human", "value": "x"}]},
    "empty-text": {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": " "}]},
    "image-in-answer": {
        "image": "a.png", "conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "<image>"}],
    },
    "bad-characters": {"conversations": [{"from": "human", "value": "a\0"}, {"from": "gpt", "value": "y"}]},
    "image-is-not-a-name": llava(image={"bytes": "x"}),
    "not-a-record": ["x"],
    "over-long": llava(question="<image>" + "x" * 200_001),
}  # fmt: skip


@pytest.mark.parametrize("reason", BAD_ROWS)
def test_a_bad_row_carries_its_reason_and_the_next_is_read(tmp_path, reason):
    rows = [llava(), BAD_ROWS[reason], llava()]
    records = records_of(write_json(tmp_path / "t.json", rows))
    assert [record.problem for record in records] == ["", reason, ""]
    assert [record.number for record in records] == [0, 1, 2]


def test_bad_lines_of_jsonl_carry_their_reason(tmp_path):
    good = json.dumps(llava()).encode()
    surrogate = json.dumps(llava(question="<image> \ud800")).encode()
    path = tmp_path / "t.jsonl"
    path.write_bytes(b"\n".join([good, b'{"broken', b'"\xff\xfe"', surrogate, b"[1]", b"", good]))
    problems = [record.problem for record in records_of(path)]
    assert problems == ["", "not-json", "not-utf-8", "bad-characters", "not-a-record", ""]


@settings(max_examples=300, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["conversations", "from", "value", "image", "messages", "role", "content", "id", "domain"]
                ),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    )
)
def test_no_row_of_any_shape_escapes_as_another_error(tmp_path_factory, row):
    path = tmp_path_factory.mktemp("fuzz") / "t.jsonl"
    path.write_text(json.dumps(llava()) + "\n" + json.dumps(row) + "\n")
    for chosen in ("llava", "messages"):
        try:
            records = records_of(path, format=chosen)
        except MedgptError:
            continue
        assert len(records) == 2


def test_a_column_whose_name_breaks_the_line_is_named_on_one_line(tmp_path):
    (tmp_path / "t.json").write_text(json.dumps([{"image": "a", "convers\nations\x1b[2J": "x"}]))
    for options in ({}, {"mapping": {"text": "none"}}):
        with pytest.raises(UsageError) as raised:
            open_source(tmp_path / "t.json", **options)
        assert str(raised.value).isprintable() and r"convers\nations\x1b[2J" in str(raised.value)
