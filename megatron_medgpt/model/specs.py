"""The layer of megatron-core's transformer with our modules in its slots."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_medgpt.model.attention import RowInfo, SinkAttention
from megatron_medgpt.model.dispatch import Fp8Dispatcher
from megatron_medgpt.model.experts import GroupedExperts, Router
from megatron_medgpt.model.fused_dispatch import FusedDispatcher
from megatron_medgpt.model.packed_experts import PackedExperts
from megatron_medgpt.parallel.platform import current_device, engine_version, prepare_engine

prepare_engine()

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add  # noqa: E402  (after the engine was prepared)
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear  # noqa: E402
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules  # noqa: E402
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402
from megatron.core.transformer.identity_op import IdentityOp  # noqa: E402
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules  # noqa: E402
from megatron.core.transformer.spec_utils import ModuleSpec  # noqa: E402
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules  # noqa: E402
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules  # noqa: E402


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight``, computed in at least float32 (megatron-core's refuses sequence
    parallelism without TransformerEngine)."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_of_other_lines: Any):
        super().__init__()
        device = current_device()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight * (wide * scale)).to(hidden.dtype)


class Layer(TransformerLayer):
    """megatron-core's layer that hands the micro-batch's categories to its router, and can recompute itself.

    Recomputation is PyTorch's: megatron-core's own wants tensors only, and we hand a ``RowInfo`` through.
    """

    def __init__(self, config: Any, *args: Any, pg_collection: Any = None, **kwargs: Any):
        super().__init__(config, *args, pg_collection=pg_collection, **kwargs)
        fused = config.permute == "fused"
        if fused or config.dispatch_payload == "fp8":
            moe = self.mlp
            moe.token_dispatcher = (FusedDispatcher if fused else Fp8Dispatcher)(
                moe.num_local_experts, moe.local_expert_indices, config=config, pg_collection=pg_collection
            )

    def forward(self, hidden_states: Tensor, attention_mask: RowInfo | None = None, **kwargs: Any) -> Any:
        if self.config.recompute_layers and self.training and torch.is_grad_enabled():
            return checkpoint(
                self._run, hidden_states, attention_mask, kwargs, use_reentrant=False, preserve_rng_state=False
            )
        return self._run(hidden_states, attention_mask, kwargs)

    def _run(self, hidden_states: Tensor, rows: RowInfo | None, kwargs: dict[str, Any]) -> Any:
        self.mlp.router.rows = rows
        return super().forward(hidden_states, attention_mask=rows, **kwargs)


def block_spec(num_layers: int, *, packed_experts: bool = False) -> TransformerBlockSubmodules:
    """Submodules of a transformer block of GPT-oss layers: ``num_layers`` of them, those of one pipeline chunk.

    Args:
        packed_experts: the experts do not learn and stay in MXFP4.
    """
    layer = ModuleSpec(
        module=Layer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear, core_attention=SinkAttention, linear_proj=RowParallelLinear,
                    q_layernorm=IdentityOp, k_layernorm=IdentityOp,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=_moe_slot(PackedExperts if packed_experts else GroupedExperts),
            mlp_bda=get_bias_dropout_add,
        ),
    )  # fmt: skip
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)


def _moe_slot(experts: type) -> Any:
    """megatron-core's MoE layer with our router and experts.

    0.16 passes the process groups only to a ModuleSpec of exactly ``MoELayer``; from 0.17 the slot is a callable.
    """
    submodules = MoESubmodules(experts=experts, shared_experts=None, router=Router)
    if engine_version() >= (0, 17):
        return functools.partial(MoELayer, submodules=submodules)
    return ModuleSpec(module=MoELayer, submodules=submodules)
