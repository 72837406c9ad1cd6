"""Which records were seen before: 16 bytes a slot, at most two thirds of them in use. Ten million ids take 256 MiB (384
while the table grows), in a Python set of digests about 1 GiB."""

from __future__ import annotations

import hashlib

_BYTES = 16
_EMPTY = bytes(_BYTES)


class SeenIds:
    """A set of ids: a table of 128-bit digests with open addressing."""

    def __init__(self) -> None:
        self._mask, self._count = (1 << 16) - 1, 0
        self._table = bytearray(_BYTES * (self._mask + 1))

    def add(self, name: str) -> bool:
        """Add an id; whether it was there already."""
        new = self._put(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:_BYTES])
        if new and 3 * self._count > 2 * self._mask:
            self._grow()
        return not new

    def _put(self, digest: bytes) -> bool:
        place = int.from_bytes(digest[:8], "little") & self._mask
        while True:
            at = _BYTES * place
            held = self._table[at : at + _BYTES]
            if held == digest:
                return False
            if held == _EMPTY:
                self._table[at : at + _BYTES] = digest
                self._count += 1
                return True
            place = (place + 1) & self._mask

    def _grow(self) -> None:
        old, self._mask, self._count = self._table, 2 * self._mask + 1, 0
        self._table = bytearray(_BYTES * (self._mask + 1))
        for at in range(0, len(old), _BYTES):
            if (digest := bytes(old[at : at + _BYTES])) != _EMPTY:
                self._put(digest)
