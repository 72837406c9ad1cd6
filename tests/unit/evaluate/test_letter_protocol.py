"""The letter protocol against hand-decided cases and against a second statement of the rule."""

from __future__ import annotations

from difflib import SequenceMatcher

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded_answers import ANSWER, OPTIONS, WORKED

from megatron_medgpt.evaluate.scorers.letter import judge_letter, letter_prompt, parse_choice


def second_statement(texts: list[str], answer: str, output: str) -> bool:
    """The rule written down once more, step by step, from the description of the published scorer."""
    alphabet = "abcdefghijklmnopqrstuvwxyz"[: len(texts)]
    gold = answer
    for letter, text in zip(alphabet, texts):
        if text == answer:
            gold = letter
    choices = [f"{letter}. {text}".lower() for letter, text in zip(alphabet.upper(), texts)]

    pieces, rest = [], output
    while "<answer>" in rest:
        _, rest = rest.split("<answer>", 1)
        if "</answer>" not in rest:
            break
        piece, rest = rest.split("</answer>", 1)
        pieces.append(piece)
    inside = "".join(piece + " " for piece in pieces).strip()
    text = (inside if inside else output).lower()

    letters = list(alphabet)
    if text.split("\n\n")[0] in letters:
        text = text.split("\n\n")[0]
    elif text.split("\n\n")[-1].split(".")[0] in letters:
        text = text.split("\n\n")[-1].split(".")[0]

    if "boxed" in text:
        text = balanced(text)
    elif "<answer>" in text:
        opened = [part.split("</answer>")[0] for part in text.split("<answer>")[1:] if "</answer>" in part]
        text = " ".join(opened).strip() or text
    for phrase in ("**answer**:", "**answer**", "*answer*:", "**answer:**", "answer is", "answer:", "答案:",
                   "final answer", "final answer is"):  # fmt: skip
        text = text[text.rindex(phrase) + len(phrase) :] if phrase in text else text

    text = text.strip().lower().replace("\n", "")
    head = text.partition(".")[0].rpartition(":")[2]
    gold = gold.strip().lower()
    if head == gold:
        return True
    if head in letters:
        return choices[letters.index(head)] == gold
    if head in choices:
        return gold in letters and choices.index(head) == letters.index(gold)
    best, best_ratio = 0, 0.0
    for place, choice in enumerate(choices):
        ratio = SequenceMatcher(None, choice, text).ratio()
        if ratio > best_ratio:
            best, best_ratio = place, ratio
    return gold in (letters[best], choices[best])


def balanced(text: str) -> str:
    start = text.rfind("\\boxed{")
    if start < 0:
        return "None"
    depth, inside = 0, ""
    for character in text[start + 7 :]:
        if character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth < 0:
                return inside.strip() or "none"
        inside += character
    return "None"


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
