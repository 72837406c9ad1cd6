"""Conversions onto a disk that is too small, and onto one that another program fills meanwhile: a real, small tmpfs."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from megatron_medgpt.config.errors import WorkError
from megatron_medgpt.convert import command
from megatron_medgpt.convert.safetensor import SafetensorsFolder
from megatron_medgpt.convert.stored import StoredCheckpoint
from tests.published_models import CLIP, random_weights, write_checkpoint, write_gpt_oss, write_tower
from tests.small_data import small_tokenizer

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
_PAGE_BYTES = 4096


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A disk of 12 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mount is not allowed here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)  # lazily: maps of its files may still be open


class _Work:
    """Both conversions of a small model, from a source that stays on another disk."""

    def __init__(self, folder: Path, way: str) -> None:
        self.folder = folder / "source"
        weights = random_weights(CLIP)
        if way == "import":
            self._language = write_gpt_oss(self.folder / "language", CLIP, weights)
            self._tower = write_tower(self.folder / "tower", CLIP, weights)
        else:
            small_tokenizer(self.folder / "tokenizer")
            self._checkpoint = write_checkpoint(self.folder / "checkpoint", CLIP, weights)
        self.way = way
        self._before = self._hashes()

    def run(self, out: Path) -> None:
        if self.way == "import":
            command.hf_to_megatron(self._language, out, vision=self._tower, num_threads=1)
        else:
            command.megatron_to_hf(
                self._checkpoint, out, dtype="fp32", tokenizer=self.folder / "tokenizer", num_threads=1
            )

    def check_whole(self, out: Path) -> None:
        if self.way == "import":
            assert torch.equal(
                StoredCheckpoint(out).tensor("language.output_layer.weight"),
                SafetensorsFolder(self._language).tensor("lm_head.weight"),
            )
        else:
            assert command.verify(self._checkpoint, out, logits=False) == 0
            assert (out / "README.md").is_file() and (out / "chat_template.jinja").is_file()

    def check_source(self) -> None:
        assert self._hashes() == self._before

    def _hashes(self) -> dict[Path, bytes]:
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        return {path: hashlib.sha256(path.read_bytes()).digest() for path in files}


@pytest.fixture(params=["import", "export"])
def work(tmp_path, request) -> _Work:
    return _Work(tmp_path, request.param)


def _fill(disk: Path, num_bytes_left: int) -> None:
    with open(disk / "other", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - num_bytes_left)


def _refused(convert: Callable[[], None], says: str) -> None:
    with pytest.raises(WorkError, match=says) as raised:
        convert()
    assert raised.value.exit_code == 1 and "\n" not in str(raised.value)


def test_a_disk_too_small_is_said_before_anything_is_written(disk, work):
    _fill(disk, 1_000_000)
    _refused(lambda: work.run(disk / "out"), r"needs .* MB and its disk has \d\.\d\d MB free; free some space")
    assert [path.name for path in disk.iterdir()] == ["other"]
    work.check_source()


def test_a_disk_that_fills_up_meanwhile_leaves_nothing_half_written_wherever_it_ends(disk, work, monkeypatch):
    """Another program takes the space right after the conversion looked at it: all, all but the last page that is
    needed, and much between, so that weights, configuration, tokenizer, manifest each meet the end of the disk."""
    work.run(disk / "out")
    needed = sum(-(-path.stat().st_size // _PAGE_BYTES) * _PAGE_BYTES for path in (disk / "out").iterdir())
    shutil.rmtree(disk / "out")
    room = [needed * part // 5 for part in range(5)] + [needed - pages * _PAGE_BYTES for pages in (40, 15, 6, 3, 2, 1)]
    for num_bytes_left in room:
        looked = shutil.disk_usage

        def look_and_lose(path, num_bytes_left=num_bytes_left, looked=looked):
            found = looked(path)
            monkeypatch.setattr(shutil, "disk_usage", looked)
            _fill(disk, num_bytes_left)
            return found

        monkeypatch.setattr(shutil, "disk_usage", look_and_lose)
        _refused(lambda: work.run(disk / "out"), r"out was not written: \[Errno 28\] No space left on device")
        assert [path.name for path in disk.iterdir()] == ["other"], num_bytes_left
        (disk / "other").unlink()
    work.check_source()
    work.run(disk / "out")
    work.check_whole(disk / "out")
