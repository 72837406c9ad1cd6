"""Energon folders: WebDataset tars beside ``.nv-meta``, whose field map says which part of a sample is what.

Only the description is read. A folder that wants its own Python code to make samples (``sample_loader.py``) is refused:
data never runs code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.data.picture import PictureError, read_capped, resolve_inside
from megatron_medgpt.ingest.sources.archive import KEY, row_of_parts, samples
from megatron_medgpt.ingest.sources.place import expand, name_of
from megatron_medgpt.ingest.sources.record import Inline
from megatron_medgpt.ingest.sources.tables import parse_json

META = ".nv-meta"
_LARGEST_YAML_BYTES = 1 << 20
_FIELDS = {
    "Captioning": {"image": "image", "caption": "caption"},
    "VQA": {"image": "image", "context": "question", "answers": "answer"},
    "MultiChoiceVQA": {
        "image": "image", "context": "question", "choices": "options", "correct_choice_idx": "answer_idx",
    },
}  # fmt: skip
"""Sample class -> its field -> ours."""
_ACCESS = re.compile(r"([^\[\],]+)((?:\[[^\[\]]+\])*)")


def open_energon(folder: Path, split: str = "train") -> tuple[tuple[Path, ...], Callable, str]:
    """The tars of a split, a function that gives their rows, and one line on what was found.

    Raises:
        UsageError: the description is missing or malformed, wants code, or names files outside of the folder.
    """
    meta = _yaml(folder / META / "dataset.yaml")
    splits = _yaml(folder / META / "split.yaml")
    named = meta.get("sample_type", meta)
    named = named.get("__class__") if isinstance(named, dict) else None
    kind = re.sub(r"(Webdataset|Sample)$", "", named) if isinstance(named, str) else ""
    if "sample_loader" in meta:
        raise UsageError(
            f"{folder}/{META}/dataset.yaml wants its own code (sample_loader); give it a field_map, or name the tars"
        )
    if kind not in (*_FIELDS, "Crude"):
        allowed = ", ".join(f"{name}Sample" for name in (*_FIELDS, "Crude"))
        raise UsageError(f"{folder}/{META}/dataset.yaml has samples of {kind or 'no class'}; allowed: {allowed}")
    parts = splits.get("split_parts")
    if not isinstance(parts, dict) or split not in parts:
        raise UsageError(f"{folder}/{META}/split.yaml has no part {split} under split_parts")
    excluded = set(_names(folder, splits.get("exclude") or []))
    names = [name for name in _names(folder, parts[split]) if name not in excluded]
    try:
        places = tuple(resolve_inside(folder, name) for name in names)
    except PictureError as error:
        raise UsageError(f"{folder}/{META}/split.yaml names a shard that cannot be used: {error.reason}") from error
    field_map = meta.get("field_map")
    fields = _field_map(folder, kind, field_map) if kind != "Crude" and field_map is not None else None
    if kind != "Crude" and fields is None:
        raise UsageError(f"{folder}/{META}/dataset.yaml has no field_map; add one, e.g. image: jpg, caption: txt")
    remark = f"Energon {kind}, part {split} of {', '.join(map(str, parts))}: {len(places)} tars"
    shard_names = dict(zip(places, names))

    def rows() -> Iterator[dict[str, Any] | str]:
        for place in places:
            for key, found in samples(place):
                if f"{shard_names[place]}/{key}" in excluded:
                    continue
                if isinstance(found, str):
                    yield found
                else:
                    yield (
                        row_of_parts(f"{name_of(place)}/{key}", found)
                        if fields is None
                        else _mapped(f"{name_of(place)}/{key}", found, fields)
                    )

    return places, rows, remark


def _names(folder: Path, listed: Any) -> list[str]:
    # A name that is no string could be a nest of aliases, whose text is exponentially long.
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise UsageError(f"{folder}/{META}/split.yaml has something else than a list of names")
    return [name for given in listed for name in expand(given)]


def _yaml(path: Path) -> dict[str, Any]:
    try:
        content = read_capped(resolve_inside(path.parent, path.name))
        if len(content) > _LARGEST_YAML_BYTES:
            raise PictureError("file-too-large")
        found = yaml.safe_load(content)
    except PictureError as error:
        raise UsageError(f"{path} cannot be read: {error.reason}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(found, dict):
        raise UsageError(f"{path} is not a mapping")
    return found


def _field_map(folder: Path, kind: str, given: Any) -> dict[str, list[list[str]]]:
    """Our field -> ways to find it, each a part's ending and the keys inside it: ``json[answers][0]``, ``jpg,png``."""
    fields = {}
    for name, ours in _FIELDS[kind].items():
        described = given.get(name) if isinstance(given, dict) else None
        if not isinstance(described, str):
            raise UsageError(f"{folder}/{META}/dataset.yaml has no {name} in its field_map; a {kind}Sample needs it")
        ways = []
        for way in described.split(","):
            match = _ACCESS.fullmatch(way.strip())
            if match is None:
                raise UsageError(f"{folder}/{META}/dataset.yaml: field_map {name}: {described} is not ENDING[key][key]")
            ways.append([match[1], *re.findall(r"\[([^\[\]]+)\]", match[2])])
        fields[ours] = ways
    return fields


def _mapped(key: str, parts: Mapping[str, bytes], fields: Mapping[str, list[list[str]]]) -> dict[str, Any] | str:
    row: dict[str, Any] = {KEY: key}
    for name, ways in fields.items():
        for ending, *keys in ways:
            if ending in parts:
                try:
                    row[name] = _value(name, ending, parts[ending], keys)
                except UnicodeDecodeError:
                    return "not-utf-8"
                except (ValueError, KeyError, IndexError, TypeError):
                    return "field-not-found"
                break
        else:
            return "field-not-found"
    return row


def _value(name: str, ending: str, content: bytes, keys: list[str]) -> Any:
    if name == "image" and not keys:
        return Inline.of(content)
    if ending.rsplit(".", 1)[-1] == "json":
        value = parse_json(content)
        for key in keys:
            value = value[int(key)] if isinstance(value, list) else value[key]
        return value
    if keys:
        raise KeyError(ending)
    text = content.decode("utf-8").strip()
    return int(text) if name == "answer_idx" else text
