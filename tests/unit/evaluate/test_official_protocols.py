"""OmniMedVQA's own protocols against hand-decided cases and second statements of their rules."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded_answers import ANSWER, OPTIONS, WORKED
from second_statements import official as second_statement

from megatron_medgpt.evaluate.scorers import judge_losses, judge_text
from megatron_medgpt.evaluate.scorers.official import (
    lowest_loss,
    most_similar,
    prefix_continuation,
    prefix_prompt,
    qa_prompt,
)
from megatron_medgpt.evaluate.tasks.question import Question

QUESTION = Question(question_id="q", question="What technique?", answer=ANSWER, options=OPTIONS)


@pytest.mark.parametrize(("output", "right", "choice"), [(c[0], *c[3:]) for c in WORKED if c[3] is not None])
def test_worked_cases_are_judged_as_by_hand(output, right, choice):
    verdict = judge_text("official-qa", QUESTION, output)
    assert verdict.correct is right
    if choice is not None:
        assert verdict.choice == choice


@settings(max_examples=200, deadline=None)
@given(options=st.lists(st.text(max_size=20), min_size=2, max_size=4), output=st.text(max_size=250))
def test_generated_outputs_agree_with_the_second_statement(options, output):
    assert most_similar(options, output) == second_statement(options, output)


def test_a_bare_letter_that_no_option_contains_is_wrong_and_unparsed():
    verdict = judge_text("official-qa", QUESTION, "Z")
    assert not verdict.correct
    assert not verdict.parsed


def test_equal_similarity_takes_the_first_option():
    assert most_similar(["left", "lept"], "le") == 0


def test_the_prompt_shows_a_python_list_and_no_letters():
    assert qa_prompt("What is it?", ["CT", "it's MR"]) == (
        "What is it?Here are 2 candidate answers:['CT', \"it's MR\"] Only return what you think is the correct answer "
        "from the candidate answers, do not return any other irrelevant text!"
    )


def test_prefix_prompt_and_continuation_are_the_published_ones():
    assert prefix_prompt("What is it?") + prefix_continuation("CT") == "Question: What is it? The answer is CT."


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(1e-3, 50), min_size=2, max_size=4, unique=True))
def test_lowest_loss_is_the_argmax_of_the_softmax_of_the_reciprocals(losses):
    reciprocals = [1 / loss for loss in losses]
    weights = [math.exp(value - max(reciprocals)) for value in reciprocals]
    best = max(weights)
    assert weights[lowest_loss(losses)] == best


def test_losses_that_are_not_numbers_or_too_few_give_no_answer():
    assert lowest_loss([0.1, math.nan]) is None
    assert judge_losses(QUESTION, [0.1, 0.2]).correct is False
    assert judge_losses(QUESTION, [0.4, 0.3, 0.2, 0.1]).correct is True
