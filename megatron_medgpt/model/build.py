"""The model of a plan, for training, evaluation and conversion alike."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from medgpt_kernels.grouped_mlp import launch
from torch import nn

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.config.schema import KernelConfig, ModelConfig
from megatron_medgpt.model.experts import expert_products
from megatron_medgpt.model.freeze import freeze, module_of
from megatron_medgpt.model.language import engine_config
from megatron_medgpt.model.medgpt import MedGPT, attention_on
from megatron_medgpt.model.packed_experts import PackedExperts
from megatron_medgpt.parallel.plan import Layout

ZERO = re.compile(r"(bias|sinks)$")
ONE = re.compile(r"(norm|layernorm)\.weight$")
_LAYER = re.compile(r"(?<=decoder\.layers\.)\d+")


def build_model(
    model: ModelConfig, *, layout: Layout, groups: Any, dtype: torch.dtype = torch.float32,
    kernels: KernelConfig | None = None, recompute: str = "none", router_balance_coefficient: float = 0.0,
    router_z_coefficient: float = 0.0, frozen: Sequence[str] = (), packed_experts: bool = False, seed: int = 1234,
) -> list[MedGPT]:  # fmt: skip
    """The chunks of this pipeline rank, in virtual order, with random weights.

    Replicas draw the same weights; a rank's slices depend on its place in the tensor and expert groups, so two layouts
    draw different models. To compare layouts, load one checkpoint into each.

    Args:
        dtype: of the parameters; float64 is for tests.
        recompute: ``none`` or ``layer``.
        frozen: modules that get no gradients (``config.schema.MODULES``).
        packed_experts: keep the experts, which must be frozen, in MXFP4 (``model.packed_experts``).

    Raises:
        UsageError: when the vocabulary cannot be split, or a kernel cannot serve this machine.
    """
    if packed_experts and "experts" not in frozen:
        raise UsageError("packed experts do not learn; freeze them (frozen: [experts, ...]) or do not pack them")
    if model.language.vocab_size % layout.tensor:
        raise UsageError(
            f"model.language.vocab_size={model.language.vocab_size} is not a multiple of "
            f"parallel.tensor={layout.tensor}; use a tensor degree that divides it"
        )
    kernels = kernels or KernelConfig()
    config = engine_config(
        model.language, layout=layout, dtype=dtype, kernels=kernels, recompute=recompute,
        router_balance_coefficient=router_balance_coefficient, router_z_coefficient=router_z_coefficient,
        packed_experts=packed_experts,
    )  # fmt: skip
    chunks = []
    for chunk in layout.chunks_of(groups.pp.rank()):
        part = MedGPT(model, config, layout=layout, chunk=chunk, groups=groups, kernels=kernels, seed=seed)
        initialise(part, seed=seed, std=model.language.init_std, groups=groups)
        chunks.append(part)
    freeze(chunks, frozen)
    return chunks


def check_kernels(kernels: KernelConfig, model: ModelConfig, device: torch.device) -> None:
    """Refuse kernels that cannot serve this model or this machine, before anything is made.

    Raises:
        UsageError: names the field, and what serves.
    """
    attention_on(device, kernels)
    widths = (model.language.hidden_size, model.language.expert_hidden_size)
    expert_products(kernels.experts, *widths)
    if kernels.expert_schedule != "auto":
        refusal = launch.refusal(
            kernels.expert_schedule, torch.empty(0, device=device), widths, 1 if kernels.experts == "fp8" else 2
        )
        if refusal is not None:
            raise UsageError(f"kernels.expert_schedule={kernels.expert_schedule}: {refusal}; set it to auto")


def kernel_choices(kernels: KernelConfig, device: torch.device) -> dict[str, str]:
    """What computes each slot of a model on a device, by the fields of ``kernels``: what ``auto`` means there."""
    of_auto = {
        "attention": attention_on(device, kernels), "experts": "grouped", "expert_schedule": "triton",
        "expert_gradients": "direct", "router": "reference", "permute": "engine", "projector": "reference",
        "loss": "whole",
    }  # fmt: skip
    found = {name: of_auto[name] if chosen == "auto" else chosen for name, chosen in vars(kernels).items()}
    if kernels.experts not in ("bf16", "fp8", "mxfp4"):
        del found["expert_schedule"]
    elif device.type == "cpu" and kernels.expert_schedule == "auto":
        found["expert_schedule"] = "plain PyTorch"
    return found


@torch.no_grad()
def initialise(part: MedGPT, *, seed: int, std: float, groups: Any) -> None:
    """Draw the language model's weights: normal with ``std``; biases and sinks 0, norms 1.

    Each parameter has a generator of its own, seeded by its name (with the layer's number in the whole model) and by
    the slice of it that this rank holds: ranks that hold the same slice draw the same numbers without talking.
    """
    for name, parameter in part.named_parameters():
        if module_of(name) in ("encoder", "projector"):
            continue  # they draw their own
        if ZERO.search(name):
            parameter.zero_()
        elif ONE.search(name):
            parameter.fill_(1)
        else:
            whole_name = _LAYER.sub(lambda found: str(int(found[0]) + part.first_layer), name)
            key = f"{seed}/{whole_name}/{_slice_of(parameter, groups)}"
            parameter.normal_(0, std, generator=_generator(key, parameter.device))
    for name, module in part.named_modules():
        if isinstance(module, PackedExperts):
            whole_name = _LAYER.sub(lambda found: str(int(found[0]) + part.first_layer), name)
            key = f"{seed}/{whole_name}/expert {groups.ep.rank()} of {groups.ep.size()}"
            module.draw(std, lambda stack, key=key: _generator(f"{key}/{stack}", part.inverse_frequencies.device))


def _generator(key: str, device: torch.device) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(zlib.crc32(key.encode()))


def _slice_of(parameter: nn.Parameter, groups: Any) -> str:
    if not getattr(parameter, "allreduce", True):
        return f"expert {groups.ep.rank()} of {groups.ep.size()}"
    if getattr(parameter, "tensor_model_parallel", False):
        return f"tensor {groups.tp.rank()} of {groups.tp.size()}"
    return "whole"
