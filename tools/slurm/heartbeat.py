"""Do the nodes of a job still hear each other? The first node and every other one exchange a datagram now and then.

A cut link is silent: collectives wait for their timeout, and their message does not say who is missing. Nor does that
of a rendezvous to which a node never came. A datagram holds the sender's name and nothing else. Standard library only.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable

INTERVAL_S = 2.0


class Heartbeat:
    """Runs in two threads until ``close``; calls ``lost`` once with the names of the peers that fell silent and the
    seconds since they were heard, or ``never_came`` once with the names of those that were expected but never heard.

    The first node hears all others and answers each; another node hears the first, and expects nobody: its rendezvous
    cannot begin without the first node.
    """

    def __init__(
        self, *, name: str, first: bool, address: str, port: int, deadline_s: float,
        lost: Callable[[dict[str, float]], None], never_came: Callable[[list[str]], None] | None = None,
        expected: tuple[str, ...] = (), meet_s: float = 300.0,
    ):  # fmt: skip
        self.name, self.first, self.address, self.port = name, first, address, port
        self.deadline_s, self.lost = deadline_s, lost
        self.expected, self.meet_s, self.never_came = set(expected) - {name}, meet_s, never_came
        self.heard: dict[str, float] = {}
        self._closed = threading.Event()
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        if first:
            self._socket.bind(("", port))
        self._socket.settimeout(INTERVAL_S)
        self._threads = [threading.Thread(target=t, daemon=True) for t in (self._listen, self._watch)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._closed.set()
        self._socket.close()

    def _listen(self) -> None:
        while not self._closed.is_set():
            try:
                packet, sender = self._socket.recvfrom(256)
                name = packet.decode(errors="replace")
                self.expected.discard(name)
                self.heard[f"{name} ({sender[0]})"] = time.monotonic()
                if self.first:
                    self._socket.sendto(self.name.encode(), sender)
            except OSError:  # nothing came in time, or the link is gone: the watch decides
                self._closed.wait(0.1)

    def _watch(self) -> None:
        begun = time.monotonic()
        while not self._closed.wait(INTERVAL_S / 2):
            if not self.first:
                self._speak()
            now = time.monotonic()
            if self.expected and self.never_came is not None and now - begun > self.meet_s:
                self.never_came(sorted(self.expected))
                return
            silent = {peer: now - at for peer, at in list(self.heard.items()) if now - at > self.deadline_s}
            if silent:
                self.lost(silent)
                return

    def _speak(self) -> None:
        try:
            self._socket.sendto(self.name.encode(), (self.address, self.port))
        except OSError:  # no route just now
            return
