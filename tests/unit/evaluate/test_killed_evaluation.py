"""An evaluation that is killed in the middle: the same command asks what is missing, and nothing twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from question_folders import omnimedvqa_folder

PROTOCOLS = ("letter", "official-qa")
NUM_QUESTIONS = 24
MOST_OF_THE_KILLED = 150


class Handler(BaseHTTPRequestHandler):
    """Answers a picture by its shade, which is its number, so that controls get other answers."""

    def do_GET(self):
        self._send({"data": [{"id": "med"}]})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        key = self.headers["Authorization"]
        with self.server.lock:
            self.server.asked[key] += 1
            number = self.server.asked[key]
        if key == "Bearer killed" and number > MOST_OF_THE_KILLED:  # so that it is killed before its end
            self.server.over.wait()
            return
        time.sleep(0.02)
        content = json.loads(body)["messages"][0]["content"]
        letter = "ABCD"[sum(part["type"] == "image_url" and len(part["image_url"]["url"]) for part in content) % 4]
        self._send({"model": "med", "choices": [{"message": {"content": letter}, "finish_reason": "stop"}]})

    def _send(self, reply):
        data = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        """Quiet."""


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.lock, server.over = Counter(), threading.Lock(), threading.Event()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.over.set()
    server.shutdown()
    thread.join(5)
    server.server_close()


def start(server, folder, out, *, key):
    """``key`` tells one process's requests from another's, whose last may reach the server after it was killed."""
    command = [
        sys.executable, "-m", "megatron_medgpt.cli", "eval", "phantoms", "--data", str(folder), "--endpoint",
        f"http://127.0.0.1:{server.server_port}", "--protocol", ",".join(PROTOCOLS), "--text-only", "--concurrency",
        "2", "--out", str(out),
    ]  # fmt: skip
    env = os.environ | {"MEDGPT_API_KEY": key}
    return subprocess.Popen(command, env=env, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process) -> None:
    try:
        output, _ = process.communicate(timeout=600)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output.decode()


def answers_in(folder) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("*.answers.jsonl"))


def test_a_killed_evaluation_goes_on_where_it_was(server, tmp_path):
    folder = omnimedvqa_folder(tmp_path / "set", num_questions=NUM_QUESTIONS, questions_per_image=1)
    process = start(server, folder, tmp_path / "killed" / "result.json", key="killed")
    deadline = time.monotonic() + 600
    while answers_in(tmp_path / "killed") < 60 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    total = len(PROTOCOLS) * 4 * NUM_QUESTIONS  # as they are, blank, shuffled, without
    kept = answers_in(tmp_path / "killed")
    assert 60 <= kept < total
    finish(start(server, folder, tmp_path / "killed" / "result.json", key="continued"))
    assert server.asked["Bearer continued"] == total - kept
    finish(start(server, folder, tmp_path / "whole" / "result.json", key="whole"))
    assert server.asked["Bearer whole"] == total
    for protocol in PROTOCOLS:
        killed, whole = (
            json.loads((tmp_path / run / f"result.{protocol}.json").read_text()) for run in ("killed", "whole")
        )
        assert killed == whole
        assert killed["n"] == NUM_QUESTIONS
        assert set(killed["controls"]) == {"blank_image", "shuffled_image", "text_only"}
        assert killed["settings"] == {
            "greedy": True, "max_new_tokens": 1024, "reasoning_effort": "the model's default"
        }  # fmt: skip
