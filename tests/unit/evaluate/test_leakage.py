"""The audit finds what was planted, and only that; its list empties the next ingest of it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("imagehash")

from PIL import Image, ImageEnhance
from question_folders import omnimedvqa_folder, questions_file, read_questions, write_questions

from megatron_medgpt.config.errors import UsageError, WorkError
from megatron_medgpt.data.shards import Dataset
from megatron_medgpt.data.text import train_tokenizer
from megatron_medgpt.evaluate.leakage import nearest
from megatron_medgpt.evaluate.leakage.audit import run_audit
from megatron_medgpt.evaluate.leakage.nearest import pairs_within
from megatron_medgpt.evaluate.leakage.ngrams import TextIndex
from megatron_medgpt.evaluate.tasks import load_task
from megatron_medgpt.ingest.command import run_ingest

TOOL = Path(__file__).parents[3] / "tools" / "data" / "audit_leakage.py"


def scan(seed: int, size_px: int = 96) -> Image.Image:
    """A smooth random picture: every seed another patient."""
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 9)).astype(np.uint8)
    return Image.fromarray(coarse).resize((size_px, size_px + 8), Image.Resampling.BICUBIC)


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def changed_bits(hashes: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    for _ in range(count):
        hashes = hashes ^ (np.uint64(1) << rng.integers(0, 64, hashes.size).astype(np.uint64))
    return hashes


@pytest.mark.parametrize("radius", range(nearest.LARGEST_RADIUS + 1))
def test_the_search_finds_exactly_the_pairs_that_comparing_everything_finds(radius):
    rng = np.random.default_rng(radius)
    stored = rng.integers(0, 1 << 63, 600).astype(np.uint64) * np.uint64(2)
    stored[17] = stored[18]
    wanted = np.concatenate([changed_bits(stored[:90], flips, rng) for flips in (0, 1, radius, radius + 1)])
    bits = np.bitwise_count(wanted[:, None] ^ stored[None]).astype(int)
    first, second, found = pairs_within(wanted, stored, radius)
    assert set(zip(first.tolist(), second.tolist())) == set(zip(*(x.tolist() for x in np.nonzero(bits <= radius))))
    assert found.tolist() == bits[first, second].tolist()
    assert len(first) >= 90


def test_the_search_serves_empty_sides_and_refuses_floods(monkeypatch):
    none = np.empty(0, np.uint64)
    some = np.arange(40, dtype=np.uint64)
    assert [part.size for part in pairs_within(none, some, 3)] == [0, 0, 0]
    assert [part.size for part in pairs_within(some, none, 3)] == [0, 0, 0]
    monkeypatch.setattr(nearest, "MOST_PAIRS", 100)
    with pytest.raises(WorkError, match="lower --distance"):
        pairs_within(some, some, 3)


def test_texts_are_found_by_runs_of_words_and_short_ones_as_a_whole():
    questions = [
        ("Which finding is seen in the left lower lobe of this patient?", "A nodule of nine millimetres."),
        ("What is shown?", "Spleen"),
        ("Is the heart enlarged in this radiograph of the chest?", "No"),
    ]
    index = TextIndex(questions, length=6, template=5)
    quoted = "Which finding is seen in the LEFT lower lobe, of this patient? A nodule of nine millimetres."
    assert [(m.question, m.share) for m in index.look_for(7, ["Hello.", quoted])] == [(0, 1.0)]
    assert [m.question for m in index.look_for(8, ["What is shown?", "Spleen."])] == [1]
    assert index.look_for(9, ["What is shown here?", "The spleen is large and the liver is not."]) == []
    half = index.look_for(10, ["Which finding is seen in the left lower lobe of that one"])
    assert 0 < half[0].share < 0.5
    assert (index.best[0].sample, index.best[0].share) == (7, 1.0)


def test_words_that_many_questions_share_are_the_template_and_no_leak():
    questions = [("What modality was used to take this image of a patient?", f"kind {n} of scan") for n in range(9)]
    index = TextIndex(questions, length=8, template=5)
    assert index.look_for(0, ["What modality was used to take this image of a patient?"]) == []
    # 11 words of the question and "kind" after them: five runs of eight that all nine questions share
    assert index.num_template_runs == 5
    assert [m.question for m in index.look_for(0, [" ".join(questions[3])])] == [3]


@pytest.fixture
def study(tmp_path):
    """A training table of 12 pictures, and a set of 8 questions on 8 pictures, four of which are in the table: two
    byte for byte, one as a dim JPEG of another size, one by its text alone."""
    folder = omnimedvqa_folder(tmp_path / "set", num_questions=8, questions_per_image=1)
    for number in range(8):
        (folder / f"Images/{number}.png").write_bytes(encoded(scan(number)))
    rows = read_questions(folder)
    for number, row in enumerate(rows):
        row["question"] = f"Which structure of case number {number} is marked by the long white arrow?"
    write_questions(folder, rows)
    train = tmp_path / "train"
    train.mkdir()
    pictures = {n: encoded(scan(100 + n)) for n in range(12)}
    pictures[2], pictures[5] = encoded(scan(0)), encoded(scan(1))
    dim = ImageEnhance.Brightness(scan(2).convert("RGB").resize((150, 162))).enhance(0.9)
    pictures[9] = encoded(dim, "JPEG", quality=60)
    records = []
    for number, content in pictures.items():
        name = f"{number}.{'jpg' if number == 9 else 'png'}"
        (train / name).write_bytes(content)
        records.append({"id": number, "image": name, "caption": f"Plain caption of the record {number}."})
    records[11]["caption"] = f"{rows[3]['question']} {rows[3]['gt_answer']}"
    (train / "captions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    train_tokenizer([rows[3]["question"], "Plain caption of the record. Describe the image."], tmp_path / "tok", 400)
    (tmp_path / "key").write_bytes(b"k" * 32)
    return tmp_path


def ingest(study, out, **options):
    quiet = {"workers": 1, "key_file": study / "key", "echo": lambda line: None}
    return run_ingest([study / "train"], out=study / out, tokenizer=study / "tok", **{**quiet, **options})


@pytest.mark.parametrize("store", [{}, {"store": "pixels", "pixel_size_px": 56}])
def test_planted_copies_are_found_in_both_stores_and_nothing_else(study, store):
    ingest(study, "data", **store)
    summary = run_audit([study / "data"], [load_task("omnimedvqa", study / "set")], study / "leak")
    assert summary["flagged"] == {
        "omnimedvqa": {"P_0000": ["exact"], "P_0001": ["exact"], "P_0002": ["near"], "P_0003": ["text"]}
    }
    assert (summary["pictures"], summary["questions"]["any"]) == ({"exact": 2, "near": 1}, 4)
    assert [pair["kind"] for pair in summary["pairs"]] == ["exact", "exact", "near"]
    assert summary["text_pairs"][0]["share"] == 1.0
    assert json.loads((study / "leak" / "leakage.json").read_text()) == summary


def test_listed_samples_are_left_out_of_the_next_ingest_and_counted(study):
    ingest(study, "data")
    task = load_task("omnimedvqa", study / "set")
    run_audit([study / "data"], [task], study / "leak")
    clean = ingest(study, "clean", exclude=study / "leak" / "exclude.jsonl", max_reject_rate=0.0)
    assert (clean.num_samples, clean.rejects) == (9, {"listed-in-exclude": 3})
    again = run_audit([study / "clean"], [task], study / "leak2")
    assert again["pictures"] == {"exact": 0, "near": 0}
    assert (study / "leak2" / "exclude.jsonl").read_text() == ""
    assert [Dataset(study / name).manifest.num_images for name in ("data", "clean")] == [12, 9]


def test_blank_and_unreadable_pictures_match_nothing_and_are_counted(study):
    (study / "set/Images/4.png").write_bytes(encoded(Image.new("L", (40, 40), 7)))
    (study / "set/Images/5.png").write_bytes(b"no picture")
    (study / "train/3.png").write_bytes(encoded(Image.new("L", (50, 50), 200)))
    ingest(study, "data")
    summary = run_audit([study / "data"], [load_task("omnimedvqa", study / "set")], study / "leak")
    assert summary["unreadable_pictures"] == 1
    assert not {"P_0004", "P_0005"} & summary["flagged"]["omnimedvqa"].keys()


def test_the_tool_says_what_it_found_and_refuses_bad_arguments(study):
    ingest(study, "data")

    def audit(*arguments):
        command = [sys.executable, str(TOOL), "--train", str(study / "data"), "--out", str(study / "leak")]
        return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=600, check=False)

    told = audit("--eval", f"omnimedvqa={study / 'set'}", "--workers", "1", "--exclude-texts")
    assert told.returncode == 0, told.stderr
    assert "4 of 8 questions are touched: 3 by 2 equal and 1 near pictures, 1 by text; 4 training" in told.stdout
    wrong = audit("--eval", str(study / "set"))
    assert (wrong.returncode, "expected TASK=FOLDER" in wrong.stderr) == (2, True)


@pytest.mark.parametrize(("content", "words"), [("{}\n", "line 1"), ("x", "line 1"), (None, "cannot be read")])
def test_a_list_that_is_none_is_refused_by_name(study, content, words):
    path = study / "exclude.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match=words):
        ingest(study, "data", exclude=path)
    assert questions_file(study / "set").is_file()
