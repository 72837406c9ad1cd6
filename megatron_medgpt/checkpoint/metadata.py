"""What a checkpoint's ``.metadata`` says, read without running what it says. Needs no megatron-core."""

from __future__ import annotations

import enum
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_medgpt.config.errors import UsageError

METADATA = ".metadata"
ENGINE_CONFIG = "metadata.json"
"""Names the format: ``{"sharded_backend": "torch_dist", ...}``, megatron-core's ``CheckpointingConfig``."""
COMMON = "common.pt"
OPTIMIZER_PREFIX = "optimizer.state."
"""megatron-core's key prefix of optimizer tensors in the fully reshardable format."""


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor of a checkpoint as its metadata describes it, whole (not one rank's part)."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    num_chunks: int

    @property
    def size_bytes(self) -> int:
        size = self.dtype.itemsize
        for length in self.shape:
            size *= length
        return size


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Names, shapes and dtypes of the tensors in a folder, without reading them.

    Raises:
        UsageError: the metadata names a global outside the allow-list, or holds anything but tensors.
    """
    try:
        with open(folder / METADATA, "rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
        found = metadata.state_dict_metadata
        others = [key for key, value in found.items() if type(value) is not TensorStorageMetadata]
        if not others:
            return {
                key: StoredTensor(shape=tuple(value.size), dtype=value.properties.dtype, num_chunks=len(value.chunks))
                for key, value in found.items()
            }
    except UsageError:
        raise
    except Exception as error:  # unpickling broken bytes may raise nearly anything
        raise UsageError(f"checkpoint {folder}: {METADATA} is not readable ({error}); use another checkpoint") from None
    raise UsageError(
        f"checkpoint {folder}: {sorted(others)[0]} is a pickled object; megatron-medgpt stores and reads tensors only"
    )


_ALLOWED_GLOBALS = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
            "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
        )
    ),
    *(
        ("torch.distributed.checkpoint.planner", name)
        for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
    ),
    *(("torch", str(value).removeprefix("torch.")) for value in vars(torch).values() if isinstance(value, torch.dtype)),
}  # fmt: skip
"""What ``.metadata`` needs. torch reads that file with plain pickle (pytorch#189308), where any other global runs."""


def _enum_member(kind: Any, name: Any) -> enum.Enum:
    """Stands for ``getattr``, with which Python 3.11.0 to 3.11.3 pickle members of enums; it reads nothing else."""
    if isinstance(kind, enum.EnumMeta) and name in kind.__members__:
        return kind.__members__[name]
    raise UsageError(
        f"checkpoint metadata wants to read {name} of {kind}, which no checkpoint needs: do not trust this "
        "checkpoint or where it came from"
    )


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name == "getattr" and module in ("builtins", "__builtin__"):
            return _enum_member
        if (module, name) not in _ALLOWED_GLOBALS:
            raise UsageError(
                f"checkpoint metadata wants to load {module}.{name}, which no checkpoint needs: do not trust this "
                "checkpoint or where it came from"
            )
        return super().find_class(module, name)
