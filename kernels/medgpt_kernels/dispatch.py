"""Choosing an implementation by name: said once in the log, never changed silently.

An op lists its implementations with a test of each: a function that answers None where the implementation serves the
call, or why it does not. ``auto`` is the first of the list that serves (ops list the fastest first). A name that cannot
serve is an error: a fallback could change arithmetic.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Callable, Mapping

import torch

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
"""What the kernels read and write."""
ANY_FLOAT = (*FLOATS, torch.float64)
"""What the references compute in too."""

log = logging.getLogger("medgpt_kernels")
_said: set[tuple[str, str, str]] = set()


def choose(op: str, name: str, serves: Mapping[str, Callable[[], str | None]]) -> str:
    """Implementation of ``op`` that ``name`` means for this call.

    Raises:
        ValueError: the name is unknown, or the implementation cannot serve the call.
    """
    if name == "auto":
        refusals = {}
        for candidate, refusal_of in serves.items():
            refusals[candidate] = refusal_of()
            if refusals[candidate] is None:
                _say_once(op, name, candidate)
                return candidate
        reasons = "; ".join(f"{candidate}: {reason}" for candidate, reason in refusals.items())
        raise ValueError(f"{op}: no implementation serves this call ({reasons})")
    if name not in serves:
        raise ValueError(f"{op}: implementation {name!r}; allowed: auto, {', '.join(serves)}")
    refusal = serves[name]()
    if refusal is not None:
        raise ValueError(f"{op}: implementation {name!r} cannot serve this call: {refusal}; set it to auto")
    _say_once(op, name, name)
    return name


def _say_once(op: str, asked: str, chosen: str) -> None:
    if (op, asked, chosen) not in _said:
        _said.add((op, asked, chosen))
        log.info("kernel %s: %s%s", op, chosen, " (auto)" if asked == "auto" else "")


def triton_refusal(*tensors: torch.Tensor) -> str | None:
    """Why Triton cannot serve tensors, or None: it needs CUDA, or its interpreter (TRITON_INTERPRET=1) on a CPU. It
    launches on the current device, whatever device its arguments are on."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    import triton

    if triton.knobs.runtime.interpret:
        return None
    for tensor in tensors:
        if not tensor.is_cuda:
            return f"a tensor is on {tensor.device.type}; Triton needs CUDA, or TRITON_INTERPRET=1 for a test on a CPU"
        if tensor.device.index != torch.cuda.current_device():
            return f"a tensor is on {tensor.device}, the current device is cuda:{torch.cuda.current_device()}"
    return None


def check(ok: bool, message: str) -> None:
    """Refuse a call before any launch.

    Raises:
        ValueError: not ``ok``.
    """
    if not ok:
        raise ValueError(message)


def check_shape(name: str, tensor: torch.Tensor, allowed: tuple[int, ...]) -> None:
    check(tensor.shape == allowed, f"{name} has shape {tuple(tensor.shape)}; allowed: {allowed}")


def check_axes(name: str, tensor: torch.Tensor, axes: str) -> None:
    """``axes``: such as ``(T, H)``."""
    check(tensor.dim() == axes.count(",") + 1, f"{name} has shape {tuple(tensor.shape)}; allowed: {axes}")


def check_contiguous(**tensors: torch.Tensor) -> None:
    """All on one device and contiguous."""
    for name, tensor in tensors.items():
        check(tensor.is_contiguous(), f"{name} is not contiguous (strides {tensor.stride()}); call .contiguous()")
    check_devices(**tensors)


def check_devices(**tensors: torch.Tensor) -> None:
    """All on one device."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        check(
            tensor.device == first.device,
            f"{name} is on {tensor.device}, {first_name} on {first.device}; all must be on one device",
        )


def check_same_dtype(first: str, **tensors: torch.Tensor) -> None:
    """All of the dtype of the one named ``first``."""
    wanted = tensors[first].dtype
    for name, tensor in tensors.items():
        check(
            tensor.dtype == wanted,
            f"{name} is {_short(tensor.dtype)}, {first} {_short(wanted)}; they must be equal",
        )


def check_positive(**numbers: float) -> None:
    for name, number in numbers.items():
        check(0 < number < math.inf, f"{name}={number}; it must be greater than 0 and finite")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_dtype(name: str, tensor: torch.Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    names = ", ".join(map(_short, allowed))
    check(tensor.dtype in allowed, f"{name} is {_short(tensor.dtype)}; allowed: {names}")
