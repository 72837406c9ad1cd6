"""The OpenAI-compatible engine against a local server that fails, lies and cuts off."""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from question_folders import omnimedvqa_folder

from megatron_medgpt.config.errors import UsageError, WorkError
from megatron_medgpt.evaluate import engine
from megatron_medgpt.evaluate.command import run_eval
from megatron_medgpt.evaluate.engine import EndpointEngine
from megatron_medgpt.evaluate.predictions import read_predictions
from megatron_medgpt.evaluate.score import score_answers
from megatron_medgpt.evaluate.tasks import load_task


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self._send(self.server.state.get("models", 200), {"data": [{"id": "med"} | self.server.state.get("entry", {})]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        state = self.server.state
        content = body["messages"][0]["content"]
        if isinstance(content, str):  # the word that a server is asked for whose first answers failed
            state["words"] = state.get("words", 0) + 1
            self._send(*state.get("word", reply("Hello")), whole=True)
            return
        text = content[-1]["text"]
        number = int(text.split("number ")[1].split("?")[0])
        state["requests"].append((number, body))
        status, answer = state["answer"](number, sum(n == number for n, _ in state["requests"]))
        self._send(status, answer)

    def _send(self, status, reply, *, whole=False):
        data = json.dumps(reply, indent=1).encode()  # of several lines, as a proxy's page is
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if whole:
            self.wfile.write(data)
            return
        if self.server.state.get("reset"):
            self.wfile.flush()
            time.sleep(0.02)  # the client has the headers
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            # Closed with a reset and not a farewell, by the number: the handler's files would keep the socket open.
            os.close(self.connection.detach())
            return
        self.wfile.write(data[: self.server.state.get("cut")])

    def log_message(self, *_):
        """Quiet."""


def reply(text, *, model="med", finish="stop"):
    return 200, {"model": model, "choices": [{"message": {"content": text}, "finish_reason": finish}]}


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.state = {"requests": [], "answer": lambda number, attempt: reply("ABCD"[number % 4])}
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join(5)
    server.server_close()


@pytest.fixture
def task(tmp_path):
    return load_task("phantoms", omnimedvqa_folder(tmp_path))


def wait_until(true) -> bool:
    """In a thread of the server."""
    end = time.monotonic() + 120
    while not true() and time.monotonic() < end:
        time.sleep(0.005)
    return true()


def engine_of(server, **settings):
    url = f"http://127.0.0.1:{server.server_port}"
    return EndpointEngine(url, concurrency=4, pause_s=0.01, timeout_s=300, **settings)


def answered(asked, task):
    return score_answers(task, {p.question_id: p for p in asked.answers(task.questions, "letter")}, "letter")


def test_answers_come_in_order_with_picture_and_greedy_settings(server, task):
    summary, items = answered(engine_of(server, reasoning_effort="low"), task)
    assert (summary["accuracy"], summary["failed"]) == (1.0, 0)
    assert [item.question.question_id for item in items] == [q.question_id for q in task.questions]
    body = server.state["requests"][0][1]
    assert (body["temperature"], body["reasoning_effort"], body["model"]) == (0, "low", "med")
    assert body["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")


def test_vllm_is_asked_for_harmonys_marks_and_a_thought_that_was_cut_off_is_no_answer(server, task):
    thought = "<|channel|>analysis<|message|>It may well be A"
    server.state["entry"] = {"owned_by": "vllm"}
    server.state["answer"] = lambda number, attempt: reply(
        f"{thought}<|end|><|start|>assistant<|channel|>final<|message|>{'ABCD'[number % 4]}" if number else thought
    )
    summary, items = answered(engine_of(server), task)
    assert (summary["correct"], summary["failed"], items[0].error) == (15, 1, "no final channel")
    assert {body["skip_special_tokens"] for _, body in server.state["requests"]} == {False}


def test_other_servers_are_sent_nothing_that_is_vllms_own(server, task):
    answered(engine_of(server), task)
    assert not any("skip_special_tokens" in body for _, body in server.state["requests"])


def test_passing_faults_are_tried_again_and_lasting_ones_count_as_wrong(server, task):
    def answer(number, attempt):
        if number == 1:
            return 503, {}
        if number == 2 and attempt == 1:
            return 429, {}
        if number == 3:
            return 400, {"error": "too long"}
        return reply("ABCD"[number % 4])

    server.state["answer"] = answer
    summary, items = answered(engine_of(server, retries=2), task)
    assert (summary["correct"], summary["failed"]) == (14, 2)
    assert sum(number == 1 for number, _ in server.state["requests"]) == 3
    assert sum(number == 3 for number, _ in server.state["requests"]) == 1
    assert "400" in items[3].error


def test_an_answer_by_another_model_or_in_another_form_is_a_failure(server, task):
    server.state["answer"] = lambda number, attempt: reply("A", model="gpt") if number else (200, {"choices": []})
    summary, _ = answered(engine_of(server, retries=0), task)
    assert summary["failed"] == 16


@pytest.mark.parametrize(("status", "fault"), [(200, {"cut": 10}), (503, {"reset": True})])
def test_a_reply_that_is_cut_off_is_tried_again_and_counts_as_a_failure(server, task, status, fault):
    asked = engine_of(server, retries=1)
    server.state |= {"answer": lambda number, attempt: (status, reply("A")[1]), **fault}
    summary, items = answered(asked, task)
    assert (summary["n"], summary["failed"]) == (16, 16)
    assert len(server.state["requests"]) == 32
    assert "failed 2 times" in items[0].error


def test_content_in_another_form_than_text_is_a_failure(server, task):
    server.state["answer"] = lambda number, attempt: reply([{"type": "text", "text": "A"}] if number else None)
    summary, items = answered(engine_of(server, retries=0), task)
    assert (summary["n"], summary["failed"]) == (16, 16)
    assert "content is a list" in items[1].error


def test_a_server_that_is_gone_ends_the_run_and_keeps_the_answers(server, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "GIVE_UP_AFTER", 10)
    folder = omnimedvqa_folder(tmp_path / "many", num_questions=60)
    out = tmp_path / "result.json"

    def kept():
        return sum(path.read_bytes().count(b"\n") for path in tmp_path.glob("*.answers.jsonl"))

    def goes(number, attempt):
        if number >= 30 and not wait_until(lambda: kept() >= 30):
            raise AssertionError("what was answered was not kept")
        return reply("ABCD"[number % 4]) if number < 30 else (503, {})

    server.state["answer"] = goes
    with pytest.raises(WorkError, match=r"10 questions in a row failed, the last with: .*503"):
        run_eval("phantoms", folder, out, engine=engine_of(server, retries=0), protocol="letter", controls=())
    assert not out.exists()
    server.state["answer"] = lambda number, attempt: reply("ABCD"[number % 4])
    summary, _ = run_eval("phantoms", folder, out, engine=engine_of(server), protocol="letter", controls=())
    assert (summary["n"], summary["accuracy"], summary["failed"]) == (60, 1.0, 0)
    times = Counter(number for number, _ in server.state["requests"])
    assert all(times[number] == 1 for number in range(30))


@pytest.mark.parametrize(
    "word", [(503, {"error": "loading\nthe model"}), (200, {"choices": []}), reply("Hello", model="gpt-other")]
)
def test_a_server_that_answers_nothing_from_the_first_question_is_asked_no_more(server, tmp_path, word, caplog):
    folder = omnimedvqa_folder(tmp_path / "many", num_questions=60)
    server.state |= {"answer": lambda number, attempt: (503, {"error": "loading\nthe model"}), "word": word}
    out = tmp_path / "result.json"
    with pytest.raises(WorkError, match=r"the first 8 questions all failed, the last with: .*HTTP 503.*") as refused:
        run_eval("phantoms", folder, out, engine=engine_of(server, retries=1), protocol="letter", controls=())
    assert "\n" not in str(refused.value)
    assert "HTTP 503" in caplog.text and len(caplog.records) == 1, "said at the first fault, and once"
    assert (server.state["words"], out.exists()) == (1, False)
    assert len({number for number, _ in server.state["requests"]}) <= 8 + 2 * 4, "no more than were under way"
    server.state["answer"] = lambda number, attempt: reply("ABCD"[number % 4])
    summary, _ = run_eval("phantoms", folder, out, engine=engine_of(server), protocol="letter", controls=())
    assert (summary["n"], summary["accuracy"], summary["failed"]) == (60, 1.0, 0)


def test_questions_that_a_server_refuses_which_answers_others_are_counted_though_they_come_first(server, tmp_path):
    folder = omnimedvqa_folder(tmp_path / "many", num_questions=40)

    def answer(number, attempt):
        if number < 12:
            return 400, {"error": "long"}
        wait_until(lambda: "words" in server.state)  # no answer overtakes a refusal
        return reply("ABCD"[number % 4])

    server.state["answer"] = answer
    summary, _ = run_eval(
        "phantoms", folder, tmp_path / "o.json", engine=engine_of(server), protocol="letter", controls=()
    )
    assert (summary["n"], summary["correct"], summary["failed"], server.state["words"]) == (40, 28, 12, 1)


def test_a_server_that_is_not_there_is_said_at_once(server):
    port = server.server_port
    server.shutdown()
    server.server_close()
    with pytest.raises(WorkError, match=r"/models failed: \[Errno 111\] Connection refused; is the server up"):
        EndpointEngine(f"http://127.0.0.1:{port}", pause_s=60)


def test_a_server_that_wants_a_key_is_said_with_where_to_give_it(server):
    server.state["models"] = 401
    with pytest.raises(WorkError, match=r"/models failed: HTTP 401: .*; give the server's key in MEDGPT_API_KEY"):
        engine_of(server)


def test_a_server_that_answers_as_another_model_ends_the_run_and_is_named(server, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "GIVE_UP_AFTER", 5)
    folder = omnimedvqa_folder(tmp_path / "many", num_questions=8)
    server.state["answer"] = lambda number, attempt: reply("A", model="gpt-other")
    with pytest.raises(WorkError, match="asked for med, answered by gpt-other"):
        run_eval("phantoms", folder, tmp_path / "o.json", engine=engine_of(server), protocol="letter", controls=())


def test_broken_pictures_are_not_the_servers_fault(server, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "GIVE_UP_AFTER", 2)
    folder = omnimedvqa_folder(tmp_path / "broken", num_questions=8)
    for picture in (folder / "Images").iterdir():
        picture.write_bytes(b"<html>")
    summary, _ = answered(engine_of(server), load_task("phantoms", folder))
    assert (summary["n"], summary["failed"]) == (8, 8)
    assert server.state["requests"] == []


def test_half_a_surrogate_pair_is_kept_as_its_escape(server, tmp_path):
    folder = omnimedvqa_folder(tmp_path / "set", num_questions=2)
    server.state["answer"] = lambda number, attempt: reply("A \ud83d")
    run_eval("phantoms", folder, tmp_path / "o.json", engine=engine_of(server), protocol="letter", controls=())
    again, _ = read_predictions(tmp_path / "o.answers.jsonl")
    assert {answer.text for answer in again.values()} == {"A \ud83d"}


def test_cut_answers_are_counted(server, task):
    server.state["answer"] = lambda number, attempt: reply("ABCD"[number % 4], finish="length")
    summary, _ = answered(engine_of(server), task)
    assert summary["truncated"] == 16


def test_a_server_without_the_model_is_refused(server):
    with pytest.raises(UsageError, match="serves med, not other"):
        engine_of(server, model="other")
    with pytest.raises(UsageError, match="http"):
        EndpointEngine("ftp://x")


def test_likelihood_protocols_are_refused(server, task):
    with pytest.raises(UsageError, match="token losses"):
        next(engine_of(server).answers(task.questions, "official-prefix"))
