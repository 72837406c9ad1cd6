"""A checkpoint whose manifest is right but whose content attacks: nothing of it may run."""

from __future__ import annotations

import io
import os
import pickle
import zipfile

import pytest
import torch
from sharded_example import blank, write
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from megatron_medgpt.checkpoint.load import load_checkpoint
from megatron_medgpt.checkpoint.manifest import MANIFEST, hash_file, read_manifest, write_manifest
from megatron_medgpt.checkpoint.metadata import COMMON, METADATA
from megatron_medgpt.config.errors import UsageError


class TouchesFile:
    """Runs ``os.system`` when it is unpickled."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.fixture
def canary(tmp_path):
    return tmp_path / "canary"


@pytest.fixture
def checkpoint(tmp_path):
    return write(tmp_path / "run", 1)


def seal(path):
    """Give the folder a manifest that agrees with its altered content, as an attacker would."""
    facts = read_manifest(path).facts
    (path / MANIFEST).unlink()
    write_manifest(path, facts, {file.name: hash_file(file) for file in path.iterdir()})


def metadata_of(path) -> Metadata:
    return pickle.loads((path / METADATA).read_bytes())


def test_the_attack_works_on_plain_pickle(canary):
    pickle.loads(pickle.dumps(TouchesFile(canary)))
    assert canary.exists()


@pytest.mark.parametrize("place", ["whole", "inside", "protocol 0"])
def test_a_pickle_in_the_metadata_does_not_run(checkpoint, canary, place):
    metadata = metadata_of(checkpoint)
    if place == "inside":
        metadata.planner_data = {"x": TouchesFile(canary)}
        content = pickle.dumps(metadata)
    else:
        content = pickle.dumps(TouchesFile(canary), protocol=0 if place == "protocol 0" else None)
    (checkpoint / METADATA).write_bytes(content)
    seal(checkpoint)
    with pytest.raises(UsageError, match="which no checkpoint needs"):
        load_checkpoint(checkpoint, blank())
    assert not canary.exists()


@pytest.mark.parametrize("name", ["builtins.eval", "torch.load", "torch.hub.load", "os.system", "numpy.load"])
def test_globals_outside_the_list_are_named(checkpoint, name):
    module, _, function = name.rpartition(".")
    (checkpoint / METADATA).write_bytes(f"c{module}\n{function}\n(S'x'\ntR.".encode())
    seal(checkpoint)
    with pytest.raises(UsageError, match=rf"wants to load (posix|{module})\.{function}"):
        load_checkpoint(checkpoint, blank())


def test_attributes_of_allowed_globals_cannot_be_reached(checkpoint):
    content = b"\x80\x04\x8c\x05torch\x94\x8c\x10serialization.os\x94\x93."
    (checkpoint / METADATA).write_bytes(content)
    seal(checkpoint)
    with pytest.raises(UsageError, match=r"torch\.serialization\.os"):
        load_checkpoint(checkpoint, blank())


def test_a_pickled_object_among_the_tensors_is_refused_unread(checkpoint, canary):
    metadata = metadata_of(checkpoint)
    metadata.state_dict_metadata["head.bias"] = BytesStorageMetadata()
    (checkpoint / METADATA).write_bytes(pickle.dumps(metadata))
    seal(checkpoint)
    with pytest.raises(UsageError, match=r"which no checkpoint needs|pickled object"):
        load_checkpoint(checkpoint, blank())


def test_a_pickle_in_common_does_not_run(checkpoint, canary):
    evil = io.BytesIO()
    torch.save({"args": TouchesFile(canary)}, evil)
    (checkpoint / COMMON).write_bytes(evil.getvalue())
    seal(checkpoint)
    with pytest.raises(UsageError, match="cannot be read"):
        load_checkpoint(checkpoint, blank())
    assert not canary.exists()


def test_a_pickle_in_the_place_of_a_tensor_does_not_run(checkpoint, canary):
    metadata = metadata_of(checkpoint)
    shard = checkpoint / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    index, info = next((i, s) for i, s in metadata.storage_data.items() if i.fqn == "embedding.weight")
    evil = io.BytesIO()
    torch.save(TouchesFile(canary), evil)
    assert len(evil.getvalue()) <= info.length
    content[info.offset : info.offset + len(evil.getvalue())] = evil.getvalue()
    shard.write_bytes(content)
    metadata.storage_data[index].length = len(evil.getvalue())
    (checkpoint / METADATA).write_bytes(pickle.dumps(metadata))
    assert zipfile.is_zipfile(evil)
    seal(checkpoint)
    with pytest.raises(UsageError, match="cannot be read"):
        load_checkpoint(checkpoint, blank())
    assert not canary.exists()


def test_broken_metadata_is_refused_in_our_words(checkpoint):
    original = (checkpoint / METADATA).read_bytes()
    for length in (0, 1, len(original) // 2, len(original) - 1):
        (checkpoint / METADATA).write_bytes(original[:length])
        seal(checkpoint)
        with pytest.raises(UsageError):
            load_checkpoint(checkpoint, blank())
