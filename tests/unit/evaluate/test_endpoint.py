"""The OpenAI-compatible engine against a local server that fails, lies and cuts off."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from question_folders import omnimedvqa_folder

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.evaluate.engine import EndpointEngine
from megatron_medgpt.evaluate.score import score_answers
from megatron_medgpt.evaluate.tasks import load_task


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self._send(200, {"data": [{"id": "med"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        state = self.server.state
        content = body["messages"][0]["content"]
        text = content[-1]["text"]
        number = int(text.split("number ")[1].split("?")[0])
        state["requests"].append((number, body))
        status, reply = state["answer"](number, sum(n == number for n, _ in state["requests"]))
        self._send(status, reply)

    def _send(self, status, reply):
        data = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        """Quiet."""


def reply(text, *, model="med", finish="stop"):
    return 200, {"model": model, "choices": [{"message": {"content": text}, "finish_reason": finish}]}


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.state = {"requests": [], "answer": lambda number, attempt: reply("ABCD"[number % 4])}
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join(5)
    server.server_close()


@pytest.fixture
def task(tmp_path):
    return load_task("phantoms", omnimedvqa_folder(tmp_path))


def engine_of(server, **settings):
    url = f"http://127.0.0.1:{server.server_port}"
    return EndpointEngine(url, concurrency=4, pause_s=0.01, timeout_s=5, **settings)


def answered(engine, task):
    return score_answers(task, {p.question_id: p for p in engine.answers(task.questions, "letter")}, "letter")


def test_answers_come_in_order_with_picture_and_greedy_settings(server, task):
    summary, items = answered(engine_of(server, reasoning_effort="low"), task)
    assert (summary["accuracy"], summary["failed"]) == (1.0, 0)
    assert [item.question.question_id for item in items] == [q.question_id for q in task.questions]
    body = server.state["requests"][0][1]
    assert (body["temperature"], body["reasoning_effort"], body["model"]) == (0, "low", "med")
    assert body["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")


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
