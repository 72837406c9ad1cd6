"""A small tokenizer and small datasets, written by the writer under test."""

import numpy as np
import pytest
from png_examples import png_of

from megatron_medgpt.data.manifest import Store, write_manifest
from megatron_medgpt.data.shard_writer import ShardWriter
from megatron_medgpt.data.text import Tokenizer, Turn, train_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Tokenizer:
    texts = ["Where is the lesion?", "upper left", "How many lesions are there?", "three"]
    return train_tokenizer(texts, tmp_path_factory.mktemp("tokenizer"), 320)


@pytest.fixture
def write_dataset(tmp_path, tokenizer):
    """Write a dataset of dialogues with 0 to 2 images each; sample i has the id i in hexadecimal."""

    def write(name: str = "dataset", num_samples: int = 40, per_shard: int = 15, first_id: int = 0):
        folder = tmp_path / name
        folder.mkdir()
        rng = np.random.default_rng(num_samples)
        shards, writer = [], None
        for number in range(num_samples):
            if number % per_shard == 0:
                writer = ShardWriter(folder, number // per_shard, Store())
            num_images = int(rng.integers(0, 3))
            question = "<image>" * num_images + "Where is the lesion? " * int(rng.integers(1, 4))
            rendered = tokenizer.render([Turn("user", question), Turn("assistant", f"upper left {number}")])
            first = writer.add_images([png_of(10 * number + k) for k in range(num_images)])
            writer.add_sample(
                sample_id=f"{first_id + number:x}",
                token_ids=rendered.token_ids,
                target_spans=rendered.target_spans,
                modality=number % 3,
                num_images=num_images,
                first_image=first,
            )
            if number % per_shard == per_shard - 1 or number == num_samples - 1:
                shards.append(writer.close())
        facts = {
            "sha256": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "image_mark_id": tokenizer.image_mark_id,
            "pad_id": tokenizer.pad_id,
        }
        write_manifest(
            folder, shards, tokenizer=facts, store=Store(), num_records=num_samples, rejects={}, provenance={}
        )
        return folder

    return write
