"""AdamW over the modules of a stage, and its learning-rate schedule.

Both are megatron-core's. What is ours is the mapping from the stage's configuration: one override per module with its
own peak learning rate, and one that exempts biases, norms, sinks and other vectors from weight decay.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_medgpt.config.schema import OptimizerConfig, StageConfig
from megatron_medgpt.model.freeze import module_of
from megatron_medgpt.parallel.platform import prepare_engine

prepare_engine()

from megatron.core.optimizer import OptimizerConfig as EngineOptimizerConfig  # noqa: E402  (engine prepared)
from megatron.core.optimizer import get_megatron_optimizer  # noqa: E402
from megatron.core.optimizer.optimizer import MegatronOptimizer  # noqa: E402
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate  # noqa: E402
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride  # noqa: E402


def build_optimizer(chunks: list, stage: StageConfig, *, dtype: torch.dtype) -> MegatronOptimizer:
    """Distributed AdamW over what is not frozen.

    Args:
        chunks: this rank's model chunks, wrapped in megatron-core's DistributedDataParallel.
        dtype: of the parameters. bf16 keeps fp32 master weights and moments, split over the data-parallel ranks.

    Gradients are sums over targets divided by their global count when ``step`` is called, then clipped to
    ``clip_grad_norm`` by the norm over all ranks.
    """
    config = stage.optimizer
    engine = EngineOptimizerConfig(
        optimizer="adam",
        lr=config.learning_rate,
        min_lr=config.learning_rate * config.schedule.min_factor,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.eps,
        clip_grad=config.clip_grad_norm,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
        log_num_zeros_in_grad=False,
    )
    # The groups are taken from parallel_state here: with a collection the engine refuses the gloo groups over which it
    # gathers the optimizer state of a checkpoint (0.16.1 process_groups_config.py:422).
    optimizer = get_megatron_optimizer(
        engine, chunks, config_overrides=_overrides(config), use_gloo_process_groups=True
    )
    _fuse_torch_adamw(optimizer)
    return optimizer


def _fuse_torch_adamw(optimizer: MegatronOptimizer) -> None:
    """torch's AdamW, which the engine takes where TransformerEngine and apex are absent, is made unfused: on a CPU the
    fused form took 0.39 s instead of 0.47 s for 56 M parameters."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part.optimizer, torch.optim.AdamW):
            for group in part.optimizer.param_groups:
                group.update(fused=True, foreach=False)


def _overrides(config: OptimizerConfig) -> dict[ParamKey, ParamGroupOverride]:
    overrides = {_key("without weight decay", _is_vector): ParamGroupOverride(wd_mult=0.0)}
    for module, rate in sorted(config.module_learning_rates.items()):
        rates = ParamGroupOverride(max_lr=rate, min_lr=rate * config.schedule.min_factor)
        overrides[_key(module, lambda _, name, module=module: module_of(_plain(name)) == module)] = rates
    return overrides


def _key(name: str, matches) -> ParamKey:
    return ParamKey(with_name_predicate=ParamWithNamePredicate(name=name, fn=matches))


def _is_vector(parameter: Tensor, name: str) -> bool:
    # Expert biases are (E, n) matrices by shape and vectors by meaning.
    return parameter.ndim <= 1 or name.endswith("bias")


def _plain(name: str) -> str:
    """Parameter name without the wrapper's prefix."""
    return name.removeprefix("module.")


def build_schedule(optimizer: MegatronOptimizer, stage: StageConfig) -> OptimizerParamScheduler:
    """Learning rates of the stage; ``step(1)`` once per optimizer step. Set for step 0 when it is returned."""
    config = stage.optimizer
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.learning_rate,
        min_lr=config.learning_rate * config.schedule.min_factor,
        lr_warmup_steps=min(config.schedule.warmup_steps, stage.num_steps - 1),
        lr_decay_steps=stage.num_steps,
        lr_decay_style=config.schedule.kind,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=stage.num_steps,
        wd_incr_style="constant",
    )
