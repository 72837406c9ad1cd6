"""Which module a parameter belongs to, and which modules a stage does not train."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.config.schema import MODULES

_WRAPPERS = re.compile(r"^(?:module\.)+")
_MODULE_OF = (
    (re.compile(r"^vision\."), "encoder"),
    (re.compile(r"^projector\."), "projector"),
    (re.compile(r"^language\.decoder\.layers\.\d+\.mlp\.router\."), "router"),
    (re.compile(r"^language\.decoder\.layers\.\d+\.mlp\.experts\."), "experts"),
    (re.compile(r"^language\."), "language"),
)


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """Parameters of one module on this rank."""

    trainable: int = 0
    frozen: int = 0


def module_of(parameter_name: str) -> str:
    """Name of the module (see ``config.schema.MODULES``) that a parameter of ``MedGPT`` belongs to.

    ``parameter_name`` is as ``named_parameters`` gives it, with or without the ``module.`` of engine wrappers.

    Raises:
        ValueError: the name belongs to no module. A parameter that nobody owns would learn or freeze unnoticed.
    """
    name = _WRAPPERS.sub("", parameter_name)
    for pattern, module in _MODULE_OF:
        if pattern.match(name):
            return module
    raise ValueError(f"parameter {parameter_name!r} belongs to none of {', '.join(MODULES)}")


def freeze(model: nn.Module | Sequence[nn.Module], frozen: Iterable[str]) -> dict[str, ParameterCount]:
    """Turn gradients off for the named modules and on for all others.

    To be called before the model is wrapped for data parallelism, which gives gradient buffers to what requires
    gradients then. A frozen encoder records no graph: neither its parameters nor the pixels need gradients.

    Args:
        model: ``MedGPT``, or one for each virtual chunk of this pipeline rank.
        frozen: names out of ``MODULES``.

    Returns:
        Counts of this rank's parameters for every module, modules this rank does not hold included.

    Raises:
        UsageError: a name that is not a module.
    """
    frozen = tuple(frozen)
    for name in frozen:
        if name not in MODULES:
            raise UsageError(f"frozen names {name!r}; allowed: {', '.join(MODULES)}")
    for _, parameter, module in _owned(model):
        parameter.requires_grad_(module not in frozen)
    return count_parameters(model)


def count_parameters(model: nn.Module | Sequence[nn.Module]) -> dict[str, ParameterCount]:
    """Trainable and frozen parameters of every module on this rank."""
    trainable, frozen = dict.fromkeys(MODULES, 0), dict.fromkeys(MODULES, 0)
    for _, parameter, module in _owned(model):
        (trainable if parameter.requires_grad else frozen)[module] += parameter.numel()
    return {module: ParameterCount(trainable[module], frozen[module]) for module in MODULES}


def _owned(model: nn.Module | Sequence[nn.Module]):
    for chunk in [model] if isinstance(model, nn.Module) else model:
        for name, parameter in chunk.named_parameters():
            yield name, parameter, module_of(name)
