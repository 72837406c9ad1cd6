"""Training the demo's model on phantoms with experts in FP8 and MXFP4, on their plain references: it learns as without.

CI takes a few steps; ``make formats`` the demo's whole first stage, whose figures stand in kernels/README.md.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from medgpt_kernels.mx import reference as mx

from megatron_medgpt.config.schema import BlendConfig, KernelConfig, ParallelConfig, RunConfig
from megatron_medgpt.data.text import train_tokenizer
from megatron_medgpt.demo import _texts as texts_of
from megatron_medgpt.ingest.command import run_ingest
from megatron_medgpt.ingest.phantom_study import make_phantoms
from megatron_medgpt.observe.metrics import read_metrics
from megatron_medgpt.recipes import recipe
from megatron_medgpt.recipes.demo import VOCAB_SIZE
from megatron_medgpt.train.command import train_here

WHOLE = os.environ.get("MEDGPT_FORMATS") == "all"


def captions_of_phantoms(folder: Path) -> RunConfig:
    """The demo's run with its first stage's data, made as the demo makes them."""
    files = make_phantoms(folder / "phantoms", num_train=4000 if WHOLE else 64, num_validation=1, num_test=1)
    tokenizer, captions = folder / "tokenizer", folder / "captions"
    train_tokenizer(texts_of(files.train_captions, files.train_dialogues), tokenizer, vocab_size=VOCAB_SIZE)
    run_ingest([files.train_captions], out=captions, tokenizer=tokenizer, workers=1)
    demo = recipe("demo")
    align = replace(demo.stages[0], data=(BlendConfig(path=str(captions)),), validation_data=(), validation_interval=0)
    return replace(demo, tokenizer=str(tokenizer), stages=(replace(align, parallel=ParallelConfig()),))


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    """Loss of every step by number format, of runs that differ in nothing else."""
    folder = tmp_path_factory.mktemp("formats")
    demo = captions_of_phantoms(folder)
    stage = demo.stages[0]
    if not WHOLE:
        rates = replace(stage.optimizer, schedule=replace(stage.optimizer.schedule, warmup_steps=2))
        stage = replace(stage, num_steps=8, micro_batch_rows=2, global_batch_rows=2, optimizer=rates)
    curves = {}
    for name in ("grouped", "fp8", "mxfp4"):
        run = replace(demo, out=str(folder / name), stages=(stage,), kernels=KernelConfig(experts=name))
        assert train_here(run, dry_run=False) == 0
        curves[name] = [line["loss"] for line in read_metrics(Path(run.out) / "metrics.jsonl")]
        assert len(curves[name]) == stage.num_steps
    return curves


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
    learned = plain[0] - plain.min()
    away, margin = (rounded - plain).abs(), product_error(name) * learned
    print(
        f"{name}: {len(losses[name])} steps, loss {plain[0]:.4f} to {plain[-1]:.4f} unrounded, to {rounded[-1]:.4f} "
        f"rounded; at most {away.max():.4f} away, at the end {away[-1]:.4f}, margin {margin:.4f}"
    )
    assert learned > 0.5
    assert away.max() <= margin
    assert losses[name] != losses["grouped"]
