"""Controls, and the whole path from an engine to the evaluation file, with resume."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image
from question_folders import OPTIONS, omnimedvqa_folder

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.evaluate.command import run_eval, sample
from megatron_medgpt.evaluate.controls import apply_control, blank_picture, deal
from megatron_medgpt.evaluate.gallery import write_gallery
from megatron_medgpt.evaluate.predictions import AnswerFile, Prediction
from megatron_medgpt.evaluate.tasks import load_task


class Reader:
    """Answers from the picture alone: the sets' pictures have the shade of their own number."""

    description = "reader"

    def __init__(self, stop_after=None):
        self.asked, self.stop_after = [], stop_after

    def answers(self, questions, protocol):
        for question in questions:
            if self.stop_after is not None and len(self.asked) == self.stop_after:
                raise KeyboardInterrupt
            self.asked.append(question.question_id)
            if question.image is None:
                yield Prediction(question_id=question.question_id, error="no image")
                continue
            with Image.open(io.BytesIO(question.image_bytes())) as image:
                shade = image.getpixel((0, 0))[0]
            yield Prediction(question_id=question.question_id, text=OPTIONS[shade % 4])


@pytest.fixture
def folder(tmp_path):
    return omnimedvqa_folder(tmp_path / "set", num_questions=64, questions_per_image=1)


def test_shuffling_permutes_within_the_type_and_leaves_no_own_picture(folder):
    questions = load_task("phantoms", folder).questions
    places = deal(questions)
    assert sorted(places) == list(range(64))
    assert all(questions[i].question_type == questions[place].question_type for i, place in enumerate(places))
    assert all(questions[i].image_key != questions[place].image_key for i, place in enumerate(places))
    assert places == deal(questions)


def test_a_picture_asked_about_twice_is_not_dealt_back(tmp_path):
    questions = load_task("phantoms", omnimedvqa_folder(tmp_path, num_questions=60, questions_per_image=6)).questions
    assert all(questions[i].image_key != questions[place].image_key for i, place in enumerate(deal(questions)))


def test_the_blank_picture_is_the_mean_colour():
    with Image.open(io.BytesIO(blank_picture((0.5, 0.25, 1.0), 8))) as image:
        assert np.unique(np.asarray(image).reshape(-1, 3), axis=0).tolist() == [[128, 64, 255]]


def test_an_unknown_control_is_refused(folder):
    with pytest.raises(UsageError, match="blank_image"):
        apply_control(load_task("phantoms", folder).questions, "noise")


def test_an_engine_that_reads_pictures_is_right_and_its_controls_are_not(folder, tmp_path):
    out = tmp_path / "eval" / "phantoms.json"
    summary, items = run_eval("phantoms", folder, out, engine=Reader(), protocol="official-qa")
    assert summary["accuracy"] == 1.0
    # The blank is one answer for all of 4 balanced options; of 32 dealt pictures a type half agree in expectation,
    # because the options' order follows the type here.
    assert summary["controls"]["blank_image"] == 0.25
    assert summary["controls"]["shuffled_image"] <= 0.6
    assert json.loads(out.read_text()) == summary
    assert write_gallery(items, out.parent / "gallery.json", num_right=3) == 3


def test_a_killed_evaluation_asks_only_what_is_missing(folder, tmp_path):
    out = tmp_path / "phantoms.json"
    with pytest.raises(KeyboardInterrupt):
        run_eval("phantoms", folder, out, engine=Reader(stop_after=40), protocol="letter", controls=())
    assert not out.exists()
    second = Reader()
    summary, _ = run_eval("phantoms", folder, out, engine=second, protocol="letter", controls=())
    assert len(second.asked) == 24
    assert summary["n"] == 64
    whole, _ = run_eval("phantoms", folder, tmp_path / "other.json", engine=Reader(), protocol="letter", controls=())
    assert whole == summary


def test_answers_of_another_model_are_not_continued(folder, tmp_path):
    out = tmp_path / "phantoms.json"
    run_eval("phantoms", folder, out, engine=Reader(), protocol="letter", controls=())
    other = Reader()
    other.description = "another"
    with pytest.raises(UsageError, match=r"begun with another model \(reader, now another\); remove it"):
        run_eval("phantoms", folder, out, engine=other, protocol="letter", controls=())


def test_two_evaluations_do_not_write_the_same_answers(folder, tmp_path):
    settings = {"engine": Reader(), "protocol": "letter", "controls": ()}
    with AnswerFile(tmp_path / "one.answers.jsonl") as file:
        file.write([Prediction(question_id="P_0000", text="CT scan")])
        with pytest.raises(
            UsageError, match=r"another evaluation is writing .*one\.answers\.jsonl; let it end, or give"
        ):
            run_eval("phantoms", folder, tmp_path / "one.json", **settings)
        run_eval("phantoms", folder, tmp_path / "two.json", **settings)
    assert len((tmp_path / "one.answers.jsonl").read_text().splitlines()) == 1
    assert run_eval("phantoms", folder, tmp_path / "one.json", **settings)[0]["n"] == 64


def test_without_pictures_every_question_fails_and_counts(folder, tmp_path):
    summary, _ = run_eval(
        "phantoms", folder, tmp_path / "o.json", engine=Reader(), protocol="letter", controls=("text_only",)
    )
    assert summary["controls"] == {"text_only": 0.0}
    assert summary["controls_failed"] == {"text_only": 64}


def test_a_sample_is_spread_evenly_and_always_the_same(folder):
    task = load_task("phantoms", folder)
    chosen = [question.question_id for question in sample(task, 8).questions]
    assert chosen == [f"P_{i:04d}" for i in range(0, 64, 8)]
    assert sample(task, 1000) is task
    with pytest.raises(UsageError, match="at least 1"):
        sample(task, 0)
