"""Safetensors: what others wrote is read, what we write others read, and a damaged folder is refused in one line."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.convert.mapped import TensorSpec
from megatron_medgpt.convert.safetensor import INDEX, SafetensorsFolder, SafetensorsWriter

TENSORS = {
    "a": torch.arange(24, dtype=torch.float32).view(4, 6),
    "b": torch.arange(7, dtype=torch.uint8),
    "c": torch.randn(3, 2).bfloat16(),
    "d": torch.tensor(5.0),
    "e": torch.zeros(0, 4),
}


def _write(folder, *, max_shard_bytes=1 << 30, in_parts=False):
    folder.mkdir(exist_ok=True)
    writer = SafetensorsWriter(
        folder, {n: TensorSpec.of(t) for n, t in TENSORS.items()}, max_shard_bytes=max_shard_bytes
    )
    for name, tensor in TENSORS.items():
        parts = [(i, tensor[i : i + 1]) for i in range(len(tensor))] if in_parts and tensor.ndim else [(0, tensor)]
        for first, part in reversed(parts):
            writer.write(name, first, part)
    writer.finish()


@pytest.mark.parametrize("in_parts", [False, True])
def test_the_safetensors_library_reads_what_we_write(tmp_path, in_parts):
    _write(tmp_path / "m", in_parts=in_parts)
    read = load_file(tmp_path / "m" / "model.safetensors")
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in TENSORS.items())


def test_shards_and_their_index_read_back_whole_and_in_parts(tmp_path):
    _write(tmp_path / "m", max_shard_bytes=50)
    assert len(list((tmp_path / "m").glob("*.safetensors"))) == 2
    folder = SafetensorsFolder(tmp_path / "m")
    assert set(folder.names) == set(TENSORS)
    assert all(torch.equal(folder.tensor(name), tensor) for name, tensor in TENSORS.items())
    assert torch.equal(folder.tensor("a", 1, 3), TENSORS["a"][1:3])
    folder.forget("a", 1, 3)
    assert torch.equal(folder.tensor("a", 1, 3), TENSORS["a"][1:3])


def test_what_the_library_wrote_is_read(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    folder = SafetensorsFolder(tmp_path)
    assert all(torch.equal(folder.tensor(name), tensor) for name, tensor in TENSORS.items())


def _shorten(path, num_bytes):
    path.write_bytes(path.read_bytes()[:-num_bytes])


def _edit_header(path, edit):
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    text = edit(raw[8 : 8 + length].decode()).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def _edit_index(path, edit):
    content = json.loads(path.read_text())
    edit(content["weight_map"])
    path.write_text(json.dumps(content))


DAMAGE = {
    "truncated by a byte": (lambda m: _shorten(m / "model-00001-of-00002.safetensors", 1), "truncated"),
    "cut inside the header": (lambda m: (m / "model-00001-of-00002.safetensors").write_bytes(b"\xff" * 20), "header"),
    "empty shard": (lambda m: (m / "model-00002-of-00002.safetensors").write_bytes(b""), "0 bytes"),
    "missing shard": (lambda m: (m / "model-00002-of-00002.safetensors").unlink(), "is missing"),
    "bytes after the end": (
        lambda m: (m / "model-00001-of-00002.safetensors").open("ab").write(b"x"), "header describes",
    ),
    "index names a file outside": (
        lambda m: _edit_index(m / INDEX, lambda w: w.update(a="../model-00001-of-00002.safetensors")),
        "no file of this folder",
    ),
    "index names an absent tensor": (
        lambda m: _edit_index(m / INDEX, lambda w: w.update(ghost="model-00001-of-00002.safetensors")), "ghost",
    ),
    "index leaves a tensor out": (lambda m: _edit_index(m / INDEX, lambda w: w.pop("b")), "does not name"),
    "index is no JSON": (lambda m: (m / INDEX).write_text("{"), "not readable JSON"),
    "index says a tensor twice": (
        lambda m: (m / INDEX).write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'),
        "stands twice",
    ),
    "unknown dtype": (
        lambda m: _edit_header(m / "model-00001-of-00002.safetensors", lambda t: t.replace('"F32"', '"F8_E4M3"')),
        "F8_E4M3",
    ),
    "shape that does not fit": (
        lambda m: _edit_header(m / "model-00001-of-00002.safetensors", lambda t: t.replace("[4,6]", "[4,7]")),
        "do not fit",
    ),
    "negative shape": (
        lambda m: _edit_header(m / "model-00001-of-00002.safetensors", lambda t: t.replace("[4,6]", "[-4,-6]")),
        "has the shape",
    ),
    "no model at all": (lambda m: [path.unlink() for path in m.iterdir()], "holds no model.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused_by_name_of_what_is_wrong(tmp_path, damage):
    _write(tmp_path / "m", max_shard_bytes=50)
    breaks, message = DAMAGE[damage]
    breaks(tmp_path / "m")
    with pytest.raises(UsageError, match=message):
        SafetensorsFolder(tmp_path / "m")


def test_a_tensor_in_two_files_is_refused(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(UsageError, match="tensor a stands in"):
        SafetensorsFolder(tmp_path)


def test_a_file_that_became_shorter_is_an_error_of_its_disk_and_does_not_end_the_process(tmp_path):
    """A page that cannot be read ends a process that merely looks at it (SIGBUS)."""
    release = tuple(int(number) for number in platform.release().split("-")[0].split(".")[:2])
    if sys.platform != "linux" or release < (5, 14):
        pytest.skip("needs MADV_POPULATE_READ of Linux 5.14")
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1 << 16)}, path)
    script = (
        "import os, sys; from pathlib import Path; from megatron_medgpt.convert.safetensor import SafetensorsFolder\n"
        "folder = SafetensorsFolder(Path(sys.argv[1])); os.truncate(folder.files[0], 4096)\n"
        "try: folder.tensor('a').sum()\n"
        "except OSError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.returncode
    assert "became shorter" in done.stdout and str(path) in done.stdout
