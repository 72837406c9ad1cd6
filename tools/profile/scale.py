"""A dataset of ten million samples: how long it takes to open, to plan, and how much memory each rank needs.

    python tools/profile/scale.py --work build/scale --samples 10000000

Sixteen shards of 2,048 samples are written; the others are hard links to them, each with a name, a size and an entry in
dataset.json of its own. Every measurement is a process of its own, as a rank is: ``first`` finds no plan and makes it,
``next`` finds it. Memory is the growth since the imports: of the process itself, and of mapped pages of files, which
ranks of a node share and the system takes back when it needs them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_medgpt.config.schema import BlendConfig
from megatron_medgpt.data.loader import open_stage
from megatron_medgpt.data.manifest import Store, shard_name, write_manifest
from megatron_medgpt.data.shard_writer import ShardWriter
from megatron_medgpt.data.shards import Dataset
from megatron_medgpt.types import ImageSpec

PER_SHARD, WRITTEN = 2048, 16
SPEC = ImageSpec(size_px=28, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), num_tokens=576)


def make(folder: Path, samples: int) -> None:
    """Captions of 20 to 400 tokens with an image each, a few with none or two."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    written = []
    for number in range(WRITTEN):
        writer = ShardWriter(folder, number, Store())
        for place in range(PER_SHARD):
            num_images = int(rng.choice([0, 1, 1, 1, 1, 1, 1, 2]))
            length = int(rng.integers(20, 400))
            token_ids = np.full(length, 5, np.int32)
            token_ids[:num_images] = 9
            first = writer.add_images([b"not read here"] * num_images)
            writer.add_sample(
                sample_id=f"{number * PER_SHARD + place:x}", token_ids=token_ids, target_spans=[(10, length)],
                modality=1, num_images=num_images, first_image=first,
            )  # fmt: skip
        written.append(writer.close())
    shards = []
    for number in range(-(-samples // PER_SHARD)):
        facts, name = written[number % WRITTEN], shard_name(number)
        files = {file.replace(facts.name, name): entry for file, entry in facts.files.items()}
        if number >= WRITTEN:
            for file in facts.files:
                os.link(folder / file, folder / file.replace(facts.name, name))
        shards.append(replace(facts, name=name, files=files))
    tokenizer = {"sha256": "0" * 64, "vocab_size": 100, "image_mark_id": 9, "pad_id": 0}
    total = sum(shard.num_samples for shard in shards)
    write_manifest(folder, shards, tokenizer=tokenizer, store=Store(), num_records=total, rejects={}, provenance={})


def memory_mib() -> tuple[float, float]:
    """Of this process: its own memory, and pages of files that it has mapped (shared with every other rank)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, files = (int(lines[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile"))
    return own, files


def measure(work: Path, step: str) -> dict[str, float]:
    own, files = memory_mib()
    began, cpu = time.monotonic(), time.process_time()
    facts: dict[str, float] = {}
    if step == "open":
        facts["samples"] = len(opened := Dataset(work / "data"))
        assert opened.manifest.num_samples == facts["samples"]
    else:
        stage = open_stage(
            [BlendConfig(path=str(work / "data"))], tokenizer_fingerprint=None, image=SPEC, sequence_length=4096,
            seed=0, reader="pillow", rows_per_step=256, plans_folder=work / "plans",
        )  # fmt: skip
        facts["rows"] = stage.num_rows_per_epoch
    facts |= {"wall_s": time.monotonic() - began, "cpu_s": time.process_time() - cpu}
    facts |= {"own_mib": memory_mib()[0] - own, "mapped_mib": memory_mib()[1] - files}
    facts["peak_of_process_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if step == "next":
        began = time.process_time()
        rows = np.random.default_rng(0).integers(0, stage.num_rows_per_epoch, 200).tolist()
        facts["documents"] = sum(stage.take(row, 1, with_pixels=False).num_documents for row in rows)
        facts["cpu_ms_per_row"] = (time.process_time() - began) / len(rows) * 1e3
        facts["own_mib_after_200_rows"] = memory_mib()[0] - own
    return {name: round(value, 3) for name, value in facts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/scale"))
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--only", choices=("open", "first", "next"))
    given = parser.parse_args()
    if given.only:
        print(json.dumps(measure(given.work, given.only)))
        return
    if not given.work.exists():
        make(given.work / "data", given.samples)
    for step in ("open", "first", "next"):
        command = [sys.executable, __file__, "--work", str(given.work), "--only", step]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        print(step, done.stdout.strip() or done.stderr[-2000:])


if __name__ == "__main__":
    main()
