"""Stage 1 on published MXFP4 experts that are never unpacked: imported, trained around, exported byte for byte."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_medgpt.checkpoint.find import find_latest
from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.config.schema import CheckpointConfig
from megatron_medgpt.convert.hf_to_megatron import import_hf, plan_import
from megatron_medgpt.convert.megatron_to_hf import export_hf
from megatron_medgpt.convert.mxfp4 import dequantise
from megatron_medgpt.convert.safetensor import SafetensorsFolder
from megatron_medgpt.convert.stored import StoredCheckpoint
from megatron_medgpt.observe.metrics import read_metrics
from megatron_medgpt.train.command import train_here
from tests.published_models import CLIP, on_mxfp4_grid, random_weights, write_gpt_oss
from tests.small_data import small_run

FROZEN = ("encoder", "language", "experts", "router")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A published model in MXFP4, imported packed and unpacked, and a run of two stages on it."""
    folder = tmp_path_factory.mktemp("packed")
    published = write_gpt_oss(folder / "published", CLIP, on_mxfp4_grid(random_weights(CLIP)), experts="mxfp4")
    for name, options in (("packed", {"keep_packed": True}), ("plain", {"dtype": "fp32"})):
        import_hf(plan_import(published, new_vision="tiny-clip", **options), folder / f"{name}-start")
    run = small_run(folder, model=CLIP, checkpoint=CheckpointConfig(interval=3))
    align = replace(run.stages[0], frozen=FROZEN, validation_data=(), validation_interval=0)
    learn = replace(run.stages[1], num_steps=2, validation_data=(), validation_interval=0)
    return folder, published, replace(run, stages=(align, learn))


def run_of(work, name: str, *, experts: str, start: str, **changes):
    folder, _, run = work
    align = replace(run.stages[0], experts=experts)
    stages = changes.pop("stages", (align,))
    checkpoint = replace(run.checkpoint, start_from=str(folder / f"{start}-start"))
    return replace(run, name=name, out=str(folder / name), stages=stages, checkpoint=checkpoint, **changes)


def losses_of(run) -> list[float]:
    return [line["loss"] for line in read_metrics(Path(run.out) / "metrics.jsonl")]


@pytest.fixture(scope="module")
def trained(work):
    """The runs of both starts through stage align."""
    runs = {name: run_of(work, name, experts=name, start=name) for name in ("packed", "plain")}
    for run in runs.values():
        assert train_here(run, dry_run=False) == 0
    return runs


def test_training_around_packed_experts_has_to_the_bit_the_losses_of_the_unpacked_ones(trained):
    packed, plain = (losses_of(trained[name]) for name in ("packed", "plain"))
    assert len(packed) == 6 and packed[-1] < packed[0] - 0.05
    assert packed == plain


def test_the_checkpoint_and_the_export_hold_the_published_bytes(trained, work, tmp_path):
    folder, published, run = work
    latest = find_latest(Path(trained["packed"].out) / "checkpoints")
    before, stored = StoredCheckpoint(folder / "packed-start"), StoredCheckpoint(latest)
    packed = [name for name in stored.names if name.endswith(("_blocks", "_scales"))]
    assert len(packed) == 4 * CLIP.language.num_layers and not any(n.endswith("experts.down") for n in stored.names)
    assert all(torch.equal(before.tensor(name), stored.tensor(name)) for name in packed)
    assert not torch.equal(before.tensor("projector.linear_1.weight"), stored.tensor("projector.linear_1.weight"))
    export_hf(latest, tmp_path / "hf", tokenizer=run.tokenizer, dtype="mxfp4", part="language")
    original, exported = SafetensorsFolder(published), SafetensorsFolder(tmp_path / "hf")
    for name in (n for n in original.names if ".experts." in n and not n.endswith("bias")):
        assert torch.equal(original.tensor(name), exported.tensor(name)), name


def test_a_stage_that_trains_the_experts_starts_from_what_the_blocks_hold(trained, work):
    """Two stages in one run: packed, then everything learns."""
    _, published, base = work
    align = replace(base.stages[0], experts="packed", num_steps=2)
    rest = replace(base.stages[1], num_steps=1)
    rest = replace(rest, optimizer=replace(rest.optimizer, module_learning_rates={"experts": 1e-12}))
    run = run_of(work, "both", experts="packed", start="packed", stages=(align, rest))
    assert train_here(run, dry_run=False) == 0
    stored = StoredCheckpoint(find_latest(Path(run.out) / "checkpoints"))
    source = SafetensorsFolder(published)
    for layer in range(CLIP.language.num_layers):
        blocks, scales = (
            source.tensor(f"model.layers.{layer}.mlp.experts.gate_up_proj_{leaf}") for leaf in ("blocks", "scales")
        )
        found = stored.tensor(f"language.decoder.layers.{layer}.mlp.experts.gate_up")
        torch.testing.assert_close(found, dequantise(blocks, scales, torch.float32).transpose(1, 2), rtol=0, atol=1e-9)


def test_plain_experts_are_not_packed_behind_ones_back(work):
    with pytest.raises(UsageError, match=r"stages.align.experts=packed, but .*plain-start holds plain experts"):
        train_here(run_of(work, "refused", experts="packed", start="plain"), dry_run=False)


def test_a_run_continues_in_the_middle_of_a_packed_stage(trained, work):
    run = run_of(work, "again", experts="packed", start="packed")
    middle = Path(trained["packed"].out) / "checkpoints" / "step-00000003"
    shutil.copytree(middle, Path(run.out) / "checkpoints" / middle.name)
    assert train_here(run, dry_run=False) == 0
    assert losses_of(run) == losses_of(trained["packed"])[3:]
