"""Short answers: exact match, yes/no and token F1 on cases worked by hand; harmony's final channel."""

from __future__ import annotations

import pytest

from megatron_medgpt.evaluate.scorers.harmony import final_channel
from megatron_medgpt.evaluate.scorers.short import score_short, short_prompt, token_f1


@pytest.mark.parametrize(
    ("answer", "output", "closed", "right"),
    [
        ("Yes", "yes", True, True),
        ("yes", "Yes, there is a mass.", True, True),
        ("yes", "Yes and no", True, False),  # both words: no answer
        ("no", "There is no mass", True, True),
        ("no", "normal", True, True),  # "no" is looked for inside words, as the published rule does
        ("yes", "certainly", True, False),
        ("left lung", "Left lung.", True, True),
        ("left lung", "Left lung.", False, False),  # open questions keep the full stop
        ("left lung", "The answer is left lung", False, True),
        ("left lung", "\\boxed{left lung} <answer>right</answer>", False, True),
        ("left lung", "<answer>Left Lung</answer>", False, True),
        ("pneumothorax", "", False, False),
    ],
)
def test_worked_cases(answer, output, closed, right):
    assert score_short(answer, output, closed=closed).correct is right


def test_token_f1_counts_each_word_once():
    # wanted {the, left, lung}, given {left, lung, left} = {left, lung}: precision 1, recall 2/3, F1 4/5
    assert token_f1("the left lung", "left lung left") == pytest.approx((0.8, 2 / 3))
    assert token_f1("", "") == (1.0, 1.0)
    assert token_f1("mass", "") == (0.0, 0.0)
    assert token_f1("mass", "nodule") == (0.0, 0.0)


def test_the_prompt_follows_the_kind_of_question():
    assert short_prompt("Q?", "No", closed=True).endswith("'yes' or 'no'(no extra output).")
    assert short_prompt("Q?", "lung", closed=True).endswith("single word or phrase.")
    assert short_prompt("Q?", "lung", closed=False).endswith("concisely.")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("D", "D"),
        ("D<|return|>", "D"),
        ("D<|call|>", "D"),
        ("<|channel|>analysis<|message|>A or B?<|end|><|start|>assistant<|channel|>final<|message|>B<|return|>", "B"),
        ("<|channel|>final<|message|> B ", "B"),
        ("final<|message|>B<|return|>", "B"),
        ("<|channel|>analysis<|message|>The answer is A, so", None),
        ("<|channel|>analysis<|message|>A<|end|>", None),
        ("<|channel|>commentary to=tool<|message|>x<|call|><|start|>assistant<|channel|>final<|message|>C<|end|>", "C"),
        ("analysisIt could be A.assistantfinalB", "B"),
        ("analysis of the picture shows B", "analysis of the picture shows B"),
        ("", ""),
    ],
)
def test_only_the_final_channel_is_an_answer(text, answer):
    assert final_channel(text) == answer
