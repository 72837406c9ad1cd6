"""Scoring recorded answers: denominators, failures, tables, intervals, the paired test."""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import pytest
from question_folders import OPTIONS, omnimedvqa_folder, write_predictions

from megatron_medgpt.commands.evaluate import score as score_command
from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.evaluate.paired import compare, mcnemar_exact, read_verdicts
from megatron_medgpt.evaluate.predictions import AnswerFile, Prediction, read_predictions
from megatron_medgpt.evaluate.result import bootstrap_interval
from megatron_medgpt.evaluate.score import items_path, score, score_answers
from megatron_medgpt.evaluate.tasks import load_task


@pytest.fixture
def folder(tmp_path):
    return omnimedvqa_folder(tmp_path / "set")


def right_answers(n=16):
    return {f"P_{i:04d}": OPTIONS[i % 4] for i in range(n)}


def test_all_right_is_one_and_every_table_adds_up(folder, tmp_path):
    out = tmp_path / "eval" / "result.json"
    result = score("omnimedvqa", folder, write_predictions(tmp_path / "p.jsonl", right_answers()), "official-qa", out)
    assert (result["n"], result["correct"], result["accuracy"], result["macro_by_modality"]) == (16, 16, 1.0, 1.0)
    assert result["ci95"] == [1.0, 1.0]
    assert sum(cell["n"] for cell in result["by_modality"].values()) == 16
    assert sum(cell["n"] for cell in result["by_question_type"].values()) == 16
    assert sum(c["n"] for row in result["by_modality_and_question_type"].values() for c in row.values()) == 16
    assert json.loads(out.read_text()) == result
    assert all(read_verdicts(items_path(out)).values())


def test_what_was_not_answered_is_wrong_and_counted(folder, tmp_path):
    answers = right_answers()
    del answers["P_0000"]
    answers |= {"P_0001": "", "P_0002": None, "P_0003": "<|channel|>analysis<|message|>It could be", "elsewhere": "x"}
    result = score("omnimedvqa", folder, write_predictions(tmp_path / "p.jsonl", answers), "letter")
    assert (result["n"], result["correct"], result["failed"]) == (16, 12, 4)
    assert result["failed_reasons"] == {"empty answer": 1, "no final channel": 1, "no prediction": 1, "no text": 1}
    assert result["predictions"]["missing"] == 1
    assert result["predictions"]["unknown_ids"] == 1


def test_errors_of_an_engine_are_wrong_even_with_the_right_text(folder, tmp_path):
    path = write_predictions(tmp_path / "p.jsonl", right_answers())
    with AnswerFile(path) as file:
        file.write([Prediction(question_id="P_0005", text=OPTIONS[1], error="timeout")])
    result = score("omnimedvqa", folder, path, "official-qa")
    assert (result["correct"], result["failed"], result["predictions"]["repeated_ids"]) == (15, 1, 1)


def test_strict_accuracy_leaves_similarity_out(folder, tmp_path):
    letters = {f"P_{i:04d}": "ABCD"[i % 4] for i in range(8)} | {f"P_{i:04d}": OPTIONS[i % 4] for i in range(8, 16)}
    result = score("omnimedvqa", folder, write_predictions(tmp_path / "p.jsonl", letters), "letter")
    assert (result["accuracy"], result["unparsed"], result["accuracy_strict"]) == (1.0, 8, 0.5)


def test_option_losses_are_scored_under_the_likelihood_protocols(folder, tmp_path):
    path = tmp_path / "p.jsonl"
    with AnswerFile(path) as file:
        for i in range(16):
            losses = [2.0, 2.0, 2.0, 2.0]
            losses[i % 4 if i < 12 else (i + 1) % 4] = 1.0
            file.write([Prediction(question_id=f"P_{i:04d}", option_losses=tuple(losses))])
    result = score("omnimedvqa", folder, path, "official-prefix")
    assert (result["correct"], result["failed"]) == (12, 0)
    with pytest.raises(UsageError, match="unknown"):
        score("omnimedvqa", folder, path, "official")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"not json\n", "line 1 is not JSON"),
        (b'{"question_id": "P_0000"}\n', "line 1: expected"),
        (b'{"question_id": "x", "prediction": "A"}\n', "none of its 1 question ids"),
        (b'{"question_id": "P_0000", "prediction": "\xff"}\n', "not UTF-8"),
        (b'{"question_id": "P_0000", "option_losses": "low"}\n', "list of numbers"),
    ],
)
def test_bad_prediction_files_are_refused_by_name(folder, tmp_path, content, words):
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=words):
        score("omnimedvqa", folder, path)


def test_an_answer_file_cut_in_two_continues_with_whole_lines(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_bytes(b'{"question_id": "a", "prediction": "x"}\n{"question_id": "b", "predic')
    with AnswerFile(path) as file:
        file.write([Prediction(question_id="c", text="ä")])
    answers, repeated = read_predictions(path, resuming=True)
    assert (sorted(answers), repeated) == (["a", "c"], 0)
    assert answers["c"].text == "ä"


def test_questions_without_options_refuse_letters(tmp_path):
    table = tmp_path / "questions.csv"
    table.write_text("question_id,question,answer\na,Q?,yes\n")
    predictions = write_predictions(tmp_path / "p.jsonl", {"a": "Yes."})
    with pytest.raises(UsageError, match="short-answer"):
        score("table", table, predictions, "letter")
    result = score("table", table, predictions)
    assert (result["protocol"], result["accuracy"]) == ("short-answer", 1.0)
    assert "token_f1" in result


def test_the_interval_covers_the_truth_as_often_as_it_says():
    random = np.random.default_rng(1)
    covered = 0
    for _ in range(60):
        correct = (random.random(300) < 0.7).astype(float)
        low, high = bootstrap_interval(correct, [str(i) for i in range(300)])
        covered += low <= 0.7 <= high
    # 95 % of 60 is 57; fewer than 51 has a probability below 0.001 under the binomial law
    assert covered >= 51


def test_questions_about_one_picture_widen_the_interval():
    correct = np.repeat([1.0, 0.0] * 10, 10)
    apart = bootstrap_interval(correct, [str(i) for i in range(200)])
    together = bootstrap_interval(correct, [str(i // 10) for i in range(200)])
    assert together[1] - together[0] > 2 * (apart[1] - apart[0])
    assert together == bootstrap_interval(correct, [str(i // 10) for i in range(200)])


@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 1), (3, 3), (1, 9), (9, 1), (2, 5)])
def test_mcnemar_equals_counting_all_coin_tosses(first, second):
    n = first + second
    extreme = abs(first - second)
    outcomes = [abs(n - 2 * sum(toss)) for toss in product((0, 1), repeat=n)]
    assert mcnemar_exact(first, second) == pytest.approx(sum(o >= extreme for o in outcomes) / len(outcomes))


def test_the_paired_test_needs_the_same_questions():
    assert compare({"a": True, "b": False}, {"a": True, "b": True})["difference"] == 0.5
    with pytest.raises(UsageError, match="differ in 2 questions"):
        compare({"a": True}, {"b": True})


def test_mcnemar_stays_finite_on_the_whole_benchmark():
    assert 0 < mcnemar_exact(22_000, 22_400) < 0.1


def test_two_runs_are_compared_question_by_question(folder, tmp_path):
    first, second = right_answers(), right_answers()
    first |= {f"P_{i:04d}": "none of these" for i in range(6)}
    second |= {"P_0007": "none of these"}
    score("phantoms", folder, write_predictions(tmp_path / "a.jsonl", first), "official-qa", tmp_path / "a.json")
    result = score(
        "phantoms", folder, write_predictions(tmp_path / "b.jsonl", second), "official-qa", tmp_path / "b.json",
        against=tmp_path / "a.json",
    )  # fmt: skip
    wrong_first = 16 - json.loads((tmp_path / "a.json").read_text())["correct"]
    assert result["paired"] == {
        "against": "a.json", "n": 16, "only_first": 1, "only_second": wrong_first,
        "difference": round((wrong_first - 1) / 16, 6), "p_value": mcnemar_exact(1, wrong_first),
    }  # fmt: skip
    assert json.loads((tmp_path / "b.json").read_text())["paired"] == result["paired"]


def test_reasons_keep_a_server_s_address_and_no_file_s_name(folder):
    task = load_task("phantoms", folder)
    answers = {
        "P_0000": Prediction(question_id="P_0000", error="question P_0000: a/b.png is gone"),
        "P_0001": Prediction(question_id="P_0001", error="http://h:1/v1/chat/completions failed 5 times"),
    }
    reasons = score_answers(task, answers, "letter")[0]["failed_reasons"]
    assert {"question ...: FILE is gone", "http://h:1/v1/chat/completions failed 5 times"} <= reasons.keys()


def test_what_became_no_verdict_is_said(folder, tmp_path, capsys):
    path = write_predictions(tmp_path / "p.jsonl", {"P_0000": "none", "P_0001": "none", "Q": "of another set"})
    path.write_text(path.read_text() + '{"question_id": "P_0001", "prediction": ""}\n')
    score_command("phantoms", folder, path, tmp_path / "a.json", protocol="official-qa")
    said = capsys.readouterr().out
    assert (
        "without an answer, so wrong: 15; answers to questions that the set lacks (e.g. Q): 1; ids given again" in said
    )
    path = write_predictions(tmp_path / "q.jsonl", right_answers())
    score_command("phantoms", folder, path, tmp_path / "b.json", protocol="official-qa")
    assert "(official-qa); written to" in capsys.readouterr().out


def test_runs_of_another_protocol_or_other_questions_are_not_compared(folder, tmp_path):
    path = write_predictions(tmp_path / "p.jsonl", right_answers())
    score("phantoms", folder, path, "official-qa", tmp_path / "a.json")
    with pytest.raises(UsageError, match=r"a\.json has protocol official-qa, this run letter"):
        score("phantoms", folder, path, "letter", against=tmp_path / "a.json")
    fewer = omnimedvqa_folder(tmp_path / "fewer", num_questions=12)
    with pytest.raises(UsageError, match=r"differ in 4 questions \(16 and 12 in all\).*made with --limit\?"):
        score("phantoms", fewer, path, "official-qa", against=tmp_path / "a.json")
    with pytest.raises(UsageError, match="is no JSON; give the file that medgpt eval"):
        score("phantoms", folder, path, "official-qa", against=path)


def test_an_answer_with_a_line_separator_is_compared_like_any_other(folder, tmp_path):
    path = write_predictions(tmp_path / "p.jsonl", right_answers() | {"P_0003": "Blood\u2028test"})
    first = score("phantoms", folder, path, "official-qa", tmp_path / "a.json")
    second = score("phantoms", folder, path, "official-qa", against=tmp_path / "a.json")
    assert (second["n"], second["correct"]) == (first["n"], first["correct"])
