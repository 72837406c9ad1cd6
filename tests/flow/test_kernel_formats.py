"""Training with experts in FP8 and MXFP4, on their plain references: it learns as it does without."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from medgpt_kernels.mx import reference as mx

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


def product_error(name: str) -> float:
    """Relative error (rms) of a product whose operands are rounded as a format rounds them: those of weights and rows
    add in quadrature, being independent. On normal numbers, at the experts' size."""
    generator = torch.Generator().manual_seed(0)
    w_NK, rows_MK = torch.randn(256, 64, generator=generator), torch.randn(256, 64, generator=generator)
    if name == "fp8":
        pairs = [
            (mx.dequantise_tiles(*mx.quantise_tiles(w_NK[None]))[0], w_NK),
            (mx.dequantise_rows(*mx.quantise_rows(rows_MK)), rows_MK),
        ]
    else:
        pairs = [(mx.dequantise_mxfp4(*mx.quantise_mxfp4(w_NK), torch.float32), w_NK)]
    return math.hypot(*(float((a - b).norm() / b.norm()) for a, b in pairs))


@pytest.mark.parametrize("name", ["fp8", "mxfp4"])
def test_a_loss_curve_leaves_the_unrounded_one_by_no_more_than_products_are_wrong(losses, name):
    """The margin: to first order every step's progress is off by the relative error of the products that make it, so
    at any step the curve may differ from the unrounded one by that share of what was learned until then (the mean
    over five steps, which takes the rows' own ups and downs out)."""
    plain, rounded = (torch.tensor(losses[n]).unfold(0, 5, 1).mean(1) for n in ("grouped", name))
    learned = plain[0] - plain[-1]
    assert learned > 0.5
    assert (rounded - plain).abs().max() <= product_error(name) * learned
    assert losses[name] != losses["grouped"]
