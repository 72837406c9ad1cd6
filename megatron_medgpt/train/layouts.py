"""Does a stage fit its layout, its batch and the world? No torch: checked before any process is started."""

from __future__ import annotations

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.config.schema import RunConfig, StageConfig
from megatron_medgpt.parallel.plan import Layout, make_layout


def check_stage(config: RunConfig, stage: StageConfig, world_size: int) -> Layout:
    """The layout of a stage, checked against the world, the batch and the sequence.

    Raises:
        UsageError: naming the field to change.
    """
    layout = make_layout(config.layout_of(stage), config.model, world_size)
    at = f"stages.{stage.name}"
    per_micro_batch = stage.micro_batch_rows * layout.data
    if stage.global_batch_rows % per_micro_batch:
        raise UsageError(
            f"{at}.global_batch_rows={stage.global_batch_rows} is not a multiple of micro_batch_rows x data-parallel "
            f"ranks = {stage.micro_batch_rows} x {layout.data} = {per_micro_batch}"
        )
    if stage.sequence_length % layout.tensor:
        raise UsageError(
            f"{at}.sequence_length={stage.sequence_length} is not a multiple of parallel.tensor={layout.tensor}"
        )
    num_micro_batches = stage.global_batch_rows // per_micro_batch
    if layout.virtual_pipeline > 1 and num_micro_batches % layout.pipeline:
        raise UsageError(
            f"{at}: the interleaved schedule needs micro-batches ({num_micro_batches}) in multiples of "
            f"parallel.pipeline={layout.pipeline}; change {at}.global_batch_rows"
        )
    return layout
