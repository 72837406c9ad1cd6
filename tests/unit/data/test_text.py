"""Harmony layout, loss targets, and user text that tries to be control tokens."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.data.text import CONTROL_TOKENS, Tokenizer, Turn, train_tokenizer

DIALOGUE = [
    Turn("system", "Answer briefly."),
    Turn("user", "<image>\nWhere is the lesion?"),
    Turn("assistant", "upper left"),
    Turn("user", "And how large?\n<image>"),
    Turn("assistant", "small"),
]


def test_a_dialogue_has_the_harmony_layout(tokenizer):
    text = tokenizer.decode(tokenizer.render(DIALOGUE).token_ids, keep_control=True)
    assert text == (
        "<|start|>developer<|message|># Instructions\n\nAnswer briefly.\n\n<|end|>"
        "<|start|>user<|message|><|image|>Where is the lesion?<|end|>"
        "<|start|>assistant<|channel|>final<|message|>upper left<|end|>"
        "<|start|>user<|message|>And how large?<|image|><|end|>"
        "<|start|>assistant<|channel|>final<|message|>small<|return|>"
    )


def test_targets_are_the_answers_and_their_end_tokens(tokenizer):
    rendered = tokenizer.render(DIALOGUE)
    texts = [tokenizer.decode(rendered.token_ids[a:b], keep_control=True) for a, b in rendered.target_spans]
    assert texts == ["upper left<|end|>", "small<|return|>"]
    assert rendered.num_images == 2


def test_an_open_answer_is_the_beginning_of_the_whole_dialogue(tokenizer):
    prompt = tokenizer.render(DIALOGUE[:2], open_answer=True).token_ids
    whole = tokenizer.render(DIALOGUE[:3]).token_ids
    assert prompt.tolist() == whole[: prompt.size].tolist()
    assert tokenizer.decode(whole[prompt.size :], keep_control=True) == "upper left<|return|>"


def test_the_chat_template_of_exports_renders_the_same_tokens(tokenizer):
    transformers = pytest.importorskip("transformers")
    exported = transformers.AutoTokenizer.from_pretrained(tokenizer.source)
    parts = [{"type": "image"}, {"type": "text", "text": "Where is the lesion?"}]
    messages = [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "upper left"},
    ]
    text = exported.apply_chat_template(messages, tokenize=False)
    assert exported(text, add_special_tokens=False)["input_ids"] == tokenizer.render(DIALOGUE[:3]).token_ids.tolist()
    prompt = exported.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    expected = tokenizer.render(DIALOGUE[:2], open_answer=True).token_ids.tolist()
    assert exported(prompt, add_special_tokens=False)["input_ids"] == expected


@pytest.mark.parametrize("token", CONTROL_TOKENS)
def test_a_control_token_in_user_text_is_spelled_out(tokenizer, token):
    rendered = tokenizer.render([Turn("user", f"say {token} now"), Turn("assistant", f"{token}")])
    plain = tokenizer.render([Turn("user", "say now"), Turn("assistant", "x")])
    control = tokenizer._backend.token_to_id(token)
    assert (rendered.token_ids == control).sum() == (plain.token_ids == control).sum()
    assert tokenizer.decode(tokenizer.encode(token), keep_control=True) == token


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=60))
def test_any_text_comes_back_and_holds_no_control_token(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert max(ids, default=0) < tokenizer.vocab_size - len(CONTROL_TOKENS)


def test_training_twice_gives_the_same_tokenizer_of_the_exact_size(tokenizer, tmp_path):
    texts = ["a lesion", "two lesions"]
    one, two = (train_tokenizer(texts, tmp_path / name, 300) for name in "ab")
    assert one.fingerprint == two.fingerprint != tokenizer.fingerprint
    assert one.vocab_size == 300


def test_a_vocabulary_without_room_for_bytes_and_control_tokens_is_refused(tmp_path):
    with pytest.raises(UsageError, match="vocab_size=200 is too small"):
        train_tokenizer(["x"], tmp_path, 200)


def test_gpt_oss_tokens_are_found_and_its_reserved_token_is_the_image(tokenizer, tmp_path):
    raw = json.loads((tokenizer.tokenizer_json).decode())
    for token in raw["added_tokens"]:
        if token["content"] == "<|image|>":
            token["content"] = "<|reserved_200013|>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    assert Tokenizer.load(tmp_path).image_mark_id == tokenizer.image_mark_id


def test_a_tokenizer_whose_control_tokens_can_be_typed_is_refused(tokenizer, tmp_path):
    raw = json.loads(tokenizer.tokenizer_json.decode())
    for token in raw["added_tokens"]:
        token["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(UsageError, match="turns control tokens in plain text into control tokens"):
        Tokenizer.load(tmp_path)


def test_a_folder_without_a_harmony_tokenizer_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"has no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match="not a readable"):
        Tokenizer.load(tmp_path)
