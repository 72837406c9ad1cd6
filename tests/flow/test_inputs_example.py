"""Every kind of input ingests, trains for ten steps with a stop in between, and resumes at every position."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_medgpt.config.schema import BlendConfig
from megatron_medgpt.data.loader import open_stage
from megatron_medgpt.data.shards import Dataset, verify
from megatron_medgpt.observe.metrics import read_metrics
from megatron_medgpt.types import ImageSpec

for needed in ("pyarrow", "openslide", "tifffile"):
    pytest.importorskip(needed)
ROOT = Path(__file__).parents[2]
INPUTS = ("llava", "messages", "roco", "vqa_rad", "pmc_vqa", "slake", "omnimedvqa", "webdataset", "energon", "pairs",
          "dicom", "series", "nifti", "slides")  # fmt: skip
pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs") / "work"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(ROOT / "examples" / "03_inputs" / "run.sh"), str(folder)], capture_output=True, text=True,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}, timeout=380, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return folder


def test_the_run_made_ten_steps_and_each_once(work):
    steps = [record["step"] for record in read_metrics(work / "run" / "metrics.jsonl")]
    assert steps == list(range(1, 11))


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
        "sequence_length": 256, "seed": 0, "reader": "pillow",
    }  # fmt: skip
    blend = [BlendConfig(path=str(folder))]
    straight = open_stage(blend, **options)
    rows = [straight.take(row, 1) for row in range(6)]
    for position in range(6):
        resumed = open_stage(blend, **options)
        for row in range(position, 6):
            batch = resumed.take(row, 1)
            np.testing.assert_array_equal(batch.token_ids_BS, rows[row].token_ids_BS)
            np.testing.assert_array_equal(batch.pixels_ICYX, rows[row].pixels_ICYX)
