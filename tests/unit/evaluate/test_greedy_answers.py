"""Greedy generation: every token is the likeliest of a forward pass over that text alone."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from question_folders import omnimedvqa_folder

from megatron_medgpt.config.presets import TINY, TINY_CLIP
from megatron_medgpt.config.schema import ModelConfig, ParallelConfig
from megatron_medgpt.data.collate import RowShape, batch_of_documents
from megatron_medgpt.data.pixels import PixelSource
from megatron_medgpt.data.text import train_tokenizer
from megatron_medgpt.evaluate.documents import open_document, option_documents
from megatron_medgpt.evaluate.generate import GreedyEngine
from megatron_medgpt.evaluate.tasks import load_task
from megatron_medgpt.model.build import build_model
from megatron_medgpt.parallel import groups as process_groups
from megatron_medgpt.parallel.plan import make_layout
from megatron_medgpt.types import ImageSpec

MODEL = ModelConfig(language=replace(TINY, vocab_size=512), vision=TINY_CLIP)
IMAGE = ImageSpec(
    size_px=TINY_CLIP.image_size_px, mean=TINY_CLIP.mean, std=TINY_CLIP.std, num_tokens=MODEL.tokens_per_image
)
SETTINGS = {"image": IMAGE, "sequence_length": 320, "reader": "pillow"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(["What is number 3? PET scan"] * 20, tmp_path_factory.mktemp("tokenizer"), 512)


@pytest.fixture(scope="module")
def model():
    world = process_groups.start(timeout_s=60, kind="cpu")
    layout = make_layout(ParallelConfig(), MODEL, world.size)
    groups = process_groups.build_groups(layout)
    torch.manual_seed(0)
    yield build_model(MODEL, layout=layout, groups=groups, dtype=torch.float64)[0].eval()
    process_groups.destroy_groups()
    process_groups.stop()


@pytest.fixture
def task(tmp_path):
    folder = omnimedvqa_folder(tmp_path, num_questions=6)
    (folder / "Images" / "1.png").write_bytes(b"gone")
    return load_task("phantoms", folder)


def test_packed_answers_are_the_argmax_of_each_text_alone(model, tokenizer, task):
    engine = GreedyEngine(
        lambda batch: model(batch, want="logits"),
        tokenizer=tokenizer,
        questions_per_batch=4,
        max_new_tokens=5,
        **SETTINGS,
    )
    answers = {p.question_id: p for p in engine.answers(task.questions, "letter")}
    assert [answers[q.question_id].error is None for q in task.questions] == [True, True, False, False, True, True]
    shape = RowShape(
        sequence_length=320, image_mark_id=tokenizer.image_mark_id, pad_id=tokenizer.pad_id,
        tokens_per_image=IMAGE.num_tokens,
    )  # fmt: skip
    source = PixelSource(IMAGE, reader="pillow")
    for question in (task.questions[0], task.questions[5]):
        ids = open_document(question, "letter", tokenizer)
        written = []
        for _ in range(5):
            text = np.concatenate([ids, np.asarray(written, np.int32)])
            batch, places = batch_of_documents([(text, (), [question.image_bytes()])], shape=shape, source=source)
            with torch.no_grad():
                written.append(int(model(batch, want="logits")[places[0].end - 1, 0].argmax()))
            if written[-1] in (tokenizer.return_id, tokenizer.end_id):
                break
        ended = written[-1] in (tokenizer.return_id, tokenizer.end_id)
        answer = answers[question.question_id]
        assert answer.text == tokenizer.decode(written[:-1] if ended else written)
        assert answer.truncated is not ended


def test_an_answer_stops_at_its_end_token(tokenizer, task):
    words = [*tokenizer.encode("PET"), tokenizer.return_id]

    def logits(batch):
        out = torch.zeros(batch.token_ids_BS.shape[1], batch.token_ids_BS.shape[0], 512)
        for row, ids in enumerate(batch.token_ids_BS.tolist()):
            for place, pair in enumerate(pairwise([*ids, 0])):
                step = words.index(pair[0]) + 1 if pair[0] in words[:-1] else 0
                out[place, row, words[step]] = 1.0
        return out

    engine = GreedyEngine(logits, tokenizer=tokenizer, max_new_tokens=9, **SETTINGS)
    answers = [p for p in engine.answers(task.questions, "letter") if p.error is None]
    assert len(answers) == 4
    assert {(p.text, p.truncated) for p in answers} == {("PET", False)}


def test_a_question_that_leaves_no_room_fails_alone(tokenizer, task):
    def unused(batch):
        raise AssertionError("nothing was left to answer")

    settings = SETTINGS | {"sequence_length": 64}
    engine = GreedyEngine(unused, tokenizer=tokenizer, max_new_tokens=60, **settings)
    assert all(p.error is not None for p in engine.answers(task.questions, "letter"))


def test_option_documents_score_the_option_and_nothing_else(tokenizer, task):
    question = task.questions[0]
    for ids, spans in option_documents(question, "official-prefix", tokenizer):
        assert ids[0] == tokenizer.image_mark_id
        ((start, end),) = spans
        assert end == len(ids)
        assert tokenizer.decode(ids[1:start]) == "Question: What is number 0? The answer is"
    scored = [
        tokenizer.decode(ids[slice(*spans[0])])
        for ids, spans in option_documents(question, "official-prefix", tokenizer)
    ]
    assert scored == [f" {option}." for option in question.options]
    for (ids, spans), option in zip(option_documents(question, "chat-likelihood", tokenizer), question.options):
        assert tokenizer.decode(ids[slice(*spans[0])], keep_control=True) == f"{option}<|return|>"


def test_an_image_mark_written_in_a_question_is_no_image(tokenizer, task):
    question = replace(task.questions[0], question="What is <image> here?", options=("<image> a", "b"))
    for protocol in ("chat-likelihood", "official-prefix"):
        for ids, _ in option_documents(question, protocol, tokenizer):
            assert (ids == tokenizer.image_mark_id).sum() == 1
