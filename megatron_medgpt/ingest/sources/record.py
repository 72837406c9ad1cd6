"""A record in normal form, and the checks that every record passes whatever it came from."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_medgpt.data.text import IMAGE_MARK, Turn

LONGEST_TEXT = 200_000
"""Characters of one turn."""


@dataclass(frozen=True, slots=True)
class Inline:
    """An image whose bytes came with its record: from an archive, a parquet cell or a ``data:`` URI.

    Two are equal when their contents are, so that records with the same picture share it.
    """

    content: bytes = field(repr=False, compare=False)
    digest: str
    """sha256 of ``content``."""

    @classmethod
    def of(cls, content: bytes) -> Inline:
        return cls(content, hashlib.sha256(content).hexdigest())


Image = str | Inline
"""A name relative to the image root, or the bytes themselves."""


@dataclass(frozen=True, slots=True)
class Record:
    """One input record in normal form. ``problem`` is the reason why it cannot be a sample, else empty."""

    number: int
    """Place in the inputs, from 0; the only name of a record that is ever written."""
    images: tuple[Image, ...] = ()
    turns: tuple[Turn, ...] = ()
    modality: str = ""
    source_id: str = ""
    """The record's own id, or a digest of its content; only its keyed hash is written."""
    problem: str = ""
    licence: str = ""
    """As the record states it; the next three likewise."""
    body_part: str = ""
    view: str = ""
    laterality: str = ""

    @property
    def num_bytes(self) -> int:
        """Bytes of the images that travel with the record."""
        return sum(len(image.content) for image in self.images if isinstance(image, Inline))


class RecordError(Exception):
    """A record that cannot be used; the text is the reason."""


def with_marks(turns: list[Turn], num_images: int) -> list[Turn]:
    """Where no mark stands at all (PubMedVision), the images come before the first question."""
    if num_images == 0 or any(IMAGE_MARK in turn.text for turn in turns):
        return turns
    for number, turn in enumerate(turns):
        if turn.role == "user":
            marked = Turn("user", IMAGE_MARK * num_images + "\n" + turn.text)
            return [*turns[:number], marked, *turns[number + 1 :]]
    raise RecordError("no-question")


def checked_turns(turns: Sequence[Turn], num_images: int) -> tuple[Turn, ...]:
    """The turns in Unicode's composed form.

    Raises:
        RecordError: marks and images differ, no answer, characters that are none, over-long, empty.
    """
    if sum(turn.text.count(IMAGE_MARK) for turn in turns) != num_images:
        raise RecordError("marks-and-images-differ")
    if not turns or turns[-1].role != "assistant":
        raise RecordError("no-answer")
    checked = []
    for turn in turns:
        if "\x00" in turn.text or any("\ud800" <= character <= "\udfff" for character in turn.text):
            raise RecordError("bad-characters")
        if len(turn.text) > LONGEST_TEXT:
            raise RecordError("over-long")
        if turn.role == "assistant" and (not turn.text.strip() or IMAGE_MARK in turn.text):
            raise RecordError("image-in-answer" if turn.text.strip() else "empty-text")
        checked.append(Turn(turn.role, unicodedata.normalize("NFC", turn.text)))
    return tuple(checked)
