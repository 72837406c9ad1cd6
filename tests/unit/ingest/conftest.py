"""A tokenizer and a key for ingest."""

import pytest

from megatron_medgpt.data.text import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["Describe the image.", "A round lesion.", "Where is it?"], folder, 320)
    return folder


@pytest.fixture
def key_file(tmp_path):
    path = tmp_path / "key"
    path.write_bytes(b"k" * 32)
    return path
