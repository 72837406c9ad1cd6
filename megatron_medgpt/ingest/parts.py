"""The array form of an ingest: part i of N writes every N-th shard, and a last call joins them.

Every part reads all records (that is cheap beside decoding), so shard numbers, duplicates and bytes are those of one
ingest that does everything: the joined dataset is the same, byte for byte. The parts share one output folder; each
leaves a note (``.part-00001-of-00004.json``) when it is done.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from megatron_medgpt.config.errors import UsageError, WorkError
from megatron_medgpt.data.manifest import write_json

_NOTE = re.compile(r"\.part-(\d{5})-of-(\d{5})\.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Part ``number`` (from 0) of ``count``."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """Of ``i/N``.

        Raises:
            UsageError: not two numbers, or ``i`` is not among 0 .. N-1.
        """
        found = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text)
        part = cls(number=int(found[1]), count=int(found[2])) if found else None
        if part is None or part.number >= part.count:
            raise UsageError(f"--part {text}; give the number of the part and how many there are, --part 0/4 to 3/4")
        return part

    @property
    def name(self) -> str:
        return f"part-{self.number:05d}-of-{self.count:05d}"

    def refuse_other_counts(self, out: Path) -> None:
        """
        Raises:
            UsageError: parts of an array of another length were written there; together they could never be merged.
        """
        others = {int(found[2]) for path in out.glob(".part-*.json") if (found := _NOTE.fullmatch(path.name))}
        if others - {self.count}:
            raise UsageError(
                f"--part {self.number}/{self.count}: {out} holds parts of {max(others - {self.count})}; give all "
                "the same count, or another --out"
            )

    def writes(self, shard: int) -> bool:
        return shard % self.count == self.number


def leave_note(out: Path, part: Part, *, num_shards: int, settings_digest: str) -> None:
    """Say that a part is done; ``num_shards`` is the number of shards of all parts together."""
    write_json(out / f".{part.name}.json", {"num_shards": num_shards, "settings": settings_digest})


def shards_of_parts(out: Path, settings_digest: str) -> int:
    """Number of shards that the parts have written together.

    Raises:
        UsageError: there are no parts, or parts of several arrays or of other settings.
        WorkError: parts are missing; the message names them.
    """
    notes = {found: path for path in out.glob(".part-*.json") if (found := _NOTE.fullmatch(path.name))}
    counts = {int(found[2]) for found in notes}
    if not counts:
        raise UsageError(f"{out} holds no finished part; run every part first, e.g. --part 0/4 to --part 3/4")
    if len(counts) > 1:
        raise UsageError(
            f"{out} holds parts of arrays of {sorted(counts)}; remove it and run every part with one count"
        )
    (count,) = counts
    missing = sorted(set(range(count)) - {int(found[1]) for found in notes})
    if missing:
        raise WorkError(
            f"{len(missing)} of {count} parts are not done; run these again, then --merge: "
            f"{','.join(map(str, missing))}"
        )
    said = [json.loads(path.read_text(encoding="utf-8")) for path in notes.values()]
    if any(note != {"num_shards": said[0]["num_shards"], "settings": settings_digest} for note in said):
        raise UsageError(f"{out} holds parts of other inputs or settings; remove it or choose another --out")
    return said[0]["num_shards"]
