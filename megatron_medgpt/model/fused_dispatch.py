"""Tokens to the ranks that hold their experts and back, without sorting rows that a product can gather itself.

In one expert rank nothing moves: the experts' first product reads each token where it lies, and the weighted sum over
a token's experts is the last step of the same layer. Between ranks, tokens are put into the order of the experts once
(in FP8 if asked for, rounded in the same pass), and what arrives is not sorted again. Nothing waits for the device but
the sizes that an all-to-all between ranks wants on the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from medgpt_kernels.permute.op import combine, permute, permute_exchange_fp8
from medgpt_kernels.route import op as route
from torch import Tensor

from megatron_medgpt.parallel.platform import prepare_engine

prepare_engine()

from megatron.core.tensor_parallel import all_to_all  # noqa: E402  (after the engine was prepared)
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher  # noqa: E402


@dataclass(frozen=True, slots=True, eq=False)
class RoutedRows:
    """In the place of the counts that experts are given for sorted rows: the rows lie in any order."""

    experts_TK: Tensor
    """int32: which of this rank's experts each row goes to; its outputs are added up, weighted."""


class FusedDispatcher(MoETokenDispatcher):
    """In the place of megatron-core's all-to-all dispatcher. Takes weights and choices by slot, (T, K), from a router
    of ours, and gives the experts ``RoutedRows``."""

    def __init__(self, num_local_experts: int, local_expert_indices: list[int], config: object, pg_collection: object):
        super().__init__(config=config, pg_collection=pg_collection)
        self.num_local_experts = num_local_experts
        self.implementation = "triton" if torch.cuda.is_available() else "reference"
        self.fp8 = config.dispatch_payload == "fp8"

    def dispatch_preprocess(self, tokens: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (T, H) as they are, or in the order of the ranks and experts they go to."""
        self.shape = tokens.shape
        x_TH = tokens.reshape(-1, tokens.shape[-1])
        self.experts_TK = routing_map
        if self.ep_size == 1:
            return x_TH, probs
        num_experts = self.num_local_experts * self.ep_size
        self.index = route.index(routing_map, num_experts, tile=1, implementation=self.implementation)
        weights_M = probs.flatten().index_select(0, self.index.row_entry)
        if self.fp8:
            return x_TH, weights_M  # rounded, ordered and sent in one call
        return permute(x_TH, self.index, implementation=self.implementation), weights_M

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and weights of this rank's experts, in the order of the ranks they come from."""
        if self.ep_size == 1:
            return hidden_states, probs
        counts = self.index.counts.new_empty(self.ep_size * self.index.counts.numel())
        dist.all_gather_into_tensor(counts, self.index.counts, group=self.ep_group)
        counts_SDE = counts.view(self.ep_size, self.ep_size, self.num_local_experts)  # source, destination, expert
        rank = self.ep_group.rank()
        here_SE = counts_SDE[:, rank]
        splits = torch.stack([counts_SDE[rank].sum(1), here_SE.sum(1)])
        self.sent, self.received = splits.tolist()  # the one wait
        experts_SE = torch.arange(self.num_local_experts, dtype=torch.int32, device=here_SE.device)
        self.experts_TK = torch.repeat_interleave(
            experts_SE.repeat(self.ep_size), here_SE.flatten(), output_size=sum(self.received)
        )[:, None]
        if self.fp8:
            rows = permute_exchange_fp8(
                hidden_states, self.index, lambda payload: self._exchange(payload, self.received, self.sent),
                lambda grad, to=self.sent, of=self.received: self._exchange(grad, to, of),
                implementation=self.implementation,
            )  # fmt: skip
        else:
            rows = all_to_all(self.ep_group, hidden_states, self.received, self.sent)
        return rows, all_to_all(self.ep_group, probs, self.received, self.sent)[:, None]

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, RoutedRows, Tensor]:
        return hidden_states, RoutedRows(self.experts_TK), probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        return hidden_states

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """Weighted outputs back to the ranks of their tokens."""
        if self.ep_size == 1:
            return hidden_states
        return all_to_all(self.ep_group, hidden_states, self.sent, self.received)

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """The sum of each token's outputs, in the shape of the tokens."""
        if self.ep_size > 1:
            hidden_states = combine(hidden_states, None, self.index, implementation=self.implementation)
        return hidden_states.view(self.shape)

    @torch.no_grad()
    def _exchange(self, buffer: Tensor, to: list[int], of: list[int]) -> Tensor:
        return all_to_all(self.ep_group, buffer.contiguous(), to, of)
