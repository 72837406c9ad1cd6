"""Options as branches of one text have, to rounding, the losses that each has in a text of its own (float64)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from question_folders import omnimedvqa_folder

from megatron_medgpt.config.presets import TINY, TINY_CLIP
from megatron_medgpt.config.schema import ModelConfig, ParallelConfig
from megatron_medgpt.data.collate import RowShape, batch_of_documents
from megatron_medgpt.data.pixels import PixelSource
from megatron_medgpt.data.text import train_tokenizer
from megatron_medgpt.evaluate.branches import batch_of_trees, loss_spans, trees_of
from megatron_medgpt.evaluate.documents import option_documents
from megatron_medgpt.evaluate.tasks import load_task
from megatron_medgpt.model.build import build_model
from megatron_medgpt.parallel import groups as process_groups
from megatron_medgpt.parallel.plan import make_layout
from megatron_medgpt.types import ImageSpec

MODEL = ModelConfig(language=replace(TINY, vocab_size=512), vision=TINY_CLIP)
IMAGE = ImageSpec(
    size_px=TINY_CLIP.image_size_px, mean=TINY_CLIP.mean, std=TINY_CLIP.std, num_tokens=MODEL.tokens_per_image
)
LONG = "a finding that goes on for more positions than the sliding window of this model holds"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(["What is number 3? PET scan"] * 20, tmp_path_factory.mktemp("tokenizer"), 512)


@pytest.fixture(scope="module")
def model():
    world = process_groups.start(timeout_s=60, kind="cpu")
    layout = make_layout(ParallelConfig(), MODEL, world.size)
    groups = process_groups.build_groups(layout)
    yield build_model(MODEL, layout=layout, groups=groups, dtype=torch.float64)[0].eval()
    process_groups.destroy_groups()
    process_groups.stop()


@pytest.fixture
def question(tmp_path):
    question = load_task("phantoms", omnimedvqa_folder(tmp_path, num_questions=2)).questions[0]
    return replace(question, options=("PET scan", "PET", LONG, "X"), answer="X")


def shape_of(tokenizer, length):
    return RowShape(
        sequence_length=length, image_mark_id=tokenizer.image_mark_id, pad_id=tokenizer.pad_id,
        tokens_per_image=IMAGE.num_tokens,
    )  # fmt: skip


def trees(documents, tokenizer, longest=512):
    return trees_of(
        documents, image_mark_id=tokenizer.image_mark_id, tokens_per_image=IMAGE.num_tokens, longest=longest
    )


def by_branches(model, found, pictures, shape):
    rows = [(tree, pictures) for tree in found]
    source = PixelSource(IMAGE, reader="pillow")
    batch = batch_of_trees(rows, num_rows=len(rows) + 1, shape=shape, source=source, keep=None)
    assert batch.pixels_ICYX.shape[0] == len(pictures)  # encoded once
    with torch.no_grad():
        losses_BS = model(batch)
    return [losses_BS[row, a:b].mean().item() for row, tree in enumerate(found) for a, b in loss_spans(tree, shape)]


def each_alone(model, documents, pictures, shape):
    source, means = PixelSource(IMAGE, reader="pillow"), []
    for ids, spans in documents:
        batch, _ = batch_of_documents([(ids, spans, pictures)], shape=shape, source=source)
        with torch.no_grad():
            losses_BS = model(batch)
        means.append((losses_BS.sum() / batch.num_targets).item())
    return means


@pytest.mark.parametrize("with_picture", [True, False], ids=["picture", "no-picture"])
@pytest.mark.parametrize("protocol", ["chat-likelihood", "official-prefix"])
@pytest.mark.parametrize("num_rows", [1, 2])
def test_losses_are_those_of_each_option_alone(model, tokenizer, question, protocol, with_picture, num_rows):
    if not with_picture:
        question = replace(question, image=None)
    pictures = (question.image_bytes(),) if with_picture else ()
    documents = option_documents(question, protocol, tokenizer)
    (whole,) = trees(documents, tokenizer)
    longest = whole.length + 1 - num_rows
    found = trees(documents, tokenizer, longest)
    assert len(found) == num_rows
    losses = by_branches(model, found, pictures, shape_of(tokenizer, longest))
    np.testing.assert_allclose(losses, each_alone(model, documents, pictures, shape_of(tokenizer, 512)), rtol=1e-12)


def test_the_trunk_is_everything_but_the_options(tokenizer, question):
    documents = option_documents(question, "chat-likelihood", tokenizer)
    (tree,) = trees(documents, tokenizer)
    prompt = documents[0][1][0][0]
    assert int((tree.branch_ids == 0).sum()) == prompt - 1
    whole = sum(ids.size + IMAGE.num_tokens - 1 for ids, _ in documents)
    assert tree.length == whole - 3 * (prompt - 1 + IMAGE.num_tokens - 1)
    for number, (ids, _) in enumerate(documents, 1):
        assert tree.token_ids[tree.branch_ids == number].tolist() == ids[prompt - 1 :].tolist()


def test_options_that_share_no_words_still_have_their_losses(model, tokenizer):
    texts = [tokenizer.encode(text) for text in ("scan of PET", "What is", "3 number")]
    documents = [(np.asarray(ids, np.int32), ((1, len(ids)),)) for ids in texts]
    shape = shape_of(tokenizer, 64)
    found = trees(documents, tokenizer, 64)
    assert not any((tree.branch_ids == 0).any() for tree in found)
    np.testing.assert_allclose(
        by_branches(model, found, (), shape), each_alone(model, documents, (), shape), rtol=1e-12
    )


def test_an_option_longer_than_a_row_gives_no_tree(tokenizer, question):
    assert trees(option_documents(question, "chat-likelihood", tokenizer), tokenizer, longest=70) == []
