"""Ctrl-C and SIGTERM: one line that says what is kept, no traceback of anybody, and the same command goes on."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from megatron_medgpt.commands.stopping import Stopped, stoppable
from megatron_medgpt.ingest.phantom_study import make_phantoms
from megatron_medgpt.parallel.launch import run_ranks
from tests.small_data import picture, small_tokenizer

ROOT = Path(__file__).resolve().parents[2]


def _as_in_a_terminal() -> None:
    """A shell starts what it runs in the background with SIGINT ignored, and everything below inherits that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def stopped(arguments: list[str], number: int, *, when: Callable[[], bool], folder: Path) -> tuple[int, list[str]]:
    """Exit code and lines on stderr of a command that gets a signal as a terminal sends it: to its whole process
    group. What it must not wait for lasts until the end of the test, so that its end is enough."""
    command = [sys.executable, "-m", "megatron_medgpt", *arguments]
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=_as_in_a_terminal,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 600
        while not when():
            assert process.poll() is None and time.monotonic() < deadline, "it never came so far"
            time.sleep(0.01)
        os.killpg(process.pid, number)
        said = process.communicate(timeout=240)[1]
        return process.returncode, said.splitlines()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_a_command_that_is_still_being_imported_ends_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "typer.py").write_text("from pathlib import Path; import time; Path('here').touch(); time.sleep(3600)")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    code, said = stopped(["doctor"], signal.SIGINT, when=(tmp_path / "here").exists, folder=tmp_path)
    assert (code, said) == (128 + signal.SIGINT, ["medgpt: stopped by SIGINT"])


def test_a_signal_in_the_middle_of_an_import_is_heard_when_it_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch registers while it is imported aborts the process when an exception comes through it."""
    (tmp_path / "told_while_imported.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(0.3)\nWHOLE = True\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    whole = []
    with pytest.raises(Stopped, match="stopped by SIGTERM"), stoppable():
        import told_while_imported

        whole.append(told_while_imported.WHOLE)
        time.sleep(30)
    assert whole == [True]


def test_a_signal_that_a_library_takes_for_an_error_of_its_own_is_still_one() -> None:
    with pytest.raises(Stopped, match="stopped by SIGINT"), stoppable():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(30)
        except BaseException:
            raise KeyError("a key") from None
    with pytest.raises(KeyError), stoppable():
        raise KeyError("a key")


def test_a_rank_whose_python_is_still_starting_ends_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    here = tmp_path / "here"
    (tmp_path / "sitecustomize.py").write_text(
        f"import signal, time; from pathlib import Path; Path({str(here)!r}).touch()\n"
        "while signal.SIGINT not in signal.sigpending(): time.sleep(0.01)\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))

    def tell() -> None:
        while not here.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=tell, daemon=True).start()
    assert run_ranks(["doctor"], 1) == 128 + signal.SIGINT
    assert capfd.readouterr().err == "medgpt: stopped by SIGINT\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_ingest_keeps_its_whole_shards_and_continues(tmp_path: Path, number: int) -> None:
    small_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "red.png").write_bytes(picture("red", np.random.default_rng(0)))
    rows = [{"image": "red.png", "caption": f"It is red, for the {i}th time."} for i in range(9 * 2048)]
    (tmp_path / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = ["ingest", "table.jsonl", "--tokenizer", "tokenizer", "--out", "new", "--workers", "2"]
    first_note = tmp_path / "new" / ".shard-00000.json"
    code, said = stopped(line, number, when=first_note.exists, folder=tmp_path)
    assert code == 128 + number
    said = [text for text in said if not text.startswith("WARNING")]
    assert len(said) == 1, said
    assert said[0].startswith(f"medgpt: stopped by {signal.Signals(number).name}; ")
    assert "finished shards in new are kept, and the same command continues" in said[0]
    whole = {path: path.stat().st_mtime_ns for path in (tmp_path / "new").glob("shard-00000.*")}
    if number == signal.SIGTERM:
        return
    command = [sys.executable, "-m", "megatron_medgpt", *line]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=600)
    assert json.loads((tmp_path / "new" / "dataset.json").read_text())["num_samples"] == len(rows)
    assert all(path.stat().st_mtime_ns == then for path, then in whole.items()), "written anew"


class _Slow(BaseHTTPRequestHandler):
    """Answers the first question at once, and then nobody."""

    server: _SlowServer

    def do_GET(self) -> None:
        self._send({"data": [{"id": "slow"}]})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if next(self.server.asked) > 0:
            self.server.over.wait()
            return
        self._send({"model": "slow", "choices": [{"message": {"content": "A"}, "finish_reason": "stop"}]})

    def _send(self, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing: the output belongs to the test."""


class _SlowServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Slow)
        self.asked, self.over = itertools.count(), threading.Event()


@pytest.fixture
def slow_endpoint() -> Iterator[str]:
    with _SlowServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.over.set()
        server.shutdown()


def test_a_stopped_evaluation_keeps_its_answers_and_waits_for_no_server(tmp_path: Path, slow_endpoint: str) -> None:
    make_phantoms(tmp_path / "phantoms", num_train=0, num_test=16, seed=0)
    answers = tmp_path / "new.answers.jsonl"
    code, said = stopped(
        ["eval", "phantoms", "--data", "phantoms/test", "--endpoint", slow_endpoint, "--out", "new.json"],
        signal.SIGINT, when=lambda: answers.exists() and answers.stat().st_size > 0, folder=tmp_path,
    )  # fmt: skip
    assert code == 128 + signal.SIGINT
    assert [text for text in said if text.startswith("medgpt:")] == [
        "medgpt: stopped by SIGINT; the answers so far stand beside new.json, and the same command asks the rest"
    ]
    assert "Traceback" not in "\n".join(said)
    assert len(answers.read_text().splitlines()) == 1
