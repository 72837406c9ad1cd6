"""GPT-oss on megatron-core: the engine's configuration for our shape, and its ``GPTModel`` with our layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megatron_medgpt.config.schema import KernelConfig, LanguageConfig
from megatron_medgpt.model.attention import mark_slice
from megatron_medgpt.model.specs import block_spec
from megatron_medgpt.parallel.plan import Layout
from megatron_medgpt.parallel.platform import prepare_engine

prepare_engine()

from megatron.core.models.gpt import GPTModel  # noqa: E402  (after the engine was prepared)
from megatron.core.tensor_parallel import (  # noqa: E402
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402


@dataclass
class EngineConfig(TransformerConfig):
    """megatron-core's configuration and what our modules in its slots read."""

    sliding_window: int = 128
    swiglu_limit: float = 7.0
    experts_kernel: str = "auto"
    expert_schedule: str = "auto"
    dispatch_payload: str = "bf16"
    permute: str = "auto"
    router_kernel: str = "auto"
    expert_gradients: str = "auto"
    packed_experts: bool = False
    recompute_layers: bool = False
    router_balance_coefficient: float = 0.0
    router_z_coefficient: float = 0.0


def engine_config(
    language: LanguageConfig, *, layout: Layout, dtype: torch.dtype, kernels: KernelConfig, recompute: str = "none",
    router_balance_coefficient: float = 0.0, router_z_coefficient: float = 0.0, packed_experts: bool = False,
) -> EngineConfig:  # fmt: skip
    """Configuration of the engine for a shape in a layout. Fusions of the engine are off: each needs
    TransformerEngine or apex, or computes another function (reference: 0.16.1 fused_bias_geglu.py:424)."""
    pipelined = layout.pipeline > 1
    return EngineConfig(
        num_layers=language.num_layers, hidden_size=language.hidden_size,
        num_attention_heads=language.num_attention_heads, num_query_groups=language.num_query_groups,
        kv_channels=language.head_dim, ffn_hidden_size=language.expert_hidden_size,
        num_moe_experts=language.num_experts, moe_router_topk=language.num_experts_per_token,
        moe_ffn_hidden_size=language.expert_hidden_size, moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall", moe_aux_loss_coeff=0.0, add_bias_linear=True,
        normalization="RMSNorm", layernorm_epsilon=language.norm_eps, hidden_dropout=0.0, attention_dropout=0.0,
        bias_dropout_fusion=False, bias_activation_fusion=False, masked_softmax_fusion=False, apply_rope_fusion=False,
        gradient_accumulation_fusion=False, persist_layer_norm=False,
        tensor_model_parallel_size=layout.tensor, sequence_parallel=layout.sequence_parallel,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        pipeline_model_parallel_layout=_pipeline_layout(layout) if pipelined else None,
        expert_model_parallel_size=layout.expert, expert_tensor_parallel_size=1,
        # Interleaved on two stages, next and previous are one rank, and batched sends would be received in each other's
        # place (measured: gradients 76 times too large). Overlapped ones go over two groups.
        overlap_p2p_comm=layout.virtual_pipeline > 1, batch_p2p_comm=layout.virtual_pipeline == 1,
        params_dtype=dtype, pipeline_dtype=dtype, bf16=dtype == torch.bfloat16, fp16=False,
        perform_initialization=False, calculate_per_token_loss=True,
        sliding_window=language.sliding_window, swiglu_limit=language.swiglu_limit, experts_kernel=kernels.experts,
        dispatch_payload=kernels.dispatch, permute=kernels.permute, router_kernel=kernels.router,
        expert_gradients=kernels.expert_gradients, expert_schedule=kernels.expert_schedule,
        packed_experts=packed_experts,
        recompute_layers=recompute == "layer", router_balance_coefficient=router_balance_coefficient,
        router_z_coefficient=router_z_coefficient,
    )  # fmt: skip


def _pipeline_layout(layout: Layout) -> list[list[str]]:
    stages = [["decoder"] * num_layers for num_layers in layout.layers_per_chunk]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return stages


def build_language(config: EngineConfig, language: LanguageConfig, *, layout: Layout, chunk: int, groups: Any) -> Any:
    """``GPTModel`` of one pipeline chunk, weights not yet initialised.

    The embedding and the rotary positions are driven by ``MedGPT``, so the engine adds no positions of its own.
    """
    language = GPTModel(
        config=config,
        transformer_layer_spec=block_spec(layout.layers_per_chunk[chunk], packed_experts=config.packed_experts),
        vocab_size=language.vocab_size,
        max_sequence_length=language.max_length,
        pre_process=chunk == 0,
        post_process=chunk == len(layout.layers_per_chunk) - 1,
        parallel_output=True,
        share_embeddings_and_output_weights=False,
        position_embedding_type="none",
        pg_collection=groups,
        vp_stage=chunk // layout.pipeline if layout.virtual_pipeline > 1 else None,
    )
    _mark_slices(language)
    return language


def _mark_slices(language: Any) -> None:
    """Say which weights are slices. 0.16.1 does so only where it draws the weights itself (mended by 0.19.2), and
    without the marks ranks above 0 of the tensor group are left out of the gradient norm."""
    for module in language.modules():
        if isinstance(module, ColumnParallelLinear | VocabParallelEmbedding):
            mark_slice(module.weight, 0)
        elif isinstance(module, RowParallelLinear):
            mark_slice(module.weight, 1)
