"""Our scorers against the published rules, item by item: recorded answers judged by hand, and any answer at all judged
by a second statement of each rule."""

from __future__ import annotations

import dis
import json
import sys
from types import CodeType, FrameType

import pytest
import second_statements as second
from hypothesis import example, given, settings
from hypothesis import strategies as st
from recorded_predictions import CASES, SHORT

from megatron_medgpt.evaluate.score import items_path, score
from megatron_medgpt.evaluate.scorers import harmony, letter, official, short, stated
from megatron_medgpt.evaluate.scorers.harmony import final_channel
from megatron_medgpt.evaluate.scorers.letter import judge_letter
from megatron_medgpt.evaluate.scorers.official import most_similar
from megatron_medgpt.evaluate.scorers.short import score_short


def by_official(options, answer, output):
    choice = most_similar(options, output)
    return choice is not None and options[choice] == answer


@pytest.mark.parametrize(("options", "answer", "output", "by_letter", "by_text"), CASES)
def test_recorded_answers_are_judged_as_by_hand_and_as_the_rules_say(options, answer, output, by_letter, by_text):
    ours = judge_letter(options, answer, output), by_official(options, answer, output)
    kept = second.official(list(options), output)
    theirs = second.letter(list(options), answer, output), kept is not None and options[kept] == answer
    assert ours == theirs
    assert by_letter in (None, ours[0])
    assert by_text in (None, ours[1])


@pytest.mark.parametrize(("answer", "output", "closed", "right", "f1"), SHORT)
def test_recorded_short_answers_are_judged_as_by_hand_and_as_the_rule_says(answer, output, closed, right, f1):
    ours = score_short(answer, output, closed=closed)
    assert (ours.correct, ours.f1, ours.recall) == pytest.approx(second.short(answer, output, closed))
    assert (ours.correct, ours.f1) == (right, pytest.approx(f1))


PIECES = st.sampled_from(
    ["A", "b", "B.", "c)", "D:", "yes", "No", "no.", " ", "\n", "\n\n", ".", ":", "<answer>", "</answer>", "\\boxed{",
     "{", "}", "boxed", "The answer is ", "Answer:", "**Answer**:", "**Answer:**", "*answer*:", "final answer ",
     "final answer is ", "答案:", "left lung", "Left", "lung", "CT scan", "İ", "ﬁ", "ß", "ſ", "Ｂ", "x" * 201]
)  # fmt: skip
OUTPUTS = st.lists(PIECES, max_size=9).map("".join) | st.text(max_size=25)


@settings(max_examples=200, deadline=None)
@given(output=OUTPUTS, answer=st.sampled_from(["yes", "No", "left lung", "B", "", "ß"]), closed=st.booleans())
def test_generated_short_answers_agree_with_the_second_statement(output, answer, closed):
    ours = score_short(answer, output, closed=closed)
    assert (ours.correct, ours.f1, ours.recall) == pytest.approx(second.short(answer, output, closed))


@settings(max_examples=200, deadline=None)
@given(
    text=st.lists(
        st.sampled_from(["<|channel|>", "final", "analysis", "<|message|>", "<|end|>", "<|return|>", "<|start|>",
                         "assistant", "A", " ", "\n", "the answer", "<|call|>"]), max_size=10
    ).map("".join).filter(lambda text: not text.lstrip().startswith(("final", "analysis")))
)  # fmt: skip
@example(text="<|channel|>final<|message|>A<|channel|>")
def test_generated_harmony_answers_agree_with_the_second_statement(text):
    assert final_channel(text) == second.final(text)


def write_set(folder, cases):
    rows = [
        {"question_id": f"q{n}", "question": "Q?", "answer": answer, "options": json.dumps(list(options))}
        for n, (options, answer, *_) in enumerate(cases)
    ]
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("protocol", ["letter", "official-qa"])
def test_a_recorded_file_is_scored_item_by_item_as_the_rule_says(tmp_path, protocol):
    answers = tmp_path / "answers.jsonl"
    answers.write_text(
        "".join(json.dumps({"question_id": f"q{n}", "prediction": case[2]}) + "\n" for n, case in enumerate(CASES))
    )
    result = score("table", write_set(tmp_path, CASES), answers, protocol, tmp_path / "out.json")
    wanted, failed = {}, 0
    for number, (options, answer, output, *_) in enumerate(CASES):
        if protocol == "letter":
            right = second.letter(list(options), answer, output)
        else:
            kept = second.official(list(options), output)
            right = kept is not None and options[kept] == answer
        # No answer at all is wrong here, where the published letter rule would credit option A.
        failed += not output.strip()
        wanted[f"q{number}"] = right and bool(output.strip())
    items = [json.loads(line) for line in items_path(tmp_path / "out.json").read_text().splitlines()]
    assert {item["question_id"]: item["correct"] for item in items} == wanted
    assert (result["n"], result["correct"], result["failed"]) == (len(CASES), sum(wanted.values()), failed)


def executable_lines(code: CodeType) -> set[tuple[str, int]]:
    """Every line of a function and of what is nested in it."""
    lines = {(code.co_filename, line) for _, line in dis.findlinestarts(code) if line and line > code.co_firstlineno}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            lines |= executable_lines(constant)
    return lines


def test_the_recorded_answers_reach_every_line_of_the_scorers():
    functions = [
        letter.parse_choice, letter.means_answer, letter._paragraph_letter, letter._is_letter, official.most_similar,
        stated.tagged, stated.boxed, stated.announced, short.score_short, short.token_f1, harmony.final_channel,
    ]  # fmt: skip
    wanted = set().union(*(executable_lines(function.__code__) for function in functions))
    reached: set[tuple[str, int]] = set()

    def trace(frame: FrameType, event: str, argument: object):
        reached.add((frame.f_code.co_filename, frame.f_lineno))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        for options, answer, output, *_ in CASES:
            judge_letter(options, answer, output)
            most_similar(options, output)
        for answer, output, closed, *_ in SHORT:
            score_short(answer, output, closed=closed)
        for text in ("A<|end|>", "final<|message|>B", "<|channel|>analysis<|message|>?", "analysis?assistantfinalB"):
            final_channel(text)
    finally:
        sys.settrace(before)
    assert not wanted - reached
