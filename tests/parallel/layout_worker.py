"""One rank of the layout comparison: trains each case of this world size and gathers what it did on rank 0.

    layout_worker.py FOLDER

FOLDER/weights is the checkpoint that every case loads by reshard (the world of one process writes it first);
FOLDER/world-N.pt receives what was found.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from layout_cases import CASES, LENGTH, MODEL, MUTANTS, NUM_ROWS, STEPPED, Case, own_part, row
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from written import written

from megatron_medgpt.model.build import build_model
from megatron_medgpt.parallel import groups
from megatron_medgpt.parallel.plan import make_layout

FINALIZE = sys.modules[finalize_model_grads.__module__]
NUM_STEPS = 20
LEARNING_RATE = 1e-3


class Trainer:
    """A case's model, wrapped for training."""

    def __init__(self, case: Case, folder: Path, *, dtype: torch.dtype, distributed_optimizer: bool):
        self.layout = make_layout(case.parallel, MODEL, case.world_size)
        self.groups = groups.build_groups(self.layout)
        self.dtype = dtype
        self.chunks = build_model(
            MODEL, layout=self.layout, groups=self.groups, dtype=dtype, recompute=case.recompute,
            router_balance_coefficient=0.01, router_z_coefficient=0.001,
        )  # fmt: skip
        draw_or_load(self.sharded_state(), folder / f"weights-{str(dtype)[6:]}")
        config = self.chunks[0].config
        config.finalize_model_grads_func = functools.partial(finalize_model_grads, pg_collection=self.groups)
        ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=distributed_optimizer)
        self.ddp = [
            DistributedDataParallel(config, ddp_config, chunk, pg_collection=self.groups) for chunk in self.chunks
        ]
        options = OptimizerConfig(
            optimizer="adam", lr=LEARNING_RATE, weight_decay=0.01, clip_grad=1.0,
            use_distributed_optimizer=distributed_optimizer, params_dtype=dtype,
        )  # fmt: skip
        self.optimizer = get_megatron_optimizer(options, self.ddp)
        config.grad_scale_func = self.optimizer.scale_loss

    def sharded_state(self) -> dict:
        """Of all chunks. Names within a chunk count its layers from 0, so each chunk needs a name of its own."""
        metadata = {"dp_cp_group": self.groups.dp_cp}
        return {
            f"chunk{number}.{name}": tensor
            for number, chunk in enumerate(self.chunks)
            for name, tensor in chunk.sharded_state_dict(metadata=metadata).items()
        }

    def gradients(self) -> float:
        """Forward and backward over the rows of one step; the sum of the losses of all rows."""
        for part in self.ddp:
            part.zero_grad_buffer()
        self.optimizer.zero_grad()
        share = LENGTH // self.layout.tensor
        first = self.groups.tp.rank() * share
        rows = range(self.groups.dp.rank(), NUM_ROWS, self.groups.dp.size())
        batches = [own_part(row(number), first=first, end=first + share, dtype=self.dtype) for number in rows]
        logged = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(batches) for _ in self.ddp] if len(self.ddp) > 1 else iter(batches),
            model=self.ddp if len(self.ddp) > 1 else self.ddp[0],
            num_microbatches=len(batches),
            seq_length=LENGTH,
            micro_batch_size=1,
            forward_only=False,
        )
        total = torch.stack(logged).sum() if logged else torch.zeros((), dtype=torch.float64)
        dist.broadcast(total, dist.get_process_group_ranks(self.groups.pp)[-1], group=self.groups.pp)
        dist.all_reduce(total, group=self.groups.dp)
        return total.item()

    def loads(self) -> torch.Tensor:
        """Tokens of every expert of every layer over all ranks, by category."""
        load = torch.zeros(MODEL.language.num_layers, *self.chunks[0].expert_load().shape[1:], dtype=torch.int64)
        for chunk in self.chunks:
            load[chunk.first_layer : chunk.first_layer + len(chunk.routers())] = chunk.expert_load()
        for group in (self.groups.pp, self.groups.dp, self.groups.tp):
            dist.all_reduce(load, group=group)
        return load


def forward_step(batches, model):
    batch = next(batches)

    def sum_of_losses(loss_BS):
        total = loss_BS.sum()
        return total, torch.tensor(batch.num_targets, dtype=torch.int), total.detach().double()

    return model(batch), sum_of_losses


def draw_or_load(state: dict, folder: Path) -> None:
    """Load the weights of ``folder`` by reshard. The world of one process makes them first."""
    parameters = {name: tensor.data for name, tensor in state.items() if isinstance(tensor, ShardedTensor)}
    if not folder.exists():
        assert dist.get_world_size() == 1
        for name, parameter in sorted(parameters.items()):
            widen(name.removeprefix("chunk0."), parameter)
        folder.mkdir()
        dist_checkpointing.save(dict(state), str(folder))
    loaded = dist_checkpointing.load(dict(state), str(folder))
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(loaded[name])


@torch.no_grad()
def widen(name: str, weight: torch.Tensor) -> None:
    """Biases and sinks away from 0, norms away from 1: what starts equal on all would hide a mistake."""
    if "norm" in name or name.endswith("bias") or name.endswith("sinks"):
        noise = torch.Generator().manual_seed(len(name) * 1000 + weight.numel())
        weight += 0.2 * torch.randn(weight.shape, generator=noise, dtype=torch.float64).to(weight.dtype)
    elif name.startswith("language."):
        weight *= 5


def whole(state: dict, values: dict[int, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    """Put the slices of all ranks together on rank 0, and check that replicas are equal.

    Args:
        values: by the id of the parameter, what stands in its place.
    """
    pieces = [
        (tensor.key, tensor.global_shape, tensor.global_offset, tensor.prepend_axis_num, values[id(tensor.data)])
        for tensor in state.values()
        if isinstance(tensor, ShardedTensor) and id(tensor.data) in values
    ]
    gathered = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(pieces, gathered)
    if gathered is None:
        return None
    full: dict[str, torch.Tensor] = {}
    worst = 0.0
    for key, shape, offset, prepended, value in (piece for rank in gathered for piece in rank):
        value = value.double().reshape((1,) * prepended + value.shape)
        target = full.setdefault(key, torch.full(shape, torch.nan, dtype=torch.float64))
        place = target[tuple(slice(start, start + size) for start, size in zip(offset, value.shape))]
        if not place.isnan().any():
            worst = max(worst, ((place - value).norm() / value.norm().clamp(min=1e-30)).item())
        place.copy_(value)
    assert not any(tensor.isnan().any() for tensor in full.values())
    full["replicas differ by"] = torch.tensor(worst)
    return full


def mutate(mutation: str, trainer: Trainer) -> None:
    """Break one thing that a parallel layout must do."""
    if mutation == "drop_all_reduce":
        FINALIZE._allreduce_non_tensor_model_parallel_grads = lambda *args: None
    elif mutation == "drop_data_all_reduce":
        for part in trainer.ddp:
            part.finish_grad_sync = lambda *args, **kwargs: None
    elif mutation == "double_bias":
        for layer in trainer.chunks[0].language.decoder.layers:
            with torch.no_grad():
                layer.self_attention.linear_proj.bias *= 2
    elif mutation == "shift_expert":
        for layer in trainer.chunks[0].language.decoder.layers:
            with torch.no_grad():
                for parameter in layer.mlp.experts.parameters():
                    parameter.copy_(parameter.roll(1, 0))


def run_gradients(case: Case, folder: Path) -> dict:
    trainer = Trainer(case, folder, dtype=torch.float64, distributed_optimizer=False)
    tokens = written(trainer.ddp, trainer.groups) if case.mutation == "none" else None
    real = FINALIZE._allreduce_non_tensor_model_parallel_grads
    mutate(case.mutation, trainer)
    loss = trainer.gradients()
    FINALIZE._allreduce_non_tensor_model_parallel_grads = real
    state = trainer.sharded_state()
    found = {"loss": loss, "load": trainer.loads(), "written": tokens}
    found["gradients"] = whole(state, {id(p): p.main_grad for c in trainer.chunks for p in c.parameters()})
    _, found["grad_norm"], _ = trainer.optimizer.step()
    groups.destroy_groups()
    return found


def run_steps(case: Case, folder: Path, *, dtype: torch.dtype) -> dict:
    """Twenty optimizer steps: float64 with the plain optimizer, float32 with the distributed one (float32 only)."""
    trainer = Trainer(case, folder, dtype=dtype, distributed_optimizer=dtype == torch.float32)
    norms = []
    for _ in range(NUM_STEPS):
        trainer.gradients()
        norms.append(trainer.optimizer.step()[1])
    state = trainer.sharded_state()
    parameters = whole(state, {id(p): p.detach() for c in trainer.chunks for p in c.parameters()})
    groups.destroy_groups()
    return {"parameters": parameters, "grad_norms": norms}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    world = groups.start(timeout_s=300)
    found = {}
    for name, case in {**CASES, **MUTANTS}.items():
        if case.world_size != world.size:
            continue
        found[name] = run_gradients(case, folder)
        if name in STEPPED:
            found[name]["steps"] = {
                dtype: run_steps(case, folder, dtype=dtype) for dtype in (torch.float64, torch.float32)
            }
    if world.is_first:
        torch.save(found, folder / f"world-{world.size}.pt")
    groups.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
