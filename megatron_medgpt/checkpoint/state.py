"""What goes into a checkpoint: the sharded weights of the model chunks, the optimizer's tensors, the random states.

The optimizer state is megatron-core's ``fully_reshardable`` format, one tensor of the parameter's own shape per moment,
so that any layout reads it. Its step counter goes into the facts: learning rates and decay belong to the configuration
and the schedule. (megatron-core's own optimizer dict also fails on ranks whose parameters are all frozen, 0.16.1 to
0.19.2: it takes the step from the state of the first parameter.)
"""

from __future__ import annotations

import base64
import logging
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy
import torch

from megatron_medgpt.checkpoint.ranks import gather, rank_and_size
from megatron_medgpt.parallel.platform import prepare_engine

prepare_engine()

from megatron.core.dist_checkpointing.mapping import ShardedObject  # noqa: E402
from megatron.core.distributed import DistributedDataParallel  # noqa: E402
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker  # noqa: E402
from megatron.core.transformer.module import Float16Module  # noqa: E402

log = logging.getLogger(__name__)

OPTIMIZER = "optimizer"
_EXTRA_STATE = "_extra_state"


def model_state(
    models: Sequence[torch.nn.Module], groups: ProcessGroupCollection, *, packed_experts: bool = False
) -> dict[str, Any]:
    """Sharded weights of this rank's model chunks: what the next stage, evaluation and export need.

    Args:
        models: the virtual chunks of this pipeline rank, bare or wrapped for data parallelism.
        groups: process groups of the layout; replicas are told apart by its data-parallel group.
        packed_experts: make places for MXFP4 experts, which ``load_weights`` unpacks (``load.holds_packed_experts``).

    Returns:
        ``{"model0": {name: ShardedTensor}, ...}``. TransformerEngine's extra states (FP8 histories, pickled) are left
        out: they are found again within a few steps.
    """
    metadata = {**_metadata(groups), "packed_experts": packed_experts}
    state: dict[str, Any] = {}
    num_left_out = 0
    for index, model in enumerate(models):
        sharded = _bare(model).sharded_state_dict(prefix="", metadata=metadata)
        kept = {name: leaf for name, leaf in sharded.items() if not _is_extra_state(name, leaf)}
        # Without TransformerEngine the engine's linears have such an entry too, with nothing in it.
        num_left_out += sum(1 for name, leaf in sharded.items() if name not in kept and leaf.data is not None)
        state[f"model{index}"] = kept
    if num_left_out and rank_and_size()[0] == 0:
        log.info("%d TransformerEngine extra states are not part of the checkpoint", num_left_out)
    return state


def full_state(
    models: Sequence[torch.nn.Module], optimizer: Any, groups: ProcessGroupCollection, *, loading: bool = False
) -> dict[str, Any]:
    """Sharded weights and optimizer state: what an exact resume needs. Collective over the data-parallel groups.

    Args:
        optimizer: megatron-core's distributed optimizer (chained or not).
        loading: make places to load into rather than gather the values.
    """
    state = model_state(models, groups)
    weights = dict(state)  # megatron-core finds a parameter's sharding in here by identity
    # A dict whose keys are strings keeps its keys through megatron-core's flattening; the moments' are numbers.
    moments = {
        f"part{index}": part.sharded_param_state_fully_reshardable(weights, loading, _metadata(groups))
        for index, part in _parts(optimizer)
    }
    # A rank whose parameters are all frozen has parts with nothing in them, which do not survive the way back.
    moments = {name: part for name, part in moments.items() if part}
    return {**state, OPTIMIZER: moments} if moments else state


def load_weights(models: Sequence[torch.nn.Module], loaded: dict[str, Any], optimizer: Any = None) -> None:
    """Put loaded weights into the model chunks.

    Args:
        optimizer: when one was built on these models already, its main parameters are taken from the weights again.
    """
    for index, model in enumerate(models):
        missing, unexpected = _bare(model).load_state_dict(loaded[f"model{index}"], strict=False)
        missing = [name for name in missing if not name.endswith(_EXTRA_STATE)]
        if missing or unexpected:
            raise RuntimeError(f"model{index}: not loaded {missing[:4]}, not expected {unexpected[:4]}")
    if optimizer is not None:
        optimizer.reload_model_params()


def load_optimizer(optimizer: Any, loaded: dict[str, Any], step: int) -> None:
    """Put loaded moments and main parameters into the optimizer and set its step counter.

    Args:
        step: ``CheckpointFacts.optimizer_step``.
    """
    for index, part in _parts(optimizer):
        states = part.optimizer.state.values()
        for moments in states:  # megatron-core copies every entry it finds here, and the step is not stored as a tensor
            moments.pop("step", None)
        part.load_parameter_state_from_fully_reshardable(loaded.get(OPTIMIZER, {}).get(f"part{index}", {}))
        _set_step(part.optimizer, step)


def optimizer_step(optimizer: Any) -> int:
    """Steps the optimizer has taken, equal on all ranks (some may have nothing to learn). Collective."""
    own = 0
    for _, part in _parts(optimizer):
        for group in part.optimizer.param_groups:
            own = max(own, int(group.get("step", 0) or 0))
            own = max([own, *(int(part.optimizer.state[p].get("step", 0)) for p in group["params"])])
    return max(gather(own))


def rank_state() -> dict[str, Any]:
    """Random states of this process as JSON values."""
    kind, keys, position, has_gauss, gauss = numpy.random.get_state()
    python_version, python_state, python_gauss = random.getstate()
    return {
        "python": [python_version, list(python_state), python_gauss],
        "numpy": [kind, _packed(torch.from_numpy(keys.copy()).view(torch.uint8)), position, has_gauss, gauss],
        "torch": _packed(torch.get_rng_state()),
        "cuda": _packed(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None,
        "tracker": {name: _packed(value) for name, value in _tracker_states().items()},
    }


def restore_rank_state(values: dict[str, Any]) -> None:
    """Set the random states of this process to what ``rank_state`` gave."""
    version, state, gauss = values["python"]
    random.setstate((version, tuple(state), gauss))
    kind, keys, position, has_gauss, cached = values["numpy"]
    numpy.random.set_state((kind, _unpacked(keys).view(torch.uint32).numpy(), position, has_gauss, cached))
    torch.set_rng_state(_unpacked(values["torch"]))
    if values["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_unpacked(values["cuda"]))
    if values["tracker"]:
        get_cuda_rng_tracker().set_states({name: _unpacked(value) for name, value in values["tracker"].items()})


def _metadata(groups: ProcessGroupCollection) -> dict[str, Any]:
    """megatron-core's options for sharded states. Both lines need the group; its default format is not reshardable."""
    return {"dp_cp_group": groups.dp_cp, "distrib_optim_sharding_type": "fully_reshardable"}


def _bare(model: Any) -> Any:
    while isinstance(model, DistributedDataParallel | Float16Module):
        model = model.module
    return model


def _is_extra_state(name: str, leaf: Any) -> bool:
    return isinstance(leaf, ShardedObject) and name.endswith(_EXTRA_STATE)


def _parts(optimizer: Any) -> Iterator[tuple[int, DistributedOptimizer]]:
    """The distributed optimizers of this rank that have something to learn, with their moments in place."""
    for index, part in enumerate(getattr(optimizer, "chained_optimizers", [optimizer])):
        if not isinstance(part, DistributedOptimizer):
            raise TypeError(f"{type(part).__name__} is not megatron-core's DistributedOptimizer")
        if part.is_stub_optimizer:
            continue
        _make_moments(part)
        yield index, part


def _make_moments(part: DistributedOptimizer) -> None:
    """Give every parameter its moments, which torch makes at the first step only."""
    inner = part.optimizer
    if not isinstance(inner, torch.optim.Adam):  # TransformerEngine's and apex's know how to; AdamW is an Adam
        part.init_state_fn(inner, part.config)
        return
    for group in inner.param_groups:
        for parameter in group["params"]:
            if not inner.state[parameter]:
                inner.state[parameter] = {
                    "step": _step_tensor(group, parameter, 0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def _set_step(inner: torch.optim.Optimizer, step: int) -> None:
    for group in inner.param_groups:
        if not isinstance(inner, torch.optim.Adam):
            group["step"] = step
            continue
        for parameter in group["params"]:
            inner.state[parameter]["step"] = _step_tensor(group, parameter, step)


def _step_tensor(group: dict[str, Any], parameter: torch.Tensor, step: int) -> torch.Tensor:
    on_device = group.get("capturable") or group.get("fused")
    return torch.tensor(float(step), dtype=torch.float32, device=parameter.device if on_device else "cpu")


def _tracker_states() -> dict[str, torch.Tensor]:
    """megatron-core's named generators; empty on a CPU, where nothing is drawn from them."""
    states = get_cuda_rng_tracker().get_states()
    return {name: value for name, value in states.items() if torch.is_tensor(value)}


def _packed(state: torch.Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _unpacked(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
