"""Libraries that may end their process on a damaged file, in a process of their own.

One bad file must not end an ingest. A process that died, that was silent for longer than ``LONGEST_S``, or that
computed for longer than ``LONGEST_CPU_S`` without a piece of its answer, costs its file and is started anew.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import resource
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

LONGEST_S = 60.0
LONGEST_CPU_S = 10
"""Whole seconds, as the system counts them. The largest pictures that are allowed take 3."""
_LENGTH = struct.Struct("<Q")


class Died(Exception):
    """The other process died of a question, or was ended because it did not answer."""


class Apart:
    """The function ``answers(facts, content)`` of a module, called in another process.

    It starts with the first question and ends when this process does, as its input ends then.

    Args:
        most_bytes: memory that it may take beyond what it has after the module's import.
    """

    def __init__(self, module: str, most_bytes: int = 0) -> None:
        self._module, self._most_bytes = module, most_bytes
        self._running: subprocess.Popen | None = None

    @property
    def process(self) -> subprocess.Popen:
        if self._running is None:
            call = f"from {__name__} import serve; serve({self._module!r}, {self._most_bytes})"
            self._running = subprocess.Popen(
                [sys.executable, "-c", call], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                bufsize=0,
            )  # fmt: skip
        return self._running

    def ask(self, facts: dict[str, Any], content: bytes = b"") -> Iterator[bytes]:
        """What ``answers`` yields, piece by piece.

        Raises:
            Died: the process did.
        """
        process, complete = self.process, False
        try:
            with _deadline(process):
                _send(process.stdin, json.dumps(facts).encode())
                _send(process.stdin, content)
            while True:
                with _deadline(process):
                    piece = _receive(process.stdout)
                if not piece:
                    break
                yield piece[1:]
            complete = True
        except (EOFError, OSError) as error:
            raise Died from error
        finally:
            if not complete:  # the rest of its answer is none to the next question
                process.kill()
                process.wait()
                self._running = None


def serve(module: str, most_bytes: int) -> None:
    """The other process: questions from its input, answers to its output, until the input ends."""
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a library prints must not get between the answers
    questions = os.fdopen(0, "rb", buffering=0)
    answers = importlib.import_module(module).answers
    if most_bytes:
        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        most = now + most_bytes
        resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    while True:
        try:
            facts, content = json.loads(_receive(questions)), _receive(questions)
        except EOFError:
            return
        _allow_cpu()
        for piece in answers(facts, content):
            _send(out, b"+" + piece)
            _allow_cpu()
        _send(out, b"")


def _allow_cpu() -> None:
    """From now on ``LONGEST_CPU_S``; then the system ends this process."""
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    most = math.ceil(time.process_time()) + LONGEST_CPU_S
    resource.setrlimit(resource.RLIMIT_CPU, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


@contextmanager
def _deadline(process: subprocess.Popen) -> Iterator[None]:
    timer = threading.Timer(LONGEST_S, process.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _send(pipe: IO[bytes] | None, content: bytes) -> None:
    if pipe is None:
        raise EOFError
    left = memoryview(_LENGTH.pack(len(content)) + content)
    while left:
        left = left[pipe.write(left) :]


def _receive(pipe: IO[bytes] | None) -> bytes:
    (length,) = _LENGTH.unpack(_exactly(pipe, _LENGTH.size))
    return _exactly(pipe, length)


def _exactly(pipe: IO[bytes] | None, length: int) -> bytes:
    content = bytearray()
    while pipe is not None and len(content) < length:
        piece = pipe.read(min(length - len(content), 1 << 20))
        if not piece:
            raise EOFError
        content += piece
    return bytes(content)
