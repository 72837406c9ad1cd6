"""Figures of every step: ``metrics.jsonl`` for programs, TensorBoard with Megatron's tag names for people."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megatron_medgpt.config.errors import naming

if TYPE_CHECKING:
    import torch

METRICS_FILE = "metrics.jsonl"

TAGS = {
    "loss": "lm loss",
    "lr": "learning-rate",
    "grad_norm": "grad-norm",
    "samples": "batch-size",
    "step_s": "iteration-time",
    "tflops_per_device": "throughput",
    "tokens_per_s": "tokens-per-second",
    "mem_gb": "mem-allocated-gb",
    "validation_loss": "lm loss validation",
    "validation_ppl": "lm loss validation ppl",
    "params_norm": "params-norm",
    "num_zeros": "num-zeros",
    "loss_scale": "loss-scale",
    "world_size": "world-size",
}
"""Key of ``metrics.jsonl`` -> TensorBoard tag (Megatron-LM ``training_log``). Other numeric keys are their own tag."""

NOT_A_SCALAR = {"step", "stage", "stage_step"}

PEAK_FLOPS = {
    "B200": 2.25e15, "GB200": 2.5e15, "B300": 2.25e15, "GB300": 2.5e15, "H200": 989e12, "GH200": 989e12,
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H20": 148e12, "H800": 989e12, "A100": 312e12,
    "A800": 312e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "A40": 150e12, "A10": 125e12,
    "RTX 6000 Ada": 364e12, "RTX 5090": 209e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip
"""Dense bf16 FLOP/s with fp32 accumulation from NVIDIA's data sheets (no sparsity), by words of the device's name."""


def peak_flops(device: torch.device | str) -> float | None:
    """Dense bf16 peak of one accelerator in FLOP/s; None where it is not known (a CPU, another accelerator)."""
    import torch

    if torch.device(device).type != "cuda":
        return None
    return peak_flops_of(torch.cuda.get_device_name(device))


def peak_flops_of(name: str) -> float | None:
    """Peak of the device with this name: the longest entry whose words it contains in order, or None."""
    words = name.replace("-", " ").split()
    for entry in sorted(PEAK_FLOPS, key=len, reverse=True):
        wanted = entry.split()
        if any(words[i : i + len(wanted)] == wanted for i in range(len(words))):
            return PEAK_FLOPS[entry]
    return None


class _ScalarWriter(Protocol):
    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class MetricsWriter:
    """Appends one JSON object per step and mirrors its numbers to TensorBoard. Used by rank 0 alone.

    Args:
        run_dir: the run folder; ``metrics.jsonl`` and ``tensorboard/`` lie in it.
        tensorboard: also write TensorBoard events.
        resume_step: the step that training resumes from. Lines of later steps, which the run is about to repeat, are
            dropped (by writing the file anew and renaming it); TensorBoard is told to drop its own.
    """

    def __init__(self, run_dir: Path | str, *, tensorboard: bool = True, resume_step: int = 0) -> None:
        self.path = Path(run_dir) / METRICS_FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        drop_steps_after(self.path, resume_step)
        self._stream = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self._events = _open_events(Path(run_dir) / "tensorboard", resume_step) if tensorboard else None

    def write(self, record: Mapping[str, Any]) -> None:
        """Write one object; it is in the file when this returns.

        Args:
            record: ``step`` (optimizer steps of the whole run), stage, loss (nats per target), lr, grad_norm, tokens
                (of the step), samples, tokens_per_s, step_s, mem_gb, and any further keys; nested mappings become
                ``a/b``. Numbers that are not finite are written as the strings "nan", "inf", "-inf", which JSON lacks.
        """
        flat = _flattened(record)
        step = flat["step"]
        with naming(self.path):
            self._stream.write(json.dumps({key: _plain(value) for key, value in flat.items()}) + "\n")
            self._stream.flush()
        if self._events is None:
            return
        for key, value in flat.items():
            if key not in NOT_A_SCALAR and isinstance(value, int | float) and not isinstance(value, bool):
                self._events.add_scalar(TAGS.get(key, key), value, step)

    def flush(self) -> None:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        with naming(self.path):
            self._stream.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """Objects of a ``metrics.jsonl`` in order; a last line that a killed process left unfinished is left out."""
    records = []
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except ValueError:
            if number >= len(lines) - 2:
                break
            raise
    return [{key: _number(value) for key, value in record.items()} for record in records]


def drop_steps_after(path: Path, step: int) -> int:
    """Remove the lines of later steps, and an unfinished last line, atomically; return how many lines went."""
    if not path.exists():
        return 0
    raw = path.read_bytes()
    lines = raw.splitlines(keepends=True)
    kept = [line for line in lines if line.endswith(b"\n") and _step_of(line) <= step]
    if len(kept) == len(lines):
        return 0
    aside = path.with_name(f".{path.name}.new")
    with open(aside, "wb") as stream:
        stream.writelines(kept)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(aside, path)
    return len(lines) - len(kept)


def _step_of(line: bytes) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def _open_events(folder: Path, resume_step: int) -> _ScalarWriter:
    # Imported where it is wanted: the readers of this file need neither torch nor TensorBoard.
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else None)


def _flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flattened(value, f"{prefix}{key}/"))
        else:
            flat[prefix + key] = value
    return flat


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _number(value: Any) -> Any:
    return float(value) if value in ("nan", "inf", "-inf") else value
