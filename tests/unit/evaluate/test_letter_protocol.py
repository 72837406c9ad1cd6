"""The letter protocol against hand-decided cases and against a second statement of the rule."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded_answers import ANSWER, OPTIONS, WORKED
from second_statements import letter as second_statement

from megatron_medgpt.evaluate.scorers.letter import judge_letter, letter_prompt, parse_choice


@pytest.mark.parametrize(("output", "right", "by_similarity"), [case[:3] for case in WORKED if case[1] is not None])
def test_worked_cases_are_judged_as_by_hand(output, right, by_similarity):
    assert judge_letter(OPTIONS, ANSWER, output) is right
    assert parse_choice(OPTIONS, output).by_similarity is by_similarity


@pytest.mark.parametrize("output", [case[0] for case in WORKED])
@pytest.mark.parametrize("answer", [*OPTIONS, "Biopsy", "b"])
def test_worked_cases_agree_with_the_second_statement(output, answer):
    assert judge_letter(OPTIONS, answer, output) is second_statement(list(OPTIONS), answer, output)


FRAGMENTS = st.sampled_from(
    ["A", "b", "C.", "d:", " ", "\n\n", "\n", ".", ":", "<answer>", "</answer>", "\\boxed{", "{", "}", "boxed",
     "The answer is ", "**Answer**:", "final answer", "答案:", "PET scan", "ct scan", "blood", "İ", "ﬁ",
     "fundus imaging", "a. pet scan", "x" * 301]
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(
    output=st.lists(FRAGMENTS, max_size=8).map("".join) | st.text(max_size=30),
    options=st.lists(
        st.sampled_from(["PET scan", "CT scan", "Blood test", "Yes", "No", "ß", "scan"]), min_size=2, max_size=4
    ),
    data=st.data(),
)
def test_generated_outputs_agree_with_the_second_statement(output, options, data):
    answer = data.draw(st.sampled_from([*options, "missing"]))
    assert judge_letter(options, answer, output) is second_statement(options, answer, output)


def test_the_prompt_is_the_published_one():
    assert letter_prompt("What is it?", ["CT", "MR"]) == (
        "\nQuestion: What is it?\nOptions: \nA. CT\nB. MR\n"
        "Answer with the option's letter from the given choices directly."
    )
