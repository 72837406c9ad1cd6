"""Greedy generation: every token is the likeliest of a forward pass over the whole text alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from question_folders import omnimedvqa_folder

from megatron_medgpt.config.presets import TINY, TINY_CLIP
from megatron_medgpt.config.schema import ModelConfig, ParallelConfig
from megatron_medgpt.data.collate import RowShape, batch_of_documents
from megatron_medgpt.data.pixels import PixelSource
from megatron_medgpt.data.text import train_tokenizer
from megatron_medgpt.evaluate.decode import Prompt
from megatron_medgpt.evaluate.documents import open_document, option_documents
from megatron_medgpt.evaluate.forward import LayoutForward
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


@pytest.fixture(scope="module")
def forward(model):
    return LayoutForward([model], ProcessGroupCollection.use_mpu_process_groups(), torch.device("cpu"))


@pytest.fixture
def task(tmp_path):
    folder = omnimedvqa_folder(tmp_path, num_questions=6)
    (folder / "Images" / "1.png").write_bytes(b"gone")
    return load_task("phantoms", folder)


def engine_of(forward, tokenizer, **settings):
    return GreedyEngine(forward, tokenizer=tokenizer, **(SETTINGS | settings))


def test_answers_are_the_argmax_of_each_text_run_whole(forward, model, tokenizer, task):
    engine = engine_of(forward, tokenizer, questions_per_batch=4, max_new_tokens=5)
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


def test_an_answer_stops_at_its_end_token_which_is_no_part_of_it(forward, tokenizer, task):
    question = task.questions[0]
    engine = engine_of(forward, tokenizer, max_new_tokens=12)
    prompt = Prompt(token_ids=open_document(question, "letter", tokenizer), images=(question.image_bytes(),))
    length = engine._writer.length_of(prompt)
    ((tokens,),) = engine._writer.write([[prompt]], max_new_tokens=12, ends=frozenset(), longest=length)
    # One that would be seen in the text, as a control token would not.
    stop_at = next(
        i for i, token in enumerate(tokens)
        if token not in tokens[:i] and tokenizer.decode([token]) and tokenizer.decode(tokens[:i])
    )  # fmt: skip
    engine._ends = frozenset({tokens[stop_at]})
    (answer,) = engine.answers([question], "letter")
    assert (answer.text, answer.truncated) == (tokenizer.decode(tokens[:stop_at]), False)


def test_a_question_that_leaves_no_room_fails_alone(forward, tokenizer, task):
    long = replace(task.questions[1], question_id="long", question="What is it? " * 80)
    engine = engine_of(forward, tokenizer, max_new_tokens=2)
    answers = {p.question_id: p for p in engine.answers([task.questions[0], long, task.questions[4]], "letter")}
    assert [key for key, answer in answers.items() if answer.error] == ["long"]
    assert "a row has 320" in answers["long"].error


def test_a_batch_of_broken_pictures_alone_is_answered_with_its_errors(forward, tokenizer, task):
    answers = list(engine_of(forward, tokenizer, max_new_tokens=2).answers(task.questions[2:4], "letter"))
    assert all("not a readable picture" in answer.error for answer in answers)
    assert len(answers) == 2


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
