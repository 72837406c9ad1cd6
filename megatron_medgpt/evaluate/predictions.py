"""Answers of a model, one JSON object per line: ``{"question_id": ..., "prediction": ...}``.

Optional keys: ``option_losses`` (likelihood protocols: mean cross-entropy per option, in nats), ``truncated`` (the
answer hit the token limit), ``error`` (the engine failed; counts as wrong). Lines are written as answers come, so a
killed evaluation continues where it stopped; a last line cut in two by a kill is dropped and answered again.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_medgpt.config.errors import UsageError, naming
from megatron_medgpt.evaluate.tasks.table import read_text


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """One answer. ``text`` is what the model wrote; ``option_losses`` stands in for it in likelihood protocols."""

    question_id: str
    text: str | None = None
    option_losses: tuple[float, ...] | None = None
    truncated: bool = False
    error: str | None = None

    def to_json(self) -> str:
        row: dict[str, Any] = {"question_id": self.question_id, "prediction": self.text}
        if self.option_losses is not None:
            row["option_losses"] = list(self.option_losses)
        if self.truncated:
            row["truncated"] = True
        if self.error is not None:
            row["error"] = self.error
        return json.dumps(row, ensure_ascii=False)


def read_predictions(path: Path | str, *, resuming: bool = False) -> tuple[dict[str, Prediction], int]:
    """All predictions by question id, and the number of ids that came more than once (the last line counts).

    ``resuming`` forgives an absent or empty file and a last line without its end.

    Raises:
        UsageError: missing, empty, not UTF-8, or a line that is not such an object; names the line.
    """
    path = Path(path)
    if resuming and not path.exists():
        return {}, 0
    if path.is_dir():
        raise UsageError(f"--predictions {path} is a folder; name the JSONL file in it")
    if not path.is_file():
        raise UsageError(f"--predictions {path}: no such file")
    text = _whole_lines(path) if resuming else read_text(path)
    found: dict[str, Prediction] = {}
    repeated = 0
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        prediction = _parse(path, number, line)
        repeated += prediction.question_id in found
        found[prediction.question_id] = prediction
    if not found and not resuming:
        raise UsageError(f'{path} is empty; expected one {{"question_id": ..., "prediction": ...}} per line')
    return found, repeated


class AnswerFile:
    """Appends predictions to a JSONL file, each line flushed; opening it cuts a half-written last line away.

    Raises:
        UsageError: another process appends to it.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Half a surrogate pair, which servers do send, becomes its JSON escape.
        self._file = self.path.open("a", encoding="utf-8", errors="backslashreplace")
        try:
            self._lock()
            whole = len(_whole_lines(self.path).encode("utf-8"))
            if whole != self.path.stat().st_size:
                os.truncate(self.path, whole)
        except BaseException:
            self._file.close()
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another evaluation is writing {self.path}; let it end, or give another --out") from None
        except OSError:  # a file system without locks
            return

    def write(self, predictions: Iterable[Prediction]) -> None:
        with naming(self.path):
            for prediction in predictions:
                self._file.write(prediction.to_json() + "\n")
            self._file.flush()

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with naming(self.path):
            self._file.close()


def _whole_lines(path: Path) -> str:
    data = path.read_bytes()
    return data[: data.rfind(b"\n") + 1].decode("utf-8")


def _parse(path: Path, number: int, line: str) -> Prediction:
    where = f"{path} line {number}"
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{where} is not JSON ({error})") from None
    if not isinstance(row, Mapping) or "question_id" not in row or not ("prediction" in row or "option_losses" in row):
        raise UsageError(f'{where}: expected {{"question_id": ..., "prediction": ...}}, found {line[:80]}')
    text, losses = row.get("prediction"), row.get("option_losses")
    if losses is not None and not (isinstance(losses, list) and all(isinstance(x, (int, float)) for x in losses)):
        raise UsageError(f"{where}: option_losses must be a list of numbers, found {losses!r:.80}")
    return Prediction(
        question_id=str(row["question_id"]),
        text=None if text is None else str(text),
        option_losses=None if losses is None else tuple(float(loss) for loss in losses),
        truncated=bool(row.get("truncated", False)),
        error=None if row.get("error") is None else str(row["error"]),
    )
