"""Phantoms: the same every time, decoded as drawn, and questions that only the picture answers."""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from megatron_medgpt.data.picture import canonical
from megatron_medgpt.ingest.decode import decode
from megatron_medgpt.ingest.phantom_study import QUESTIONS, make_phantoms, write_phantom
from megatron_medgpt.ingest.phantoms import MODALITIES, PLACES, SHAPES, Phantom, draw_phantom, render, to_grey


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return make_phantoms(
        tmp_path_factory.mktemp("study"), num_train=24, num_validation=4, num_test=64, seed=3, workers=2, size_px=64
    )


def questions_of(study):
    folder = study.questions / "QA_information" / "Open-access"
    return [row for path in sorted(folder.glob("*.json")) for row in json.loads(path.read_text())]


@pytest.mark.parametrize("modality", MODALITIES)
def test_a_dicom_file_decodes_to_the_picture_that_was_drawn(tmp_path, modality):
    import io

    for number in range(6):
        rng = np.random.default_rng(number)
        phantom = draw_phantom(rng, number, modality=modality, num_lesions=2)
        path = tmp_path / f"{number}.dcm"
        write_phantom(path, phantom, rng)
        (decoded,) = decode(path.read_bytes())
        grey = np.asarray(Image.open(io.BytesIO(decoded.picture.encoded)).convert("L")).astype(int)
        drawn = to_grey(phantom, render(phantom)).astype(int)
        # MR without a window is shown between its percentiles, whose lower end lies a little above 0.
        allowed = 12 if modality == "mr" else 2
        assert abs(grey - drawn).max() <= allowed
        assert abs(grey - drawn).mean() <= allowed / 2


def test_the_same_seed_is_the_same_study(study, tmp_path):
    again = make_phantoms(tmp_path, num_train=8, num_validation=4, num_test=4, seed=3, workers=1, size_px=64)
    first = [json.loads(line) for line in study.train_captions.read_text().splitlines()]
    second = [json.loads(line) for line in again.train_captions.read_text().splitlines()]
    assert first[:8] == second
    for row in second:
        one = (study.train_captions.parent / row["image"]).read_bytes()
        assert one == (again.train_captions.parent / row["image"]).read_bytes()


def test_a_lesion_lies_where_and_looks_as_it_is_said():
    for number, place in enumerate(PLACES):
        bare = Phantom(modality="ct", shape="round", places=(), seed=number)
        with_lesion = Phantom(modality="ct", shape="round", places=(place,), seed=number)
        # The lesion draws its own random numbers, so bodies differ by noise; the difference is largest at the lesion.
        change = render(with_lesion) - render(bare)
        bright = np.argwhere(change > 120)
        down, right = bright.mean(axis=0) / 128 - 0.5
        assert (("lower" in place) == (down > 0)) and (("right" in place) == (right > 0))


def test_questions_have_the_fields_of_omnimedvqa_and_pictures_that_open(study):
    for row in questions_of(study):
        assert row["gt_answer"] in [row[f"option_{letter}"] for letter in "ABCD"]
        assert len({row[f"option_{letter}"] for letter in "ABCD"}) == 4
        canonical((study.questions / row["image_path"]).read_bytes())
    assert {"question_id", "question_type", "question", "gt_answer", "image_path", "modality_type", "dataset"} <= set(
        row
    )


def test_every_type_and_answer_is_asked_equally_often(study):
    answers = Counter((row["question_type"], row["gt_answer"]) for row in questions_of(study))
    assert set(answers.values()) == {4}
    assert len(answers) == 16
    kinds = Counter(row["question_type"] for row in questions_of(study))
    assert set(kinds) == set(QUESTIONS)


def test_the_text_alone_does_not_tell_the_answer():
    # Wordings are drawn without looking at the answer: over many questions, no wording prefers one.
    from megatron_medgpt.ingest.phantom_study import answer_of

    counts: dict[str, Counter] = {}
    for number in range(4000):
        rng = np.random.default_rng([9, number])
        phantom = draw_phantom(rng, number, modality=MODALITIES[number % 4], num_lesions=1)
        kind = "Disease Diagnosis"
        counts.setdefault(QUESTIONS[kind][rng.integers(3)], Counter())[answer_of(phantom, kind)] += 1
    for answers in counts.values():
        share = np.array([answers[shape] for shape in SHAPES]) / sum(answers.values())
        # 1300 draws of 1/4: standard deviation 0.012; five of them.
        assert abs(share - 0.25).max() < 0.06
