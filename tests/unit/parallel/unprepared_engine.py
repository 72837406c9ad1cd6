"""Tries, in a process of its own, what megatron-core cannot do on a CPU before it is prepared.

Prints a JSON object: for every defect, what happened.
"""

from __future__ import annotations

import json
import warnings

import torch
import torch.distributed as dist
from native_threads import names_of_threads, started_since

BEFORE = names_of_threads()
warnings.simplefilter("ignore")

from megatron.core.distributed import param_and_grad_buffer  # noqa: E402
from megatron.core.optimizer import clip_grads  # noqa: E402
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # noqa: E402
from megatron.core.tensor_parallel import ColumnParallelLinear  # noqa: E402
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker  # noqa: E402
from megatron.core.transformer.moe.moe_utils import maybe_move_tensor_to_cpu  # noqa: E402
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402


def column_parallel_linear(**options) -> ColumnParallelLinear:
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, **options)
    return ColumnParallelLinear(
        8, 8, config=config, init_method=torch.nn.init.zeros_, bias=False, tp_group=dist.group.WORLD
    )


def device_queries() -> object:
    return column_parallel_linear(perform_initialization=False).weight.device


def streams() -> object:
    names = MoEAlltoAllTokenDispatcher.__init__.__code__.co_names
    return MoEAlltoAllTokenDispatcher(1, [0], config=None) if "Stream" not in names else torch.cuda.Stream()


def factories() -> object:
    return clip_grads.get_grad_norm_fp32([torch.ones(2)], grad_stats_parallel_group=dist.group.WORLD)


def optimizer_types() -> object:
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    return clip_grads.clip_grad_by_total_norm_fp32([parameter], 1.0, 1.0)


def all_to_all_lists() -> object:
    return type(maybe_move_tensor_to_cpu(torch.ones(2, dtype=torch.int64), as_numpy=True)).__name__


def device_generator() -> object:
    return CudaRNGStatesTracker().add("model-parallel-rng", 1)


def optimizer_state() -> object:
    names = DistributedOptimizer.get_parameter_state_dp_zero.__code__.co_names
    return "no call of cuda" if "cuda" not in names else torch.zeros(1).cuda()


def collectives_of_one_rank() -> object:
    """The reduction looks at no group's size before it calls the collective."""
    start = param_and_grad_buffer._ParamAndGradBucketGroup.start_grad_sync
    calls = "dist_reduce_scatter_func" in start.__code__.co_names and "size" not in start.__code__.co_names
    return "calls" if calls else "no calls"


def network_loops() -> object:
    """Threads that poll, one for each of four groups."""
    groups = [dist.new_group([0]) for _ in range(3)]
    return f"{started_since(BEFORE).count('gloo_tcp_loop')} for {1 + len(groups)} groups"


def slice_marks() -> object:
    linear = column_parallel_linear(perform_initialization=False, use_cpu_initialization=True)
    return getattr(linear.weight, "tensor_model_parallel", "no mark")


def main() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    found = {}
    for probe in (
        device_queries, streams, factories, optimizer_types, optimizer_state, all_to_all_lists, device_generator,
        collectives_of_one_rank, network_loops, slice_marks,
    ):  # fmt: skip
        try:
            found[probe.__name__] = f"answered {probe()}"
        except (RuntimeError, AssertionError) as error:
            found[probe.__name__] = f"{type(error).__name__}: {error}"
    print(json.dumps(found))


if __name__ == "__main__":
    main()
