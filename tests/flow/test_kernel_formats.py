"""Training with experts in FP8 and MXFP4, on their plain references: it learns as it does without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_medgpt.config.schema import KernelConfig
from megatron_medgpt.observe.metrics import read_metrics
from megatron_medgpt.train.command import train_here
from tests.small_data import small_run


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    """Loss of every step by number format, of runs that differ in nothing else."""
    base = small_run(tmp_path_factory.mktemp("formats"))
    stage = replace(base.stages[0], num_steps=20, validation_data=(), validation_interval=0)
    curves = {}
    for name in ("grouped", "bf16", "fp8", "mxfp4"):
        out = str(tmp_path_factory.mktemp(name) / "run")
        run = replace(base, out=out, stages=(stage,), kernels=KernelConfig(experts=name))
        assert train_here(run, dry_run=False) == 0
        curves[name] = [line["loss"] for line in read_metrics(Path(out) / "metrics.jsonl")]
    return curves


def test_the_fused_layers_reference_trains_as_the_grouped_products_do(losses):
    assert max(abs(a - b) for a, b in zip(losses["bf16"], losses["grouped"])) < 1e-3


@pytest.mark.parametrize(("name", "margin"), [("fp8", 0.05), ("mxfp4", 0.10)])
def test_loss_curves_stay_within_their_margin(losses, name, margin):
    """FP8 rounds by 2^-4 and MXFP4 by 2^-2 at most; from the same start the last five steps may differ from the
    unrounded run by this share of what that run has learned."""
    learned = losses["grouped"][0] - sum(losses["grouped"][-5:]) / 5
    assert learned > 0.5
    worse = sum(losses[name][-5:]) / 5 - sum(losses["grouped"][-5:]) / 5
    assert abs(worse) <= margin * learned
    assert losses[name] != losses["grouped"]
