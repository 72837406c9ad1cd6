"""What the tests of every op share: a derived tolerance, poisoned outputs, and mutants."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import pathlib
import sys
import tempfile
from collections.abc import Iterator
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor

_mutants = itertools.count()


def assert_as_close_as_torch(ours: Tensor, plain: Tensor, exact: Tensor, *, slack: float = 2.0) -> None:
    """``ours`` may stand ``slack`` times as far from the fp64 truth as plain torch in the same dtype.

    Args:
        ours: the kernel's result.
        plain: the reference run in the kernel's dtype.
        exact: the reference run in fp64 on the same inputs.
    """
    assert ours.shape == exact.shape == plain.shape, (ours.shape, plain.shape, exact.shape)
    assert ours.dtype == plain.dtype, (ours.dtype, plain.dtype)
    if exact.numel() == 0:
        return
    one_ulp = torch.finfo(ours.dtype).eps * exact.abs().max()
    for name, norm, floor in (
        ("worst", lambda error: error.abs().max(), one_ulp),
        ("rms", lambda error: error.square().mean().sqrt(), torch.zeros((), dtype=torch.float64)),
    ):
        got, base = norm(ours.double() - exact), norm(plain.double() - exact)
        # An rms bound of 0 would forbid the single rounding of an output that plain torch happens to hit exactly.
        limit = slack * base + (floor if name == "worst" else one_ulp / exact.numel() ** 0.5)
        assert got <= limit, f"{name} error {got:.3e}, plain torch has {base:.3e}, limit {limit:.3e}"


def assert_bitwise(ours: Tensor, expected: Tensor) -> None:
    """Equal bits (NaN equals NaN). On a mismatch: how many, and the first with its coordinates and both values."""
    assert ours.shape == expected.shape and ours.dtype == expected.dtype, (ours.shape, expected.shape, ours.dtype)
    if ours.dtype == torch.float8_e4m3fn:
        ours, expected = ours.view(torch.uint8), expected.view(torch.uint8)
    wrong = ours != expected
    if ours.is_floating_point():
        wrong &= ~(ours.isnan() & expected.isnan())
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(f"{int(wrong.sum())} differ, first at {place}: {ours[place]} != {expected[place]}")


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill what ``torch.empty`` hands out with NaN (floats) or a far too large number: unwritten output must show."""
    real = torch.empty

    def empty(*args, **kwargs) -> Tensor:
        made = real(*args, **kwargs)
        if made.dtype.is_floating_point:
            return made.fill_(float("nan"))
        return made.fill_(torch.iinfo(made.dtype).max // 2) if made.dtype != torch.bool else made.fill_(True)

    with mock.patch.object(torch, "empty", empty):
        yield


@contextlib.contextmanager
def mutant(module: ModuleType, old: str, new: str, *, package: ModuleType) -> Iterator[ModuleType]:
    """``module`` with ``old`` in its source replaced by ``new``, in its package's place while the context lasts.

    Raises:
        ValueError: ``old`` does not stand in the source exactly once.
    """
    path = pathlib.Path(module.__file__)
    source = path.read_text()
    if source.count(old) != 1:
        raise ValueError(f"{old!r} stands {source.count(old)} times in {path.name}; a mutant needs exactly one")
    name = f"{module.__name__}_mutant{next(_mutants)}"
    # Triton reads a kernel's source from its file.
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        copy = pathlib.Path(folder) / f"{path.stem}_mutant.py"
        copy.write_text(source.replace(old, new))
        spec = importlib.util.spec_from_file_location(name, copy)
        mutated = importlib.util.module_from_spec(spec)
        sys.modules[name] = mutated
        stack.callback(sys.modules.pop, name)
        spec.loader.exec_module(mutated)
        stack.enter_context(mock.patch.object(package, path.stem, mutated))
        yield mutated
