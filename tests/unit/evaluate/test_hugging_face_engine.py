"""The transformers engine on a small random model in the export's form."""

from __future__ import annotations

import shutil

import pytest
import torch
from question_folders import omnimedvqa_folder
from safetensors.torch import load_file, save_file

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.data.text import IMAGE_TOKEN, train_tokenizer
from megatron_medgpt.evaluate.engine import HuggingFaceEngine
from megatron_medgpt.evaluate.folder_identity import folder_fingerprint
from megatron_medgpt.evaluate.hugging_face import HuggingFaceFolderEngine
from megatron_medgpt.evaluate.score import score_answers
from megatron_medgpt.evaluate.tasks import load_task


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    from transformers import (
        AutoTokenizer,
        CLIPImageProcessor,
        CLIPVisionConfig,
        GptOssConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    folder = tmp_path_factory.mktemp("export")
    ours = train_tokenizer(["What is number 3? PET scan CT scan"] * 20, folder, 400)
    torch.manual_seed(3)
    text = GptOssConfig(
        vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=8, pad_token_id=ours.pad_id,
        eos_token_id=ours.return_id,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=ours.image_mark_id, image_seq_length=4
    )  # fmt: skip
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    images = CLIPImageProcessor(size={"height": 28, "width": 28}, crop_size={"height": 28, "width": 28})
    LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=14, vision_feature_select_strategy="default",
        image_token=IMAGE_TOKEN, num_additional_image_tokens=1, chat_template=tokenizer.chat_template,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture
def task(tmp_path):
    folder = omnimedvqa_folder(tmp_path, num_questions=6)
    (folder / "Images" / "1.png").unlink()
    return load_task("phantoms", folder)


def answers(engine, task):
    return {p.question_id: p for p in engine.answers(task.questions, "official-qa")}


def test_batches_answer_as_single_questions_do(export, task):
    together = answers(HuggingFaceEngine(export, batch_size=4, max_new_tokens=6), task)
    alone = answers(HuggingFaceEngine(export, batch_size=1, max_new_tokens=6), task)
    assert together == alone
    assert len(together) == 6
    assert all(p.truncated or p.text for p in together.values() if p.error is None)


def test_a_missing_picture_fails_its_questions_alone(export, task):
    summary, _ = score_answers(task, answers(HuggingFaceEngine(export, max_new_tokens=2), task), "official-qa")
    assert (summary["n"], summary["failed"]) == (6, 2)
    assert summary["problems"] == {"missing_image": 2}


def test_a_folder_without_a_model_and_likelihood_are_refused(export, task, tmp_path):
    with pytest.raises(UsageError, match=r"no config\.json"):
        HuggingFaceEngine(tmp_path)
    with pytest.raises(UsageError, match="token losses"):
        next(HuggingFaceEngine(export).answers(task.questions, "chat-likelihood"))


def test_an_effort_that_the_chat_template_would_drop_is_refused(export):
    with pytest.raises(UsageError, match="knows no reasoning effort"):
        HuggingFaceEngine(export, reasoning_effort="low")


def test_one_loading_answers_under_every_protocol(export, task):
    engine = HuggingFaceFolderEngine(export, max_new_tokens=4)
    written = {p.question_id: p for p in engine.answers(task.questions, "official-qa")}
    assert written == answers(HuggingFaceEngine(export, max_new_tokens=4), task)
    losses = [p.option_losses for p in engine.answers(task.questions, "official-prefix") if p.error is None]
    assert [len(of_question) for of_question in losses] == [4] * 4
    assert engine.settings("official-prefix") == {}
    assert engine.settings("official-qa")["max_new_tokens"] == 4


def test_a_model_exported_anew_under_the_same_name_is_another_one(export, tmp_path):
    copy = tmp_path / "elsewhere" / export.name
    shutil.copytree(export, copy)
    assert folder_fingerprint(copy) == folder_fingerprint(export)
    (copy / "README.md").write_text("a card with results")
    assert folder_fingerprint(copy) == folder_fingerprint(export)
    weights = load_file(copy / "model.safetensors")
    trained = next(name for name in weights if "multi_modal_projector" in name)
    weights[trained] = weights[trained] + 1e-3
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert folder_fingerprint(copy) != folder_fingerprint(export)
    assert HuggingFaceEngine(copy).description != HuggingFaceEngine(export).description
    assert HuggingFaceEngine(export).description == HuggingFaceFolderEngine(export).description
