"""Whether two folders hold the same model: their names do not say, and a folder is exported anew under its old name."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

WHOLE = (".json", ".jinja", ".model", ".tiktoken")
"""Files that are read whole. The model card is none of them: results are written into it."""
HEAD_BYTES = 256
"""Of every tensor: a tensor that was trained differs there, and weights of 60 GB are told apart in a second."""


def folder_fingerprint(folder: Path) -> str:
    """Twelve hex digits of a sha256 over a Hugging Face folder: its configuration, tokenizer and templates, and names,
    shapes and beginnings of its tensors."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if not path.is_file():
            continue
        if path.suffix in WHOLE:
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            digest.update(path.read_bytes())
        elif path.suffix in (".safetensors", ".bin"):
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            for part in _beginnings(path):
                digest.update(part)
    return digest.hexdigest()[:12]


def _beginnings(path: Path) -> list[bytes]:
    """The header of a safetensors file and the first bytes of its tensors; of another file its own first bytes."""
    with path.open("rb") as stream:
        first = stream.read(8)
        if path.suffix != ".safetensors" or len(first) < 8:
            return [first + stream.read(HEAD_BYTES)]
        size = struct.unpack("<Q", first)[0]
        header = stream.read(min(size, 100_000_000))
        parts = [header]
        try:
            tensors = json.loads(header)
            starts = sorted(entry["data_offsets"] for name, entry in tensors.items() if name != "__metadata__")
        except (ValueError, KeyError, TypeError, AttributeError):
            return parts  # transformers says what is wrong with it
        for begin, end in starts:
            stream.seek(8 + size + begin)
            parts.append(stream.read(min(HEAD_BYTES, end - begin)))
        return parts
