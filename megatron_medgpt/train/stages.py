"""The curriculum: one stage after the other, in one lineage of checkpoints, each in its own layout."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from megatron_medgpt.checkpoint.find import find_latest, holds_packed_experts, read_facts
from megatron_medgpt.checkpoint.load import load_checkpoint, load_rank_state
from megatron_medgpt.checkpoint.manifest import CheckpointFacts
from megatron_medgpt.checkpoint.state import full_state, load_optimizer, load_weights, model_state, restore_rank_state
from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.config.load import to_tree
from megatron_medgpt.config.schema import RunConfig
from megatron_medgpt.parallel.groups import World, destroy_groups
from megatron_medgpt.train.build import Parts, build_stage
from megatron_medgpt.train.cadence import Cadence
from megatron_medgpt.train.consumed import START
from megatron_medgpt.train.guard import StopRequest
from megatron_medgpt.train.loop import Progress, fit
from megatron_medgpt.train.watch import Watch

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunEnd:
    status: Literal["done", "stopped"]
    step: int
    checkpoint: Path | None


def run_stages(config: RunConfig, world: World, *, begun: Callable[[], None] = lambda: None) -> RunEnd:
    """Train every stage that is not finished yet, from the newest whole checkpoint of the run folder.

    ``begun`` is called when the first of them is loaded; nothing that an earlier command has written is changed before:
    it may still be found not to go with this configuration.

    Raises:
        UsageError: the checkpoint belongs to another model, dataset or order of the data, or lies behind the end of its
            stage.
    """
    newest = find_latest(Path(config.out) / "checkpoints")
    facts = read_facts(newest) if newest is not None else None
    first_stage, progress = _where_to_start(config, facts, newest)
    cadence = Cadence(config, first_rank=world.is_first, device=world.device)
    stop = StopRequest()
    status: Literal["done", "stopped"] = "done"
    try:
        for index in range(first_stage, len(config.stages)):
            parts = build_stage(config, index, world)
            _load(config, parts, newest, facts, world)
            if index == first_stage:
                begun()
                cadence.open(progress.step)
            log.info(
                "stage %s: %s, %d steps of %d rows x %d positions, from step %d%s",
                parts.stage.name, parts.layout.describe(), parts.stage.num_steps, parts.stage.global_batch_rows,
                parts.stage.sequence_length, progress.stage_step, _frozen_words(parts),
            )  # fmt: skip
            cadence.begin_stage(parts, progress.stage_step)
            end = fit(parts, progress, cadence, stop)
            newest, facts = end.checkpoint, read_facts(end.checkpoint)
            cadence.end_stage()
            parts.dismantle()
            finished = end.done and index == len(config.stages) - 1
            if end.stop and not finished:
                status = "stopped"
                log.info("stopped by %s after step %d; the same command continues", stop.signal_name, progress.step)
                break
            progress.stage_step = 0
            if not finished and end.done:
                progress.watch = Watch(config.stages[index + 1])
            del parts
            destroy_groups()
    finally:
        cadence.close()
        stop.restore()
    return RunEnd(status=status, step=progress.step, checkpoint=newest)


def _where_to_start(config: RunConfig, facts: CheckpointFacts | None, newest: Path | None) -> tuple[int, Progress]:
    if facts is None:
        return 0, Progress(step=0, stage_step=0, sample_chain=START, watch=Watch(config.stages[0]))
    if facts.model != to_tree(config.model):
        raise UsageError(
            f"{newest} holds another model than this run's configuration ({_difference(facts.model, config)}); "
            "set another run folder (out=...) or the model it was trained with"
        )
    names = [stage.name for stage in config.stages]
    if facts.stage_index >= len(names) or names[facts.stage_index] != facts.stage_name:
        raise UsageError(
            f"{newest} was written in stage {facts.stage_index} {facts.stage_name!r}; this run's stages are {names}. "
            "Keep the names and order of finished stages, or set another run folder (out=...)"
        )
    progress = Progress(
        step=facts.step, stage_step=facts.stage_step, sample_chain=facts.sample_chain, lineage=facts.lineage,
        watch=Watch(config.stages[facts.stage_index], facts.extra.get("watch")),
    )  # fmt: skip
    if facts.stage_end:
        progress.stage_step = 0
        if facts.stage_index + 1 < len(config.stages):
            progress.watch = Watch(config.stages[facts.stage_index + 1])
        return facts.stage_index + 1, progress
    stage = config.stages[facts.stage_index]
    if facts.stage_step >= stage.num_steps:
        raise UsageError(
            f"stages.{stage.name}.num_steps={stage.num_steps}, but {facts.stage_step} steps are done and the stage was "
            "not ended there; set it to more"
        )
    return facts.stage_index, progress


def _load(config: RunConfig, parts: Parts, newest: Path | None, facts: CheckpointFacts | None, world: World) -> None:
    """Fill a freshly built stage: with all of the state when it continues, with weights when it begins."""
    if newest is not None and facts is not None and facts.stage_index == parts.stage_index and not facts.stage_end:
        _check_same_data(parts, newest, facts)
        state = full_state(parts.models, parts.optimizer, parts.groups, loading=True)
        loaded, _ = load_checkpoint(newest, state, verify_content=False)
        load_weights(parts.models, loaded)
        load_optimizer(parts.optimizer, loaded, facts.optimizer_step or 0)
        own = load_rank_state(newest, asdict(parts.layout))
        if own is not None:
            restore_rank_state(own)
        parts.schedule.step(increment=facts.stage_step)
        log.info("resumed from %s (stage %s, step %d)", newest.name, facts.stage_name, facts.stage_step)
        return
    source = newest if newest is not None else config.checkpoint.start_from
    if source is None:
        return
    packed, wanted = holds_packed_experts(source), parts.stage.experts == "packed"
    if wanted and not packed:
        raise UsageError(
            f"stages.{parts.stage.name}.experts=packed, but {source} holds plain experts, and packing them would "
            "change them; start from a checkpoint of medgpt convert hf-to-megatron --keep-packed, or set it to plain"
        )
    if packed and not wanted:
        log.info("stage %s unpacks the MXFP4 experts of %s", parts.stage.name, Path(source).name)
    state = model_state(parts.models, parts.groups, packed_experts=packed)
    loaded, _ = load_checkpoint(source, state, verify_content=False, weights_only=True)
    load_weights(parts.models, loaded, parts.optimizer)
    log.info("stage %s starts from the weights of %s", parts.stage.name, Path(source).name)


def _check_same_data(parts: Parts, newest: Path, facts: CheckpointFacts) -> None:
    expected_row = facts.stage_step * parts.stage.global_batch_rows
    if facts.row != expected_row:
        raise UsageError(
            f"{newest}: {facts.row} rows were used in {facts.stage_step} steps, but "
            f"stages.{parts.stage.name}.global_batch_rows={parts.stage.global_batch_rows} makes {expected_row}; "
            "resume with the batch size that the stage began with"
        )
    if facts.plan_hash != parts.data.plan_hash:
        raise UsageError(
            f"{newest}: the data plan of stage {parts.stage.name} has changed (datasets, weights, seed, "
            "sequence_length, augment or exclude); resume with what it began with, or set another run folder (out=...)"
        )


def _difference(model: dict, config: RunConfig) -> str:
    for section, fields in to_tree(config.model).items():
        for name, value in fields.items():
            if model.get(section, {}).get(name) != value:
                return f"model.{section}.{name}: {model.get(section, {}).get(name)} there, {value} here"
    return "other fields"


def _frozen_words(parts: Parts) -> str:
    return f", frozen: {', '.join(parts.stage.frozen)}" if parts.stage.frozen else ""
