"""From YAML and ``section.field=value`` overrides to a checked ``RunConfig``, and back.

YAML is read with ``yaml.safe_load``; overrides use OmegaConf's dotted grammar. A stage is addressed by its name or its
number: ``stages.align.num_steps=10``, ``stages.0.num_steps=10``. Unknown names are refused with the nearest known one.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_medgpt.config import presets
from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.config.schema import RunConfig

T = TypeVar("T")

PRESETS: dict[str, dict[str, Any]] = {"model.language": presets.LANGUAGE, "model.vision": presets.VISION}
"""Sections that may be given by the name of a preset, or by ``preset: NAME`` and the fields that differ."""


class _UniqueKeyLoader(yaml.SafeLoader):
    """Reads ``1e-3`` as a number (YAML 1.2, as people write it) and refuses a key that stands twice."""


_UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf)$|^\.(nan|NaN)$"),
    list("-+0123456789."),
)


def _mapping_without_duplicates(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    twice = sorted({str(key) for key in keys if keys.count(key) > 1})
    if twice:
        raise UsageError(f"{node.start_mark.name}: {twice[0]!r} is given twice in one section; keep one of them")
    return loader.construct_mapping(node, deep=True)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        UsageError: the file is missing, a folder, not readable, not UTF-8 or not YAML, or holds something else than a
            mapping.
    """
    try:
        with path.open(encoding="utf-8") as stream:
            tree = yaml.load(stream, Loader=_UniqueKeyLoader)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except IsADirectoryError:
        inside = path / "run.yaml"
        raise UsageError(f"{path} is a folder; name {inside if inside.is_file() else 'a YAML file'}") from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(tree, dict):
        raise UsageError(f"{path}: expected sections such as 'model:' and 'stages:', found {type(tree).__name__}")
    return tree


def load_run(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read ``run.yaml`` and apply overrides. Raises UsageError in one line for anything unknown or impossible."""
    return run_from_tree(read_yaml(path), overrides)


def override_run(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """A new config with ``section.field=value`` overrides applied."""
    return run_from_tree(to_tree(config), overrides) if overrides else config


def run_from_tree(tree: Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """Build a ``RunConfig`` from a plain tree, strictly."""
    merged = apply_overrides(dict(tree), overrides)
    return build(RunConfig, merged, where="")


def build(kind: type[T], tree: Any, where: str) -> T:
    """Build a config dataclass from plain data; ``where`` is the dotted path that errors name."""
    if not isinstance(tree, Mapping):
        raise UsageError(f"{where or 'the configuration'} is {tree!r}; expected a section with fields")
    hints = typing.get_type_hints(kind)
    known = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for name in tree:
        if name not in known:
            raise UsageError(f"unknown field {_join(where, str(name))!r}{_nearest(str(name), known)}")
    missing = [
        f.name
        for f in dataclasses.fields(kind)  # type: ignore[arg-type]
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in tree
    ]
    if missing:
        raise UsageError(f"{_join(where, missing[0])} is missing; it has no default")
    return kind(**{name: _convert(hints[name], value, _join(where, name)) for name, value in tree.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, where)
    if where in PRESETS:
        return _from_preset(hint, value, where)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where)  # type: ignore[arg-type]
    if origin is Literal:
        if value not in args:
            raise UsageError(f"{where}={value!r}; allowed: {', '.join(map(str, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise UsageError(f"{where}={value!r}; expected a list")
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_convert(args[0], item, f"{where}.{i}") for i, item in enumerate(value))
        if len(value) != len(args):
            raise UsageError(f"{where} has {len(value)} entries; expected {len(args)}")
        return tuple(_convert(a, item, f"{where}.{i}") for i, (a, item) in enumerate(zip(args, value)))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise UsageError(f"{where}={value!r}; expected name: value pairs")
        return {str(k): _convert(args[1], v, _join(where, str(k))) for k, v in value.items()}
    return _scalar(hint, value, where)


def _scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    raise UsageError(f"{where}={value!r} is {type(value).__name__}; expected {hint.__name__}")


def _from_preset(hint: Any, value: Any, where: str) -> Any:
    known = PRESETS[where]
    if isinstance(value, str):
        value = {"preset": value}
    if not isinstance(value, Mapping) or "preset" not in value:
        return build(hint, value, where)
    name = value["preset"]
    if name not in known:
        raise UsageError(f"{where}: unknown preset {name!r}{_nearest(str(name), known)}")
    fields = {k: v for k, v in value.items() if k != "preset"}
    return build(hint, {**to_tree(known[name]), **fields}, where)


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A plain tree with ``section.field=value`` set in it."""
    config = OmegaConf.create(tree)
    for text in overrides:
        key, equals, raw = text.partition("=")
        if not equals or not key:
            raise UsageError(f"override {text!r} is not of the form section.field=value")
        key = _stage_number(key, tree)
        try:
            value = yaml.load(raw, Loader=_UniqueKeyLoader)
            OmegaConf.update(config, key, value, merge=False, force_add=True)
        except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError, IndexError) as error:
            raise UsageError(f"override {text!r}: {str(error).splitlines()[0]}") from None
    plain = OmegaConf.to_container(config, resolve=False)
    assert isinstance(plain, dict)
    return typing.cast("dict[str, Any]", plain)


def _stage_number(key: str, tree: Mapping[str, Any]) -> str:
    """``stages.align.x`` becomes ``stages.0.x``."""
    parts = key.split(".")
    if len(parts) < 2 or parts[0] != "stages":
        return key
    names = [str(stage.get("name")) for stage in tree.get("stages") or () if isinstance(stage, Mapping)]
    if parts[1].isdigit() and parts[1] not in names:
        if int(parts[1]) >= len(names):
            there = ", ".join(f"{number} ({name})" for number, name in enumerate(names)) or "none"
            raise UsageError(f"override {key!r}: no stage has the number {parts[1]}; there are {there}")
        return key
    if parts[1] not in names:
        raise UsageError(f"override {key!r}: no stage named {parts[1]!r}{_nearest(parts[1], names)}")
    return ".".join(["stages", str(names.index(parts[1])), *parts[2:]])


def _nearest(name: str, known: typing.Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; allowed: {', '.join(known)}"


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def to_tree(config: Any) -> Any:
    """Plain dicts and lists of a config dataclass (what YAML and JSON can hold)."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_tree(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, (list, tuple)):
        return [to_tree(item) for item in config]
    if isinstance(config, Mapping):
        return {k: to_tree(v) for k, v in config.items()}
    return config


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration; ``load_run`` of this text gives an equal config."""
    return yaml.safe_dump(to_tree(config), sort_keys=False, allow_unicode=True, width=120)
