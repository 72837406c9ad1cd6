"""The exact columns of published sets become the same records, and the picture is found where it lies."""

import csv
import json

import pytest
from medical_files import encoded, picture

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.data.text import Turn
from megatron_medgpt.ingest.sources import Inline, open_source
from megatron_medgpt.ingest.sources.place import read_image

PNG = encoded("PNG", picture(20, 20))


def records_of(path, **options):
    return list(open_source(path, **options).read())


def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path, columns):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path)
    return path


def test_pmc_vqa_version_1_has_letters_before_its_options_and_the_answer_as_text(tmp_path):
    row = {
        "Figure_path": "PMC1064097_F1.jpg", "Question": "What is the uptake pattern?", "Answer": "Focal uptake pattern",
        "Choice A": " A:Diffuse uptake pattern ", "Choice B": " B:Focal uptake pattern ", "Choice C": " C:No uptake ",
        "Choice D": " D:Cannot determine ", "Answer_label": "B",
    }  # fmt: skip
    source = open_source(write_csv(tmp_path / "train.csv", [row]))
    assert source.describe() == (
        "train.csv: format mcq (image=Figure_path, question=Question, answer=Answer, label=Answer_label, "
        "options=Choice A..Choice D)"
    )
    (record,) = source.read()
    assert record.images == ("PMC1064097_F1.jpg",)
    assert record.turns == (
        Turn("user", "<image>\nWhat is the uptake pattern?\nA. Diffuse uptake pattern\nB. Focal uptake pattern\n"
                     "C. No uptake\nD. Cannot determine"),
        Turn("assistant", "Focal uptake pattern"),
    )  # fmt: skip


def test_pmc_vqa_version_2_has_a_caption_and_the_answer_as_a_letter(tmp_path):
    row = {
        "": "0", "Figure_path": "PMC8253797_Fig4_11.jpg", "Caption": "A: slightly altered cell.", "Question": "Stain?",
        "Choice A": " A: PAS stain ", "Choice B": " B: Haematoxylin ", "Choice C": " C: Giemsa ",
        "Choice D": " D: Perl ", "Answer": "C", "split": "train",
    }  # fmt: skip
    (record,) = records_of(write_csv(tmp_path / "train_2.csv", [row]))
    assert record.turns[1] == Turn("assistant", "Giemsa")


def test_slake_finds_its_images_beside_the_table(tmp_path):
    (tmp_path / "imgs" / "xmlab1").mkdir(parents=True)
    (tmp_path / "imgs" / "xmlab1" / "source.jpg").write_bytes(encoded("JPEG"))
    row = {
        "img_id": 1, "img_name": "xmlab1/source.jpg", "question": "What modality is used?", "answer": "MRI",
        "q_lang": "en", "location": "Abdomen", "modality": "MRI", "answer_type": "OPEN", "base_type": "vqa",
        "content_type": "Modality", "triple": ["vhead", "_", "_"], "qid": 0,
    }  # fmt: skip
    chinese = {**row, "question": "这是什么模态？", "answer": "核磁共振", "q_lang": "zh", "qid": 1}
    path = tmp_path / "train.json"
    path.write_text(json.dumps([row, chinese], ensure_ascii=False), encoding="utf-8")
    source = open_source(path)
    assert source.image_root == tmp_path / "imgs"
    first, second = source.read()
    assert (first.modality, first.source_id, second.source_id) == ("MRI", "id:0", "id:1")
    assert second.turns[1].text == "核磁共振"
    assert read_image(source.image_root, first.images[0]) == encoded("JPEG")


@pytest.mark.parametrize("layout", ["file", "folder", "hub"])
def test_vqa_rad_and_pathvqa_are_parquet_with_the_bytes_inside(tmp_path, layout):
    name = {"file": "x.parquet", "folder": "train-00000-of-00001.parquet", "hub": "data/train-00000-of-00001.parquet"}
    images = [{"bytes": PNG, "path": "synpic1.jpg"}, {"bytes": PNG, "path": None}, {"bytes": None, "path": "a.png"}]
    columns = {"image": images, "question": ["a?", "b?", "c?"], "answer": ["yes", "no", "left"]}
    path = write_parquet(tmp_path / name[layout], columns)
    first, second, third = records_of(path if layout == "file" else tmp_path)
    assert first.images == second.images == (Inline.of(PNG),)
    assert read_image(tmp_path, first.images[0]) == PNG
    assert first.turns == (Turn("user", "<image>\na?"), Turn("assistant", "yes"))
    assert third.images == ("a.png",)


def test_parquet_of_several_splits_is_refused_until_one_is_named(tmp_path):
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}-00000-of-00001.parquet", {"image": [{"bytes": PNG}], "caption": ["x"]})
    with pytest.raises(UsageError, match=r"test-00000-of-00001\.parquet, train-00000-of-00001\.parquet; name the"):
        open_source(tmp_path)
    assert len(records_of(str(tmp_path / "train-{00000..00000}-of-00001.parquet"))) == 1


def test_parquet_rows_that_are_not_utf_8_carry_their_reason(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    bad = pyarrow.array([b"good", b"\xff\xfe", b"also"], pyarrow.binary()).view(pyarrow.string())
    path = write_parquet(tmp_path / "t.parquet", {"image": ["a", "b", "c"], "caption": bad})
    assert [record.problem for record in records_of(path)] == ["", "not-utf-8", ""]


def test_pmc_oa_roco_and_radfm_are_caption_tables(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "ROCOv2_2023_train_000001.jpg").write_bytes(encoded("JPEG"))
    tables = {
        "pmc_oa.jsonl": {"image": "PMC212319_Fig3_4.jpg", "caption": "x", "pmcid": "PMC212319", "url_name": "u"},
        "radfm.csv": {"PMC_ID": "PMC1", "Figure_path": "f.jpg", "Caption": "x"},
        "traindata.csv": {"id": "ROCO_00002", "name": "PMC4083729_AMHSR.jpg", "caption": "x"},
        "train_captions.csv": {"ID": "ROCOv2_2023_train_000001", "Caption": "x"},
    }
    names = []
    for name, row in tables.items():
        if name.endswith("csv"):
            write_csv(tmp_path / name, [row])
        else:
            (tmp_path / name).write_text(json.dumps(row))
        root = tmp_path / "images" if name == "train_captions.csv" else None
        source = open_source(tmp_path / name, image_root=root)
        (record,) = source.read()
        assert (source.format, record.turns[1].text) == ("caption", "x")
        names.append(record.images[0])
    assert names == ["PMC212319_Fig3_4.jpg", "f.jpg", "PMC4083729_AMHSR.jpg", "ROCOv2_2023_train_000001"]
    assert read_image(tmp_path / "images", names[3]) == encoded("JPEG")


def test_omnimedvqa_is_read_whole_but_for_tables_without_images(tmp_path):
    row = {
        "dataset": "ACRIMA", "question_id": "ACRIMA_0000", "question_type": "Modality Recognition", "question": "What?",
        "gt_answer": "Fundus", "image_path": "Images/ACRIMA/a.png", "option_A": "CT", "option_B": "Fundus",
        "modality_type": "Fundus Photography",
    }  # fmt: skip
    (tmp_path / "Images" / "ACRIMA").mkdir(parents=True)
    (tmp_path / "Images" / "ACRIMA" / "a.png").write_bytes(PNG)
    for folder, name, change in (
        ("Open-access", "ACRIMA", {}), ("Open-access", "Other", {"question_id": "o"}),
        ("Restricted-access", "Gone", {"image_path": "Images/Gone/a.png"}),
    ):  # fmt: skip
        (tmp_path / "QA_information" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "QA_information" / folder / f"{name}.json").write_text(json.dumps([row | change]))
    source = open_source(tmp_path)
    assert source.describe().endswith("left out, their images are not here: Gone")
    first, second = source.read()
    assert first.turns[1].text == "Fundus"
    assert second.source_id == "id:o"


def test_pubmedvision_has_a_list_and_no_mark(tmp_path):
    row = {
        "image": ["images/a_1.jpg", "images/a_2.jpg"], "id": "a", "modality": "Computed Tomography",
        "body_part": "Chest",
        "conversations": [{"from": "human", "value": "Compare."}, {"from": "gpt", "value": "They differ."}],
    }  # fmt: skip
    (tmp_path / "p.json").write_text(json.dumps([row]))
    (record,) = records_of(tmp_path / "p.json")
    assert record.turns[0].text == "<image><image>\nCompare."
    assert (record.images, record.modality) == (("images/a_1.jpg", "images/a_2.jpg"), "Computed Tomography")


def test_sharegpt_has_a_system_turn_and_several_rounds(tmp_path):
    says = [("system", "Be brief."), ("human", "Hello"), ("gpt", "Hello."), ("human", "<image>\nThis?"), ("gpt", "CT.")]
    row = {"id": "s", "image": "a.png", "conversations": [{"from": who, "value": text} for who, text in says]}
    (tmp_path / "s.json").write_text(json.dumps([row]))
    (record,) = records_of(tmp_path / "s.json")
    assert [turn.role for turn in record.turns] == ["system", "user", "assistant", "user", "assistant"]


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        ({"answer": "B"}, "right"), ({"answer": "right"}, "right"), ({"answer": "B. right"}, "right"),
        ({"answer_idx": 1}, "right"), ({"answer": None, "answer_label": "A"}, "left"), ({"answer": "b"}, "right"),
        ({"options": {"A": "up", "B": "down"}, "answer": "down"}, "down"),
        ({"options": ["B", "A"], "answer": "A"}, "answer-is-ambiguous"),
        ({"answer": "C"}, "answer-is-no-option"), ({"options": ["one"]}, "no-options"),
        ({"options": [1, 2]}, "text-is-not-a-string"), ({"options": "left, right"}, "no-options"),
        ({"answer_idx": 7}, "answer-is-no-option"), ({"answer_idx": True}, "text-is-not-a-string"),
    ],
)  # fmt: skip
def test_the_right_option_is_stated_by_text_letter_or_index(tmp_path, change, answer):
    first = {"image": "a", "question": "Where?", "options": ["x", "y"], "answer": "x", "answer_idx": 0}
    row = {"image": "a", "question": "Where?", "options": ["left", "right"], **change}
    if "answer_label" in row:
        first["answer_label"] = "A"
        del first["answer_idx"]
    (tmp_path / "m.jsonl").write_text(json.dumps(first) + "\n" + json.dumps(row) + "\n")
    _, record = records_of(tmp_path / "m.jsonl")
    assert answer == (record.problem or record.turns[1].text)


def test_of_several_answers_the_most_frequent_is_the_target(tmp_path):
    row = {"image": "a", "question": "Where?", "answers": ["left", "right", "right"]}
    (tmp_path / "m.jsonl").write_text(json.dumps(row))
    (record,) = records_of(tmp_path / "m.jsonl")
    assert record.turns[1].text == "right"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"image": "a", "question": "q", "answer": "a", "caption": "c"},
            "choose with --format vqa or --format caption",
        ),
        ({"conversations": [], "messages": []}, "choose with --format llava or --format messages"),
        ({"image": "a", "img": "b", "caption": "c"}, "several columns for image: image, img; choose with --map image"),
        ({"picture": "a", "words": "c"}, "of no known shape; its columns are picture, words; name them"),
    ],
)
def test_what_could_be_two_things_is_refused_with_the_choice(tmp_path, row, message):
    (tmp_path / "t.jsonl").write_text(json.dumps(row))
    with pytest.raises(UsageError, match=message):
        open_source(tmp_path / "t.jsonl")


def test_any_column_can_be_named(tmp_path):
    (tmp_path / "t.jsonl").write_text(json.dumps({"picture": "a", "words": "c"}))
    source = open_source(tmp_path / "t.jsonl", mapping={"image": "picture", "text": "words"})
    assert [record.images for record in source.read()] == [("a",)]
