"""A small file that is there whole or as it was before."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_medgpt.config.errors import naming


def write_whole(path: Path, text: str) -> None:
    """Write a text in one move. What fails names the file, leaves it as it was, and nothing beside it."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with naming(path):
            # Names of files may hold bytes that are no UTF-8, and servers send half a surrogate pair.
            aside.write_text(text, encoding="utf-8", errors="backslashreplace")
            os.replace(aside, path)
    except BaseException:
        if aside.exists():
            aside.unlink()
        raise
