"""What happens every so many steps: metrics, progress lines, validation, checkpoints."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_medgpt.checkpoint.manifest import CheckpointFacts, read_manifest
from megatron_medgpt.checkpoint.save import save_checkpoint
from megatron_medgpt.checkpoint.state import full_state, optimizer_step, rank_state
from megatron_medgpt.config.load import to_tree
from megatron_medgpt.config.schema import RunConfig
from megatron_medgpt.observe.metrics import MetricsWriter, peak_flops
from megatron_medgpt.observe.progress import Progress as ProgressLine
from megatron_medgpt.parallel.flops import training_flops
from megatron_medgpt.train.build import Parts
from megatron_medgpt.train.load_balance import expert_metrics
from megatron_medgpt.train.step import StepResult
from megatron_medgpt.train.validate import validate
from megatron_medgpt.train.validation_cost import ValidationCost


class Cadence:
    """Rank 0 writes; the collectives inside are entered by every rank at the same steps."""

    def __init__(self, config: RunConfig, *, first_rank: bool, device: torch.device) -> None:
        self.config = config
        self.folder = Path(config.out) / "checkpoints"
        self.metrics: MetricsWriter | None = None
        self.line: ProgressLine | None = None
        self.peak_flops = peak_flops(device)
        self.config_hash = hashlib.sha256(json.dumps(to_tree(config), sort_keys=True).encode()).hexdigest()
        self._first_rank = first_rank
        self._spans: dict[str, float] = {}
        self._validations: ValidationCost | None = None

    def open(self, resumed_step: int) -> None:
        """Begin writing; metrics after ``resumed_step`` belong to steps that will be done again and are dropped."""
        if self._first_rank:
            self.metrics = MetricsWriter(
                Path(self.config.out), tensorboard=self.config.log.tensorboard, resume_step=resumed_step
            )

    def begin_stage(self, parts: Parts, stage_step: int) -> None:
        self._validations = ValidationCost(parts.stage, speaks=self._first_rank)
        if self._first_rank:
            self.line = ProgressLine(
                name=parts.stage.name, total_steps=parts.stage.num_steps, done_steps=stage_step,
                interval=self.config.log.interval,
            )  # fmt: skip

    def end_stage(self) -> None:
        if self.line is not None:
            self.line.close()
            self.line = None

    def close(self) -> None:
        self.end_stage()
        if self.metrics is not None:
            self.metrics.close()

    def note_spans(self, seconds: dict[str, float]) -> None:
        """Seconds of the step by what they were spent on; they go into the next step's line."""
        self._spans = seconds

    def after_step(self, parts: Parts, progress, result: StepResult, seconds: float) -> tuple[bool, bool]:
        """Write the step down; validate when due.

        Returns:
            Whether the stage's exit criterion is reached, and whether its checkpoint is the best so far; the same on
            every rank.
        """
        record = self._record(parts, progress, result, seconds)
        due_to_log = progress.stage_step % self.config.log.interval == 0
        if due_to_log:
            record |= expert_metrics(parts)
        reached_goal = is_best = False
        if self._validation_is_due(parts, progress.stage_step):
            began_s = time.perf_counter()
            with parts.trace.span("validation"):
                figures = validate(parts)
            seconds = time.perf_counter() - began_s
            record |= figures | {"validation_s": seconds, "validation_share": self._validations.note(seconds)}
            reached_goal, is_best = progress.watch.note(figures)
        if self.metrics is not None:
            self.metrics.write(record)
        if self.line is not None:
            self.line.step(record)
        return reached_goal, is_best

    def _validation_is_due(self, parts: Parts, stage_step: int) -> bool:
        """After every interval that leaves room for one, and after the last step; the same on every rank."""
        interval = parts.stage.validation_interval
        if not interval or stage_step == parts.stage.num_steps:
            return bool(interval)
        if stage_step % interval:
            return False
        if not parts.stage.validation_max_share:
            return True
        fits = torch.tensor(float(self._validations.fits()), device=parts.device)
        dist.broadcast(fits, src=0)  # the clocks of the ranks differ
        return bool(fits.item())

    def _record(self, parts: Parts, progress, result: StepResult, seconds: float) -> dict:
        flops = training_flops(
            self.config.model, num_tokens=result.num_tokens, num_images=result.num_images,
            document_length=max(1, result.num_tokens // max(1, result.num_samples)), frozen=parts.stage.frozen,
        )  # fmt: skip
        record = {
            "step": progress.step,
            "stage": parts.stage.name,
            "stage_step": progress.stage_step,
            "loss": result.loss,
            "lr": parts.learning_rate,
            "grad_norm": result.grad_norm,
            "targets": result.num_targets,
            "tokens": result.num_tokens,
            "samples": result.num_samples,
            "images": result.num_images,
            "packing": result.num_tokens / (parts.stage.global_batch_rows * parts.stage.sequence_length),
            "tokens_per_s": result.num_tokens / seconds,
            "step_s": seconds,
            "flops_per_s": flops / seconds,
            "mem_gb": parts.platform.peak_memory_bytes() / 1e9,
            **{f"time/{name}_s": value for name, value in self._spans.items()},
        }
        if self.peak_flops:
            record["mfu"] = flops / seconds / (self.peak_flops * parts.layout.world_size)
        return record

    def save(self, parts: Parts, progress, *, stage_end: bool, is_best: bool = False) -> Path:
        """Write a checkpoint of this moment, and move ``best`` to it where it is. Collective."""
        state = full_state(parts.models, parts.optimizer, parts.groups)
        facts = CheckpointFacts(
            step=progress.step, stage_index=parts.stage_index, stage_name=parts.stage.name,
            stage_step=progress.stage_step, stage_end=stage_end,
            row=progress.stage_step * parts.stage.global_batch_rows, plan_hash=parts.data.plan_hash,
            sample_chain=progress.sample_chain, optimizer_step=optimizer_step(parts.optimizer),
            layout=asdict(parts.layout), config_hash=self.config_hash, model=to_tree(self.config.model),
            lineage=progress.lineage,
            extra={
                "tokenizer": parts.tokenizer.fingerprint, "image_mark_id": parts.tokenizer.image_mark_id,
                "watch": progress.watch.state(),
            },
        )  # fmt: skip
        path = save_checkpoint(
            self.folder, progress.step, state, facts, rank_state=rank_state(), keep=self.config.checkpoint.keep,
            parallel_group=parts.groups.dp_cp, is_best=is_best,
        )  # fmt: skip
        progress.lineage = (*progress.lineage, f"{path.name}@{read_manifest(path).digest[:16]}")
        dist.barrier()
        return path
