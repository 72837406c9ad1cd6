"""A folder without a table: each picture with the .txt or .json of the same name beside it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_medgpt.data.picture import PictureError, read_capped, resolve_inside
from megatron_medgpt.ingest.sources.archive import is_of_the_system, json_part
from megatron_medgpt.ingest.sources.columns import IMAGE_ENDINGS

TEXT_ENDINGS = (".txt", ".json")
_OTHER_PICTURES = (".gif", ".bmp", ".webp", ".tif", ".tiff", ".avif")


def pairs_in(root: Path) -> tuple[dict[str, list[str]], int]:
    """Pictures and texts under a folder by their name without its ending, and how many files are neither.

    Links to folders are not followed.
    """
    found: dict[str, list[str]] = {}
    others = 0
    for folder, subfolders, names in os.walk(root, followlinks=False):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            path = Path(folder) / name
            known = not is_of_the_system(str(path.relative_to(root)))
            if known and path.suffix.lower() in (*IMAGE_ENDINGS, *_OTHER_PICTURES, *TEXT_ENDINGS):
                found.setdefault(str(path.with_suffix("").relative_to(root)), []).append(str(path.relative_to(root)))
            else:
                others += 1
    return found, others


def is_text(name: str) -> bool:
    return name.lower().endswith(TEXT_ENDINGS)


def pair_rows(root: Path, pairs: dict[str, list[str]]) -> Iterator[dict[str, Any] | str]:
    """One row a name: ``image`` and ``caption``, or the columns of its JSON."""
    for names in pairs.values():
        texts, pictures = [n for n in names if is_text(n)], [n for n in names if not is_text(n)]
        if not texts or not pictures:
            yield "no-text-beside-it" if pictures else "no-image"
        elif len(texts) > 1:
            yield "several-texts"
        elif len(pictures) > 1:
            yield "several-images"
        else:
            yield _row(root, pictures[0], texts[0])


def _row(root: Path, picture: str, text: str) -> dict[str, Any] | str:
    try:
        content = read_capped(resolve_inside(root, text))
    except PictureError as error:
        return error.reason
    if text.lower().endswith(".json"):
        found = json_part(content)
        return found if isinstance(found, str) else {**found, "image": picture}
    try:
        return {"image": picture, "caption": content.decode("utf-8-sig")}
    except UnicodeDecodeError:
        return "not-utf-8"
