"""The report's figures and pictures for TensorBoard, beside the curves that training wrote.

They lie in ``tensorboard/report``, a run of their own in TensorBoard's list, which every report writes anew.
"""

from __future__ import annotations

import base64
import io
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

FOLDER = Path("tensorboard") / "report"


def write_events(
    run_dir: Path, results: Sequence[Mapping[str, Any]], cards: Sequence[Mapping[str, Any]], step: int
) -> Path | None:
    """Evaluations as scalars (``eval/TASK/PROTOCOL/...``) and the gallery as images, at the run's last step.

    A run without TensorBoard's folder is left without one: None.
    """
    folder = run_dir / FOLDER
    if not folder.parent.is_dir() or not (results or cards):
        return None
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(folder, ignore_errors=True)
    with SummaryWriter(str(folder)) as writer:
        seen: set[str] = set()
        for result in results:
            tag = f"eval/{result['task']}/{result['protocol']}"
            tag += f" ({Path(result['file']).stem})" if tag in seen else ""
            seen.add(tag)
            for name, value in scalars(result).items():
                writer.add_scalar(f"{tag}/{name}", value, step)
        for place, card in enumerate(cards):
            tag = f"gallery/{place:02d} {'right' if card['correct'] else 'wrong'}"
            writer.add_image(tag, _pixels(card["source"]), step, dataformats="HWC")
            said = f"{card['question']}  \nModel: {card['prediction']}  \nAnswer: {card['answer']}"
            writer.add_text(tag, said, step)
    return folder


def scalars(result: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an evaluation by name."""
    keys = ("accuracy", "accuracy_strict", "macro_by_modality", "token_f1", "token_recall")
    found = {key: result[key] for key in keys if isinstance(result.get(key), int | float)}
    found |= {f"control/{name}": value for name, value in (result.get("controls") or {}).items()}
    found |= {f"modality/{name}": cell["accuracy"] for name, cell in (result.get("by_modality") or {}).items()}
    text = result.get("text") or {}
    return found | {name: value for name, value in text.items() if isinstance(value, int | float)}


def _pixels(source: str) -> np.ndarray:
    """uint8 (rows, columns, 3) of a ``data:`` URL."""
    with Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))) as picture:
        return np.asarray(picture.convert("RGB"))
