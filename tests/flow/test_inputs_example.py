"""Every kind of input ingests, trains for ten steps, and resumes at every position.

The loader is resumed at every step of every input. MEDGPT_EVERY_POSITION=1 also stops and continues training after each
of the ten steps of each input (four minutes; test_training.py does it at three places).
"""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import numpy as np
import pytest

from megatron_medgpt.checkpoint.find import find_latest, read_facts
from megatron_medgpt.config.load import load_run
from megatron_medgpt.config.schema import BlendConfig
from megatron_medgpt.data.loader import open_stage
from megatron_medgpt.data.shards import Dataset
from megatron_medgpt.data.verify import verify
from megatron_medgpt.observe.metrics import read_metrics
from megatron_medgpt.train.cadence import Cadence
from megatron_medgpt.train.command import train_here
from megatron_medgpt.types import ImageSpec
from tests.example_scripts import ROOT, run_example

for needed in ("pyarrow", "openslide", "tifffile"):
    pytest.importorskip(needed)
INPUTS = ("llava", "messages", "roco", "vqa_rad", "pmc_vqa", "slake", "omnimedvqa", "webdataset", "energon", "pairs",
          "dicom", "series", "nifti", "slides")  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs") / "work"
    run_example("03_inputs", folder)
    return folder


def test_the_run_made_ten_steps_on_every_input_and_each_once(work):
    steps = [(record["stage"], record["stage_step"]) for record in read_metrics(work / "run" / "metrics.jsonl")]
    assert steps == [(name, step) for name in INPUTS for step in range(1, 11)]


@pytest.mark.parametrize("name", INPUTS)
def test_an_input_is_whole_and_resumes_at_every_position(work, name):
    folder = work / "data" / name
    assert list(verify(folder)) == []
    dataset = Dataset(folder)
    assert dataset.manifest.num_records == len(dataset) > 0
    assert dataset.manifest.num_images > 0
    if per_record := {"series": 3, "nifti": 3, "slides": 4}.get(name):
        assert dataset.manifest.num_images == per_record * len(dataset)
    options = {
        "image": ImageSpec(size_px=28, num_tokens=4, mean=(0.5,) * 3, std=(0.5,) * 3), "tokenizer_fingerprint": None,
        "sequence_length": 256, "seed": 0, "reader": "pillow", "rows_per_step": 2,
    }  # fmt: skip
    blend = [BlendConfig(path=str(folder))]
    straight = open_stage(blend, **options)
    steps = [straight.take(2 * step, 2) for step in range(10)]
    for position in range(10):
        resumed = open_stage(blend, **options)
        for step in range(position, 10):
            batch = resumed.take(2 * step, 2)
            assert batch.sample_ids == steps[step].sample_ids
            np.testing.assert_array_equal(batch.token_ids_BS, steps[step].token_ids_BS)
            np.testing.assert_array_equal(batch.pixels_ICYX, steps[step].pixels_ICYX)


@pytest.mark.skipif(not os.environ.get("MEDGPT_EVERY_POSITION"), reason="MEDGPT_EVERY_POSITION is not set")
@pytest.mark.parametrize("name", INPUTS)
def test_training_that_is_stopped_after_every_step_is_the_training_that_is_not(work, name, monkeypatch, tmp_path):
    monkeypatch.chdir(work)
    config = load_run(ROOT / "examples" / "03_inputs" / "run.yaml")
    stage = replace(config.stages[0], name=name, data=(BlendConfig(path=f"data/{name}"),))
    whole, stopped = (replace(config, stages=(stage,), out=str(tmp_path / out)) for out in ("whole", "stopped"))
    assert train_here(whole, dry_run=False) == 0
    begin = Cadence.begin_stage

    def begin_and_be_stopped(self, *given):
        os.kill(os.getpid(), signal.SIGTERM)
        return begin(self, *given)

    monkeypatch.setattr(Cadence, "begin_stage", begin_and_be_stopped)
    for step in range(1, 11):
        assert train_here(stopped, dry_run=False) == 0
        assert read_facts(find_latest(tmp_path / "stopped" / "checkpoints")).step == step
    records = [read_metrics(tmp_path / out / "metrics.jsonl") for out in ("whole", "stopped")]
    assert [r["step"] for r in records[1]] == list(range(1, 11))
    for kind in ("loss", "grad_norm"):
        assert [r[kind] for r in records[0]] == [r[kind] for r in records[1]]
    chains = [read_facts(find_latest(tmp_path / out / "checkpoints")).sample_chain for out in ("whole", "stopped")]
    assert chains[0] == chains[1]
