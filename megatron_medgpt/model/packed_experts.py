"""Experts that do not learn, kept as MXFP4: 17 bytes for 32 weights, and no other copy of them.

GPT-oss is published in MXFP4. A stage that freezes the experts needs nothing but the published bytes: 0.42 GB instead
of 1.59 GB (bf16) per layer of GPT-oss 20B. Blocks and scales have the names and layouts of
``medgpt convert hf-to-megatron --keep-packed``, and a checkpoint of such a stage holds the bytes it began with.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from medgpt_kernels.grouped_mlp import routed
from medgpt_kernels.grouped_mlp.packed import PackedStack, packed_mlp
from medgpt_kernels.mx import op as mx
from medgpt_kernels.mx.reference import MX_BLOCK
from torch import Tensor

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.model.experts import (
    RankExperts,
    host_counts,
    packed_shapes,
    routed_rows,
    row_index,
    split_over_experts,
)
from megatron_medgpt.model.fused_dispatch import RoutedRows
from megatron_medgpt.parallel.platform import current_device

LEAVES = ("blocks", "scales")
STACKS = ("gate_up", "down")


class PackedExperts(RankExperts):
    """The experts of one rank in the place of ``GroupedExperts``: the same rows in and out, no gradients of their own.

    Buffers, E the experts of this rank: ``gate_up_blocks`` (E, 2F, H / 32, 16), ``gate_up_scales`` (E, 2F, H / 32),
    ``down_blocks`` (E, H, F / 32, 16), ``down_scales`` (E, H, F / 32), all uint8. Parameters: the biases of
    ``GroupedExperts``.
    """

    def make_weights(self, hidden: int, inner: int) -> None:
        for name, shape in packed_shapes(self.num_local_experts, hidden, inner).items():
            self.register_buffer(name, torch.empty(shape, dtype=torch.uint8, device=current_device()))
        self.gate_up_bias, self.down_bias = self.empty_parameter(2 * inner), self.empty_parameter(hidden)
        self._mlp = packed_products(self.config.experts_kernel, self.config.expert_schedule)
        self._checked = False

    def forward(self, rows_MH: Tensor, tokens_per_expert: Any, weights_M: Tensor) -> tuple[Tensor, None]:
        """As ``GroupedExperts.forward``."""
        stacks = (
            PackedStack(getattr(self, f"{name}_blocks"), getattr(self, f"{name}_scales"), rows_MH.dtype)
            for name in STACKS
        )
        gate_up, down = stacks
        if not self._checked:  # once: the bytes do not change
            self._check(gate_up, down)
        out = self._mlp(
            rows_MH, tokens_per_expert, weights_M, gate_up, self.gate_up_bias, down, self.down_bias,
            limit=self.config.swiglu_limit,
        )  # fmt: skip
        return out, None

    def _check(self, *stacks: PackedStack) -> None:
        for name, stack in zip(STACKS, stacks):
            try:
                mx.check_scales(stack.scales)
                if self.config.experts_kernel == "fp8":
                    routed.check_fits(mx.mxfp4_to_e4m3(stack.blocks, stack.scales)[2])
            except ValueError as error:
                raise UsageError(f"packed experts, {name}: {error}") from error
        self._checked = True

    @torch.no_grad()
    def draw(self, std: float, generator_of: Callable[[str], torch.Generator]) -> None:
        """Random weights, rounded to MXFP4; one matrix is held unpacked at a time. Biases are left alone."""
        for name in STACKS:
            blocks, scales = getattr(self, f"{name}_blocks"), getattr(self, f"{name}_scales")
            generator = generator_of(name)
            for expert in range(self.num_local_experts):
                outputs, inputs = scales.shape[1], scales.shape[2] * MX_BLOCK
                w_KN = torch.empty(inputs, outputs, dtype=torch.float32, device=blocks.device)
                w_KN.normal_(0, std, generator=generator)
                blocks[expert], scales[expert] = mx.quantise_mxfp4(w_KN.t().contiguous(), implementation="reference")

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Split over the expert group on the axis of experts, replicated over the expert data group."""
        tensors = self.state_dict(prefix="", keep_vars=True)
        return split_over_experts(tensors, prefix, sharded_offsets, self.ep_group, self.expert_data_group)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._checked = False


def packed_products(name: str, schedule: str = "auto") -> Callable[..., Tensor]:
    """The function of (rows, tokens per expert, weights, gate_up, its bias, down, its bias) that a kernel name means
    for packed stacks. ``mxfp4``, which rounds weights that learn, would round these to themselves."""
    if name in ("auto", "grouped", "reference"):
        return _by_expert
    return partial(_routed, fp8=name == "fp8", schedule=schedule)


def _by_expert(rows_MH: Tensor, tokens_per_expert: Any, weights_M: Tensor, *experts: Any, limit: float) -> Tensor:
    return packed_mlp(rows_MH, host_counts(tokens_per_expert), *experts, limit=limit) * weights_M[:, None]


def _routed(
    rows_MH: Tensor, tokens_per_expert: Any, weights: Tensor, gate_up: PackedStack, gate_up_bias: Tensor,
    down: PackedStack, down_bias: Tensor, *, limit: float, fp8: bool, schedule: str,
) -> Tensor:  # fmt: skip
    """The fused layer, as ``experts.routed_rows``."""
    experts = (gate_up, gate_up_bias, down, down_bias)
    if not rows_MH.is_cuda and schedule == "auto":
        return routed_rows(
            rows_MH, tokens_per_expert, weights, *experts, limit=limit, precision="fp8" if fp8 else "bf16"
        )
    weights_TK = weights if isinstance(tokens_per_expert, RoutedRows) else weights[:, None]
    return routed.routed_mlp_frozen(
        rows_MH.contiguous(), weights_TK.float().contiguous(), row_index(rows_MH, tokens_per_expert, experts),
        _weights(gate_up, fp8), gate_up_bias, _weights(down, fp8), down_bias, limit=limit, implementation=schedule,
    )  # fmt: skip


def _weights(stack: PackedStack, fp8: bool) -> Any:
    """Blocks that the product decodes, or a function that makes this layer's E4M3 when a pass comes to it."""
    if fp8:
        return partial(routed.packed_to_fp8, stack.blocks, stack.scales, checked=True)
    return routed.packed(stack.blocks, stack.scales, checked=True)
