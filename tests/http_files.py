"""A real HTTP server on the loopback address that serves files from memory."""

from __future__ import annotations

import math
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Files:
    """What is served, and what was asked for."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}
        self.status: dict[str, list[int]] = {}
        """Path -> status codes of the next answers, before the file itself is served."""
        self.asked: Counter[str] = Counter()
        self.most_at_once = 0
        self.together = 0
        """Answers wait until so many were asked for at once, or a minute."""
        self.wait_s = 0.0
        self.url = ""
        self._changed, self._at_once, self._answers = threading.Condition(), 0, math.inf

    def answer(self, number: float = math.inf) -> None:
        """From the start so many requests are answered, and the others wait until this is called again."""
        with self._changed:
            self._answers = number
            self._changed.notify_all()

    @contextmanager
    def counted(self, path: str):
        with self._changed:
            self.asked[path] += 1
            number = self.asked.total()
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            self._changed.notify_all()
            self._changed.wait_for(lambda: number <= self._answers)
            self._changed.wait_for(lambda: self.most_at_once >= self.together, timeout=60)
        try:
            yield
        finally:
            with self._changed:
                self._at_once -= 1


@contextmanager
def serving():
    """A running server; its ``Files`` may be changed at any time."""
    files = Files()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args) -> None:
            """Silent."""

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            with files.counted(self.path):
                if files.wait_s:
                    threading.Event().wait(files.wait_s)
                self._answer(with_body=True)

        def _answer(self, with_body: bool) -> None:
            path = self.path if self.path in files.content else self.path.partition("?")[0]
            content, code = files.content.get(path), 200
            if with_body and files.status.get(path):
                content, code = b"error", files.status[path].pop(0)
            elif content is None:
                content, code = b"<!DOCTYPE html><html>404</html>", 404
            wanted = self.headers.get("Range", "")
            self.send_response(206 if wanted and code == 200 else code)
            if wanted and code == 200:
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                end = min(int(last) if last else len(content) - 1, len(content) - 1)
                self.send_header("Content-Range", f"bytes {first}-{end}/{len(content)}")
                content = content[int(first) : end + 1]
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if with_body:
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    files.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield files
    finally:
        files.answer()
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)
