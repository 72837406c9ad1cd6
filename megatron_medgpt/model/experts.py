"""The mixture of experts: GPT-oss's router and all experts of a rank in one module.

Weights keep GPT-oss's own layout (interleaved gate and up columns), so that they can be compared with the public
checkpoint without a move. The tensor degree of experts is 1: every rank of the expert group holds whole experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from medgpt_kernels.grouped_mlp import op, reference, routed, routed_reference
from medgpt_kernels.grouped_mlp.packed import PackedStack
from medgpt_kernels.mx.op import check_scales
from medgpt_kernels.mx.reference import MX_BLOCK
from medgpt_kernels.route import op as route
from torch import Tensor, nn

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.model.attention import RowInfo, mark_slice
from megatron_medgpt.model.fused_dispatch import RoutedRows
from megatron_medgpt.parallel.platform import current_device, prepare_engine
from megatron_medgpt.types import MODALITIES

prepare_engine()

from megatron.core.dist_checkpointing.mapping import ShardedTensor  # noqa: E402  (after the engine was prepared)
from megatron.core.transformer.module import MegatronModule  # noqa: E402
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler  # noqa: E402
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint  # noqa: E402

NUM_CATEGORIES = 2 * len(MODALITIES)
"""Token categories of the load counts: ``2 * modality`` for text, ``2 * modality + 1`` for image tokens."""
PADDING_CATEGORY = NUM_CATEGORIES


class Router(MegatronModule):
    """Chooses the experts of every token: linear with bias, top-k of the logits, softmax over the chosen.

    Parameters: ``weight`` (E, H), ``bias`` (E,), replicated; their gradients are summed over the tensor group because
    each tensor rank routes its own slice of the sequence.

    Options of the config: ``router_balance_coefficient`` (Switch loss, Fedus et al. 2021, equation 4, over the tokens
    of the micro-batch) and ``router_z_coefficient`` (Zoph et al. 2022, equation 5). Both are weighted by the
    micro-batch's number of targets, so that after the division by the global count of targets they enter the loss as
    means over micro-batches. Padding counts in neither.
    """

    def __init__(self, config: Any, pg_collection: Any = None, **_of_other_lines: Any):
        super().__init__(config=config)
        self.tp_group = pg_collection.tp
        self.layer_number: int | None = None
        self.rows: RowInfo | None = None
        device = current_device()
        made = {"dtype": config.params_dtype, "device": device}
        self.weight = nn.Parameter(torch.empty(config.num_moe_experts, config.hidden_size, **made))
        self.bias = nn.Parameter(torch.empty(config.num_moe_experts, **made))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        counts = torch.zeros(NUM_CATEGORIES + 1, config.num_moe_experts, dtype=torch.int64, device=device)
        self.register_buffer("load_CE", counts, persistent=False)
        self.register_buffer("losses", torch.zeros(2, dtype=torch.float64, device=device), persistent=False)

    def set_layer_number(self, layer_number: int) -> None:
        self.layer_number = layer_number

    def forward(self, hidden_SBH: Tensor, padding_mask: Any = None, *_: Any) -> tuple[Tensor, Tensor]:
        """Weights (T, E) with zeros at experts that were not chosen, and the choice (T, E) bool: what megatron-core's
        dispatchers take. For ``FusedDispatcher`` weights (T, K) of at least float32 and choices (T, K) int32."""
        logits_TE, weights_TK, experts_TK = self.choose(hidden_SBH.flatten(0, -2))
        if self.training:
            self._count(experts_TK)
        if self.training and torch.is_grad_enabled():
            weights_TK = self._with_losses(weights_TK, logits_TE, experts_TK)
        if self.config.permute == "fused":
            return weights_TK, experts_TK.to(torch.int32)
        weights_TE = torch.zeros_like(logits_TE).scatter(1, experts_TK, weights_TK)
        return weights_TE.to(hidden_SBH.dtype), _chosen(logits_TE, experts_TK)

    def choose(self, hidden_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (T, E), weights of the chosen experts (T, K) and which they are (T, K), the largest logit first; the
        floats at least float32."""
        top_k = self.config.moe_router_topk
        if self.config.router_kernel == "fused":
            made = route.route(
                hidden_TH.contiguous(), self.weight, self.bias, top_k=top_k,
                implementation="triton" if hidden_TH.is_cuda else "reference",
            )  # fmt: skip
            return made.logits_TE, made.weights_TK, made.experts_TK.long()
        logits_TE = F.linear(hidden_TH, self.weight, self.bias)
        logits_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
        top_TK, experts_TK = logits_TE.topk(top_k, dim=-1)
        return logits_TE, torch.softmax(top_TK, dim=-1), experts_TK

    def _count(self, experts_TK: Tensor) -> None:
        """Add to the load counts, on the device, once per micro-batch of training (a recomputed forward does not count
        again)."""
        rows = self.rows
        if rows is None or self.layer_number in rows.counted_layers:
            return
        rows.counted_layers.add(self.layer_number)
        places = (rows.categories_T[:, None] * self.config.num_moe_experts + experts_TK).flatten()
        self.load_CE.view(-1).scatter_add_(0, places, torch.ones_like(places))

    def _with_losses(self, weights: Tensor, logits_TE: Tensor, experts_TK: Tensor) -> Tensor:
        balance, z = self.config.router_balance_coefficient, self.config.router_z_coefficient
        if not (balance or z) or self.rows is None:
            return weights
        kept_T = (self.rows.categories_T != PADDING_CATEGORY).to(logits_TE.dtype)
        load_E = (_chosen(logits_TE, experts_TK) * kept_T[:, None]).sum(0)
        totals = torch.cat([load_E, kept_T.sum()[None]])
        if self.tp_group.size() > 1:
            dist.all_reduce(totals, group=self.tp_group)
        num_tokens = totals[-1].clamp(min=1)
        share_E = totals[:-1] / (num_tokens * self.config.moe_router_topk)
        balance_loss, z_loss = route.losses(
            logits_TE, share_E, kept_T, num_tokens,
            implementation="triton" if self.config.router_kernel == "fused" and logits_TE.is_cuda else "reference",
        )  # fmt: skip
        with torch.no_grad():
            self.losses += torch.stack([balance_loss, z_loss]).double() * self.rows.num_targets
        added = (balance * balance_loss + z * z_loss) * self.rows.num_targets
        return MoEAuxLossAutoScaler.apply(weights, added)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Whole tensors, replicated over tensor and data ranks."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {}, sharded_offsets,
            tp_group=self.tp_group, dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )  # fmt: skip


def _chosen(logits_TE: Tensor, experts_TK: Tensor) -> Tensor:
    return torch.zeros_like(logits_TE, dtype=torch.bool).scatter_(1, experts_TK.long(), True)


def packed_shapes(num_experts: int, hidden: int, inner: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the packed tensors by their names: the axis that a product sums over lies in blocks of 32."""
    found = {}
    for stack, outputs, inputs in (("gate_up", 2 * inner, hidden), ("down", hidden, inner)):
        found[f"{stack}_blocks"] = (num_experts, outputs, inputs // MX_BLOCK, MX_BLOCK // 2)
        found[f"{stack}_scales"] = (num_experts, outputs, inputs // MX_BLOCK)
    return found


class RankExperts(MegatronModule):
    """What stands in megatron-core's slot for the experts of one rank, in whatever form they keep their weights.

    Each parameter carries the marks by which megatron-core reduces and counts it: ``allreduce=False`` (over the expert
    data group, also with one expert rank), and ``tensor_model_parallel=True``, without which tensor ranks above 0 would
    be taken for duplicates in the gradient norm.
    """

    def __init__(
        self, num_local_experts: int, config: Any, pg_collection: Any = None, submodules: Any = None,
        **_of_other_lines: Any,
    ):  # fmt: skip
        super().__init__(config=config)
        self.ep_group, self.expert_data_group = pg_collection.ep, pg_collection.expt_dp
        self.num_local_experts = num_local_experts
        self.make_weights(config.hidden_size, config.moe_ffn_hidden_size)
        for parameter in self.parameters():
            parameter.allreduce = False
            mark_slice(parameter, 0)

    def make_weights(self, hidden: int, inner: int) -> None:
        """Make the parameters and buffers, E first in each, and choose what multiplies them."""
        raise NotImplementedError

    def empty_parameter(self, *shape: int) -> nn.Parameter:
        made = {"dtype": self.config.params_dtype, "device": current_device()}
        return nn.Parameter(torch.empty(self.num_local_experts, *shape, **made))


class GroupedExperts(RankExperts):
    """The experts of one rank, in GPT-oss's layout.

    Parameters, E the experts of this rank: ``gate_up`` (E, H, 2F) and ``gate_up_bias`` (E, 2F) with columns g0 u0 g1 u1
    ..., ``down`` (E, F, H), ``down_bias`` (E, H).
    """

    def make_weights(self, hidden: int, inner: int) -> None:
        self.gate_up = self.empty_parameter(hidden, 2 * inner)
        self.gate_up_bias = self.empty_parameter(2 * inner)
        self.down = self.empty_parameter(inner, hidden)
        self.down_bias = self.empty_parameter(hidden)
        direct = self.config.expert_gradients in ("auto", "direct")
        schedule = self.config.expert_schedule
        self._mlp = expert_products(self.config.experts_kernel, hidden, inner, direct=direct, schedule=schedule)

    def forward(
        self, rows_MH: Tensor, tokens_per_expert: Tensor | Sequence[int] | RoutedRows, weights_M: Tensor
    ) -> tuple[Tensor, None]:
        """Rows sorted by expert to their weighted outputs, (M, H); or ``RoutedRows``, with weights (T, K), to the sums
        of their outputs."""
        weights = (self.gate_up, self.gate_up_bias, self.down, self.down_bias)
        return self._mlp(rows_MH, tokens_per_expert, weights_M, *weights, limit=self.config.swiglu_limit), None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Split over the expert group on the axis of experts, replicated over the expert data group.

        With ``metadata["packed_experts"]``, places for the tensors of a checkpoint whose experts are MXFP4
        (``PackedExperts``); ``load_state_dict`` unpacks them.
        """
        tensors = self.state_dict(prefix="", keep_vars=True)
        if (metadata or {}).get("packed_experts"):
            num_experts, inner, hidden = tensors.pop("down").shape
            del tensors["gate_up"]
            for name, shape in packed_shapes(num_experts, hidden, inner).items():
                tensors[name] = torch.empty(shape, dtype=torch.uint8, device=self.down.device)
        return split_over_experts(tensors, prefix, sharded_offsets, self.ep_group, self.expert_data_group)

    @torch.no_grad()
    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        """Takes packed experts too, and unpacks them matrix by matrix. Exact in bf16, fp32 and fp64."""
        for name in ("gate_up", "down"):
            if f"{prefix}{name}_blocks" not in state_dict:
                continue
            packed = [state_dict.pop(f"{prefix}{name}_{leaf}") for leaf in ("blocks", "scales")]
            weight_EKN = getattr(self, name)
            try:
                check_scales(packed[1])
            except ValueError as error:
                raise UsageError(f"{prefix}{name}: {error}") from error
            stack = PackedStack(*packed, weight_EKN.dtype)
            for expert in range(self.num_local_experts):
                weight_EKN[expert].copy_(stack[expert])
            state_dict[prefix + name] = weight_EKN.detach()
        super()._load_from_state_dict(state_dict, prefix, *args)


def split_over_experts(
    tensors: Mapping[str, Tensor], prefix: str, sharded_offsets: tuple, ep_group: Any, expert_data_group: Any
) -> dict:
    """Sharded tensors whose first axis is the experts of a rank."""
    prepended = len(sharded_offsets)
    offset = (prepended, ep_group.rank(), ep_group.size())
    replica = (0, 0, expert_data_group.rank())
    return {
        prefix + name: ShardedTensor.from_rank_offsets(
            prefix + name, tensor, *sharded_offsets, offset, replica_id=replica, prepend_axis_num=prepended
        )
        for name, tensor in tensors.items()
    }


def expert_products(
    name: str, hidden: int, inner: int, *, direct: bool = False, schedule: str = "auto"
) -> Callable[..., Tensor]:
    """The function of (rows, tokens per expert, weights, gate_up, its bias, down, its bias) that a kernel name means.

    Args:
        direct: gradients of weights that have a ``main_grad`` are written there
            (``medgpt_kernels.grouped_mlp.weight_grads``); the plain reference leaves them to autograd.
        schedule: of the fused layer's products (``medgpt_kernels.grouped_mlp.launch.SCHEDULES``).

    Raises:
        UsageError: MXFP4 blocks of 32 do not fit the expert's sizes.
    """
    if name in ("auto", "grouped"):
        return partial(_counted, partial(op.grouped_mlp, direct=direct))
    if name == "reference":
        return partial(_counted, reference.grouped_mlp)
    if name == "mxfp4":
        for size, of in ((hidden, "hidden_size"), (inner, "expert_hidden_size")):
            if size % MX_BLOCK:
                raise UsageError(
                    f"kernels.experts=mxfp4 needs model.language.{of} to divide by {MX_BLOCK}; it is {size}"
                )
    return partial(routed_rows, precision=name, direct=direct, schedule=schedule)


def _counted(
    product: Callable[..., Tensor], rows_MH: Tensor, tokens_per_expert, weights_M: Tensor, *weights, limit: float
):
    return product(rows_MH, host_counts(tokens_per_expert), *weights, limit=limit) * weights_M[:, None]


def host_counts(tokens_per_expert: Tensor | Sequence[int]) -> list[int]:
    """Rows of each expert as numbers of the host."""
    return tokens_per_expert.tolist() if torch.is_tensor(tokens_per_expert) else list(tokens_per_expert)


def experts_of_rows(tokens_per_expert: Tensor | Sequence[int]) -> Tensor:
    """(M, 1): the expert of each row, where rows are sorted by expert. On the CPU."""
    counts_E = torch.as_tensor(tokens_per_expert).long()
    return torch.repeat_interleave(torch.arange(counts_E.numel()), counts_E)[:, None]


def routed_rows(
    rows_MH: Tensor, tokens_per_expert: Any, weights: Tensor, *weights_and_biases: Any, limit: float, precision: str,
    direct: bool = False, schedule: str = "auto",
) -> Tensor:  # fmt: skip
    """The fused layer, for sorted rows (a token of its own each) and for ``RoutedRows``. Plain PyTorch on a CPU, but
    where a schedule is named: Triton's interpreter serves it, or it is refused."""
    by_slot = isinstance(tokens_per_expert, RoutedRows)
    weights_TK = weights if by_slot else weights[:, None]
    options = {"limit": limit, "direct": direct}
    if not rows_MH.is_cuda and schedule == "auto":
        experts_TK = tokens_per_expert.experts_TK if by_slot else experts_of_rows(tokens_per_expert)
        return routed_reference.routed_mlp(
            rows_MH, weights_TK, experts_TK, *weights_and_biases, precision=precision, **options
        )
    index = row_index(rows_MH, tokens_per_expert, weights_and_biases)
    return routed.routed_mlp(
        rows_MH.contiguous(), weights_TK.float().contiguous(), index, *weights_and_biases, precision=precision,
        implementation="triton" if schedule == "auto" else schedule, **options,
    )  # fmt: skip


def row_index(rows_MH: Tensor, tokens_per_expert: Any, weights_and_biases: Sequence[Any]) -> route.RowIndex:
    """Where the rows of a rank's experts lie, made on the device."""
    if isinstance(tokens_per_expert, RoutedRows):
        num_experts = weights_and_biases[1].shape[0]
        return route.index(tokens_per_expert.experts_TK.contiguous(), num_experts, implementation="triton")
    counts_E = torch.as_tensor(tokens_per_expert).to(rows_MH.device, non_blocking=True)
    return route.index_sorted(counts_E, rows_MH.shape[0], implementation="triton")
