"""A small real dataset and run for tests: coloured pictures, questions about them, a tokenizer trained on the spot."""

from __future__ import annotations

import io
import uuid
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_medgpt.config.presets import TINY, TINY_CLIP
from megatron_medgpt.config.schema import (
    BlendConfig,
    CheckpointConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    ScheduleConfig,
    StageConfig,
)
from megatron_medgpt.data.manifest import Store, write_manifest
from megatron_medgpt.data.shard_writer import ShardWriter
from megatron_medgpt.data.text import Tokenizer, Turn, train_tokenizer

COLOURS = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (30, 40, 210), "grey": (128, 128, 128)}


def picture(colour: str, rng: np.random.Generator) -> bytes:
    """PNG bytes of a noisy, not square picture."""
    pixels = np.full((20 + int(rng.integers(20)), 40, 3), COLOURS[colour], np.int16)
    pixels += rng.integers(-20, 20, pixels.shape, dtype=np.int16)
    stream = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def small_tokenizer(folder: Path) -> Tokenizer:
    texts = [f"What colour is the picture? It is {colour}." for colour in COLOURS] * 20
    return train_tokenizer(texts, folder, vocab_size=400)


def small_dataset(folder: Path, tokenizer: Tokenizer, *, num_samples: int = 64, seed: int = 0) -> Path:
    """Samples with no, one and two images, in two shards."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    names = list(COLOURS)
    shards = []
    for number in range(2):
        writer = ShardWriter(folder, number, Store())
        for _ in range(num_samples // 2):
            colours = [names[i] for i in rng.integers(0, len(names), int(rng.choice([0, 1, 1, 1, 2])))]
            marks = "<image>\n" * len(colours)
            answer = " and ".join(colours) or "unknown"
            rendered = tokenizer.render(
                [Turn("user", f"{marks}What colour is the picture?"), Turn("assistant", f"It is {answer}.")]
            )
            first = writer.add_images([picture(colour, rng) for colour in colours])
            writer.add_sample(
                sample_id=uuid.UUID(bytes=rng.bytes(16)).hex, token_ids=rendered.token_ids,
                target_spans=rendered.target_spans, modality=int(rng.integers(1, 5)), num_images=len(colours),
                first_image=first,
            )  # fmt: skip
        shards.append(writer.close())
    write_manifest(
        folder, shards,
        tokenizer={"sha256": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size,
                   "image_mark_id": tokenizer.image_mark_id, "pad_id": tokenizer.pad_id},
        store=Store(), num_records=num_samples, rejects={}, provenance={},
    )  # fmt: skip
    return folder


def small_run(folder: Path, **changes) -> RunConfig:
    """A two-stage run of the tiny model on ``small_dataset``; ``changes`` replace fields of the run."""
    tokenizer = small_tokenizer(folder / "tokenizer")
    small_dataset(folder / "data", tokenizer)
    stage = StageConfig(
        name="align", data=(BlendConfig(path=str(folder / "data")),), num_steps=6, sequence_length=128,
        micro_batch_rows=1, global_batch_rows=4,
        optimizer=OptimizerConfig(learning_rate=3e-3, schedule=ScheduleConfig(warmup_steps=2)),
        validation_data=(BlendConfig(path=str(folder / "data")),), validation_interval=3, validation_rows=4,
    )  # fmt: skip
    run = RunConfig(
        name="small", out=str(folder / "run"), tokenizer=str(folder / "tokenizer"),
        model=ModelConfig(language=replace(TINY, vocab_size=512), vision=TINY_CLIP), parallel=ParallelConfig(),
        stages=(stage, replace(stage, name="instruct", num_steps=4)), precision="fp32",
        checkpoint=CheckpointConfig(interval=3), log=LogConfig(interval=2, tensorboard=True), num_threads=1,
    )  # fmt: skip
    return replace(run, **changes)
