"""What one micro-batch tells attention, and the core attention that goes into megatron-core's slot."""

from __future__ import annotations

from typing import Any

import torch
from medgpt_kernels.sink_attention.op import PackedRows, sink_attention
from torch import Tensor, nn

from megatron_medgpt.model.cache import KeyValueCache
from megatron_medgpt.model.rope import cosine_sine, rotate
from megatron_medgpt.parallel.platform import current_device, prepare_engine

prepare_engine()

from megatron.core.transformer.module import MegatronModule  # noqa: E402  (after the engine was prepared)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint  # noqa: E402


def mark_slice(parameter: Tensor, dim: int) -> None:
    """Tell megatron-core that a parameter is this rank's slice along ``dim`` and no replica of another rank's."""
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    parameter.partition_dim = dim  # type: ignore[attr-defined]
    parameter.partition_stride = 1  # type: ignore[attr-defined]


class RowInfo:
    """What every layer of a stage needs to know about the rows of one micro-batch; made once per forward.

    It travels in the place of the attention mask, which megatron-core hands through untouched, so that several
    micro-batches may be in flight and none of them is global state.

    Args:
        document_ids_BS, position_ids_BS: of the whole row, also under sequence parallelism.
        inverse_frequencies, rope_factor: from ``model/rope``.
        dtype: of the model.
        attention: implementation (``medgpt_kernels.sink_attention.op.IMPLEMENTATIONS``).
        categories_T: int64 category of every token of this tensor rank's slice in the order s * B + b, for the
            routers' counts, the last of them padding; None outside of training.
        branch_ids_BS: see ``MedBatch``.
        cache: filled, or continued, by every layer (``model/cache``).
    """

    def __init__(
        self, document_ids_BS: Tensor, position_ids_BS: Tensor, *, inverse_frequencies: Tensor, rope_factor: float,
        dtype: torch.dtype, attention: str, categories_T: Tensor | None, num_targets: int,
        branch_ids_BS: Tensor | None = None, cache: KeyValueCache | None = None,
    ):  # fmt: skip
        branches = None if branch_ids_BS is None else (branch_ids_BS, position_ids_BS)
        self.packed = PackedRows(document_ids_BS, attention, branches)
        self.cache = cache
        self.cos_sin = cosine_sine(position_ids_BS, inverse_frequencies, rope_factor, dtype)
        self.categories_T = categories_T
        self.num_targets = num_targets
        self.counted_layers: set[int] = set()


class SinkAttention(MegatronModule):
    """GPT-oss's core attention: rotary positions, sinks, sliding window on every other layer, packed documents.

    One parameter, ``sinks`` (A / TP,): tensor rank r holds the sinks of its heads.

    Built by megatron-core's ``SelfAttention`` (hence the signature); ``config`` carries ``sliding_window``.
    """

    def __init__(
        self, config: Any, layer_number: int, attn_mask_type: Any = None, attention_type: str = "self",
        cp_comm_type: str | None = None, softmax_scale: float | None = None, pg_collection: Any = None,
        **_of_other_lines: Any,
    ):  # fmt: skip
        super().__init__(config=config)
        self.tp_group = pg_collection.tp
        num_heads = config.num_attention_heads // self.tp_group.size()
        self.layer_number = layer_number
        self.scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale
        # Layers 0, 2, 4, ... are windowed; layer_number counts from 1.
        self.window = config.sliding_window if layer_number % 2 == 1 else None
        device = current_device()
        self.sinks = nn.Parameter(torch.zeros(num_heads, dtype=config.params_dtype, device=device))
        mark_slice(self.sinks, 0)

    def forward(
        self, query_SBAD: Tensor, key_SBQD: Tensor, value_SBQD: Tensor, rows: RowInfo, *_: Any, **__: Any
    ) -> Tensor:
        """(S, B, A / TP, D) queries and (S, B, Q / TP, D) keys and values to (S, B, A / TP * D)."""
        query_BSAD = rotate(query_SBAD.transpose(0, 1), rows.cos_sin)
        key_BSQD = rotate(key_SBQD.transpose(0, 1), rows.cos_sin)
        cache = rows.cache
        if cache is not None and cache.filled:
            return self.continue_texts(cache, query_BSAD[0], key_BSQD[0], value_SBQD[:, 0])
        key_BQSD, value_BQSD = key_BSQD.transpose(1, 2), value_SBQD.permute(1, 2, 0, 3)
        if cache is not None:
            cache.fill(self.layer_number, self.window, key_BQSD, value_BQSD)
        out_BASD = sink_attention(
            query_BSAD.transpose(1, 2), key_BQSD, value_BQSD, self.sinks, rows.packed, window=self.window,
            scale=self.scale,
        )  # fmt: skip
        return out_BASD.permute(2, 0, 1, 3).flatten(2)

    def continue_texts(self, cache: KeyValueCache, query_SAD: Tensor, key_SQD: Tensor, value_SQD: Tensor) -> Tensor:
        """The newest tokens of the cache's sequences, rotated, and padding behind them, to (S, 1, A / TP * D)."""
        num, length = len(cache), query_SAD.shape[0]
        out_NAD = cache.attend(
            self.layer_number, self.window, query_SAD[:num], key_SQD[:num], value_SQD[:num], self.sinks,
            scale=self.scale,
        )  # fmt: skip
        out_NC = out_NAD.flatten(1)
        if length > num:
            out_NC = torch.cat([out_NC, out_NC.new_zeros(length - num, out_NC.shape[1])])
        return out_NC[:, None]

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """``sinks`` split over the tensor group on its only axis."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {"sinks": 0}, sharded_offsets,
            tp_group=self.tp_group, dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )  # fmt: skip
