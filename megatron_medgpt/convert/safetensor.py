"""The safetensors format, read through memory maps and written in pieces at known places.

Layout (huggingface/safetensors, README "Format"): 8 bytes little-endian length of the header, the header as JSON
(name to dtype, shape and byte range), then the tensors' bytes. The header is checked here before a byte is believed:
ranges must follow one another without gap or overlap and end where the file ends.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.convert.mapped import MappedFile, TensorSpec

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
_MAX_HEADER_BYTES = 100_000_000
_PIECE_BYTES = 1 << 20
"""Written at a time: 64 MiB at once from a mapped file take the kernel 2 to 4 times as long a byte."""

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class _Place:
    file: MappedFile
    start: int
    spec: TensorSpec


class SafetensorsFolder:
    """Every tensor of a folder's ``model.safetensors`` or of the shards that its index names.

    Raises:
        UsageError: a file is missing, truncated or not what the index says; a tensor stands twice; a dtype is not
            known.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._places: dict[str, _Place] = {}
        expected: dict[str, str] | None = None
        index = folder / INDEX
        if index.is_file():
            expected = _weight_map(index)
            files = sorted(set(expected.values()))
        elif (folder / WHOLE).is_file():
            files = [WHOLE]
        else:  # OpenAI's own release has numbered shards and no index
            files = sorted(path.name for path in folder.glob("*.safetensors"))
        if not files:
            raise UsageError(f"{folder} holds no {WHOLE}, no {INDEX} and no *.safetensors; name a model's folder")
        for name in files:
            self._open(folder / name)
        if expected is not None:
            self._compare_with_index(index, expected)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._places)

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(place.file.path for place in self._places.values()))

    def spec(self, name: str) -> TensorSpec:
        return self._places[name].spec

    def tensor(self, name: str, first: int = 0, end: int | None = None) -> Tensor:
        """The tensor, or its part ``[first, end)`` along the first axis, as a view of the file."""
        place = self._places[name]
        if not place.spec.shape or (first == 0 and end is None):
            return place.file.view(place.spec, place.start)
        start, spec = _part(place, first, end)
        return place.file.view(spec, start)

    def forget(self, name: str, first: int = 0, end: int | None = None) -> None:
        """Give back the memory of a part that was read."""
        start, spec = _part(self._places[name], first, end)
        self._places[name].file.forget(start, spec.num_bytes)

    def _open(self, path: Path) -> None:
        if not path.is_file():
            raise UsageError(f"{self.folder}: {path.name} is missing; fetch the folder again")
        file = MappedFile(path)
        for name, (spec, start) in _read_header(file).items():
            if name in self._places:
                raise UsageError(
                    f"{self.folder}: tensor {name} stands in {self._places[name].file.path.name} and in {path.name}; "
                    "remove the file that does not belong to the model"
                )
            self._places[name] = _Place(file, start, spec)

    def _compare_with_index(self, index: Path, expected: Mapping[str, str]) -> None:
        for what, names in (
            ("names tensors that no file holds", expected.keys() - self._places.keys()),
            ("does not name tensors that its files hold", self._places.keys() - expected.keys()),
            (
                "names another file than the one that holds",
                {n for n in expected if n in self._places and self._places[n].file.path.name != expected[n]},
            ),
        ):
            if names:
                raise UsageError(f"{index} {what}: {len(names)}, the first {min(names)}; fetch the folder again")


def _part(place: _Place, first: int, end: int | None) -> tuple[int, TensorSpec]:
    if not place.spec.shape:
        return place.start, place.spec
    length, *tail = place.spec.shape
    end = length if end is None else end
    spec = TensorSpec((end - first, *tail), place.spec.dtype)
    row_bytes = place.spec.num_bytes // length if length else 0
    return place.start + first * row_bytes, spec


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object without repeated keys.

    Raises:
        UsageError: it is not there, not JSON, not an object, or says something twice.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key stands twice")
        return found

    try:
        value = json.loads(path.read_bytes(), object_pairs_hook=once)
    except FileNotFoundError:
        raise UsageError(f"{path} is missing; name a model's folder") from None
    except (ValueError, OSError, RecursionError) as error:
        raise UsageError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path} holds a {type(value).__name__}; expected an object")
    return value


def _weight_map(index: Path) -> dict[str, str]:
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise UsageError(f"{index} has no weight_map; fetch the folder again")
    for name, file in found.items():
        # A file name of the index is joined to the folder's path: it must stay inside.
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise UsageError(f"{index}: tensor {name} is said to be in {file!r}, which is no file of this folder")
    return found


def _read_header(file: MappedFile) -> dict[str, tuple[TensorSpec, int]]:
    def damaged(why: str) -> UsageError:
        return UsageError(f"{file.path}: {why}; fetch the file again")

    if file.num_bytes < 8:
        raise damaged(f"{file.num_bytes} bytes are no safetensors file")
    length = int.from_bytes(file.bytes(0, 8), "little")
    if length > min(_MAX_HEADER_BYTES, file.num_bytes - 8):
        raise damaged(f"its header is said to have {length} bytes, the file has {file.num_bytes} (truncated?)")
    twice: list[str] = []

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        twice.extend(name for name, _ in pairs if len(found) != len(pairs))
        return found

    try:
        header = json.loads(file.bytes(8, 8 + length), object_pairs_hook=once)
        header.pop("__metadata__", None)
        entries = [
            (int(entry["data_offsets"][0]), int(entry["data_offsets"][1]), name, entry["dtype"], tuple(entry["shape"]))
            for name, entry in header.items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise damaged(f"its header is not readable ({error})") from None
    if twice:
        raise damaged(f"its header names {twice[0]} twice")
    found, place = {}, 0
    for start, end, name, kind, shape in sorted(entries):
        if kind not in DTYPES:
            raise UsageError(f"{file.path}: tensor {name} has dtype {kind}; readable are {', '.join(DTYPES)}")
        if not all(isinstance(size, int) and size >= 0 for size in shape):
            raise damaged(f"tensor {name} has the shape {list(shape)}")
        spec = TensorSpec(shape, DTYPES[kind])
        if start != place or end - start != spec.num_bytes:
            raise damaged(f"the bytes {start} to {end} of tensor {name} do not fit its shape or its neighbours")
        found[name] = (spec, 8 + length + start)
        place = end
    if 8 + length + place != file.num_bytes:
        raise damaged(f"it has {file.num_bytes} bytes, its header describes {8 + length + place} (truncated?)")
    return found


class SafetensorsWriter:
    """Writes a model's shards and index: every tensor's place is known first, then pieces come in any order.

    Args:
        folder: exists; nothing else writes there.
        specs: all tensors in the order of the files.
        max_shard_bytes: a shard holds at most this, or one tensor.
        stem: of the file names.
    """

    def __init__(
        self, folder: Path, specs: Mapping[str, TensorSpec], *, max_shard_bytes: int = 5_000_000_000,
        stem: str = "model",
    ) -> None:  # fmt: skip
        self._specs = dict(specs)
        self._places: dict[str, tuple[int, int]] = {}
        self._descriptors: list[int] = []
        self._weight_map: dict[str, str] = {}
        self._index = folder / f"{stem}.safetensors.index.json"
        shards = _split(self._specs, max_shard_bytes)
        for number, names in enumerate(shards):
            several = f"-{number + 1:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
            self._start(folder / f"{stem}{several}.safetensors", names)

    def write(self, name: str, first: int, tensor: Tensor) -> None:
        """Put a part that starts at row ``first`` of the tensor's first axis. Threads may call it side by side."""
        spec = self._specs[name]
        shape = tuple(tensor.shape)
        if tensor.dtype != spec.dtype or shape[1:] != spec.shape[1:] or (shape and first + shape[0] > spec.shape[0]):
            raise ValueError(f"{name}: {shape} {tensor.dtype} at row {first} does not fit {spec}")
        descriptor, start = self._places[name]
        row_bytes = spec.num_bytes // spec.shape[0] if spec.shape and spec.shape[0] else 0
        data = memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        offset = start + first * row_bytes
        while data:
            done = os.pwrite(descriptor, data[:_PIECE_BYTES], offset)
            data, offset = data[done:], offset + done

    def finish(self) -> None:
        """Flush everything to the disk and write the index where there are several shards."""
        self._close(flush=True)
        if len(set(self._weight_map.values())) > 1:
            total = sum(spec.num_bytes for spec in self._specs.values())
            content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(self._weight_map.items()))}
            self._index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def abandon(self) -> None:
        self._close(flush=False)

    def _close(self, *, flush: bool) -> None:
        while self._descriptors:
            descriptor = self._descriptors.pop()
            try:
                if flush:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _start(self, path: Path, names: Iterable[str]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        place = 0
        for name in names:
            spec = self._specs[name]
            end = place + spec.num_bytes
            header[name] = {
                "dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [place, end],
            }  # fmt: skip
            place = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._descriptors.append(descriptor)
        os.write(descriptor, len(text).to_bytes(8, "little") + text)
        os.ftruncate(descriptor, 8 + len(text) + place)
        for name in header.keys() - {"__metadata__"}:
            self._places[name] = (descriptor, 8 + len(text) + header[name]["data_offsets"][0])
            self._weight_map[name] = path.name


def _split(specs: Mapping[str, TensorSpec], max_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + spec.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.num_bytes
    return shards


def check_specs(found: Mapping[str, TensorSpec], wanted: Mapping[str, Sequence[int]], where: str) -> None:
    """Refuse tensors whose shape is not the configuration's.

    Raises:
        UsageError: naming the first such tensor.
    """
    for name, shape in wanted.items():
        if name in found and tuple(found[name].shape) != tuple(shape):
            raise UsageError(
                f"{where}: tensor {name} has shape {list(found[name].shape)}, config.json makes it {list(shape)}"
            )
