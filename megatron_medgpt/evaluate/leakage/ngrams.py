"""Which evaluation texts stand in the training texts: shared runs of n words.

A text of fewer than n words is looked for as a whole, as one turn or as a question with its answer. What many
evaluation questions share is the benchmark's own template ("What modality is used to take this image?"); finding it in
training tells nothing, so it is counted apart and left out.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

_WORD = re.compile(r"\w+")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class Shingles:
    """Texts to 64-bit hashes of their runs of ``length`` words. Remembers the hashes of words."""

    def __init__(self, length: int) -> None:
        self.length = length
        self._words: dict[str, int] = {}
        with np.errstate(over="ignore"):
            self._powers = np.cumprod(np.full(length, _MULTIPLIER), dtype=np.uint64)

    def of(self, text: str) -> np.ndarray:
        """uint64 (number of words - length + 1,); empty for a shorter text."""
        hashes = self._hashes(text)
        if hashes.size < self.length:
            return np.empty(0, np.uint64)
        with np.errstate(over="ignore"):
            windows = np.lib.stride_tricks.sliding_window_view(hashes, self.length)
            return (windows * self._powers).sum(axis=1, dtype=np.uint64)

    def whole(self, text: str) -> int | None:
        """Hash of a text shorter than a run, as a whole; None for longer and for empty ones."""
        hashes = self._hashes(text)
        if not 0 < hashes.size < self.length:
            return None
        with np.errstate(over="ignore"):
            return int((hashes * self._powers[: hashes.size]).sum(dtype=np.uint64) ^ np.uint64(hashes.size))

    def _hashes(self, text: str) -> np.ndarray:
        known, found = self._words, []
        for word in _WORD.findall(unicodedata.normalize("NFKC", text).casefold()):
            value = known.get(word)
            if value is None:
                value = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
                known[word] = value
            found.append(value)
        return np.array(found, np.uint64)


@dataclass(frozen=True, slots=True)
class TextMatch:
    """An evaluation text and the training text that covers most of it."""

    question: int
    sample: int
    share: float
    """Of the evaluation text's own runs of words (template runs left out)."""


class TextIndex:
    """Evaluation texts (each a question with its answer), ready to be looked for in training texts.

    Args:
        texts: (question, answer) of every evaluation question.
        length: words of a run.
        template: a run in more than this many questions is the benchmark's template.
    """

    def __init__(self, texts: Sequence[tuple[str, str]], *, length: int = 8, template: int = 5) -> None:
        self._shingles = Shingles(length)
        self.best: dict[int, TextMatch] = {}
        runs, owners = [], []
        for number, (question, answer) in enumerate(texts):
            text = f"{question} {answer}"
            own = np.unique(self._shingles.of(text))
            if not own.size and (whole := self._shingles.whole(text)) is not None:
                own = np.array([whole], np.uint64)
            runs.append(own)
            owners.append(np.full(own.size, number))
        flat = np.concatenate(runs) if runs else np.empty(0, np.uint64)
        owner = np.concatenate(owners) if owners else np.empty(0, np.int64)
        order = np.argsort(flat, kind="stable")
        self._values, first, counts = np.unique(flat[order], return_index=True, return_counts=True)
        kept = counts <= template
        self.num_template_runs = int((~kept).sum())
        self._owners = [
            owner[order[start : start + count]] for start, count in zip(first[kept].tolist(), counts[kept].tolist())
        ]
        self._values = self._values[kept]
        self._own_runs = np.zeros(len(texts), np.int64)
        for owned in self._owners:
            self._own_runs[owned] += 1
        self.num_template_questions = int((self._own_runs == 0).sum())

    def look_for(self, sample: int, turns: Sequence[str]) -> list[TextMatch]:
        """Evaluation texts that share runs with one training sample; the best match of each is remembered.

        ``turns`` are the sample's texts in order; a run may reach from a question into its answer.
        """
        pairs = [f"{first} {second}" for first, second in pairwise(turns)]
        wholes = [whole for text in (*turns, *pairs) if (whole := self._shingles.whole(text)) is not None]
        runs = np.unique(np.concatenate([self._shingles.of(" ".join(turns)), np.array(wholes, np.uint64)]))
        if not self._values.size or not runs.size:
            return []
        places = np.searchsorted(self._values, runs)
        places[places == self._values.size] = 0
        hits = places[self._values[places] == runs]
        if not hits.size:
            return []
        questions, counts = np.unique(np.concatenate([self._owners[hit] for hit in hits]), return_counts=True)
        matches = [
            TextMatch(int(question), sample, float(count / self._own_runs[question]))
            for question, count in zip(questions, counts)
        ]
        for match in matches:
            known = self.best.get(match.question)
            if known is None or match.share > known.share:
                self.best[match.question] = match
        return matches
