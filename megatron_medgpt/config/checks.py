"""Checks of single fields, which every section uses when it is built."""

from __future__ import annotations

from megatron_medgpt.config.errors import UsageError


def require(ok: bool, message: str) -> None:
    if not ok:
        raise UsageError(message)


def positive(section: str, **values: float) -> None:
    for name, value in values.items():
        require(value > 0, f"{section}.{name} is {value}; it must be greater than 0")


def not_negative(section: str, **values: float) -> None:
    for name, value in values.items():
        require(value >= 0, f"{section}.{name} is {value}; it must be 0 or more")
