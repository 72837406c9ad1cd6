from __future__ import annotations

import logging
import os
import shutil
import subprocess
import threading
from dataclasses import replace

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing import load_plain_tensors as megatron_reads
from megatron.core.dist_checkpointing.mapping import ShardedObject
from sharded_example import SHAPES, blank, sharded, tensors, write

from megatron_medgpt.checkpoint import ranks
from megatron_medgpt.checkpoint.find import find_latest, read_facts, resolve_checkpoint, verify
from megatron_medgpt.checkpoint.load import load_checkpoint, load_rank_state
from megatron_medgpt.checkpoint.manifest import CheckpointFacts
from megatron_medgpt.checkpoint.save import prune, save_checkpoint
from megatron_medgpt.config.errors import UsageError, WorkError


def test_what_was_saved_comes_back_bit_for_bit_with_its_facts(tmp_path):
    path = write(tmp_path, 3, stage_name="align", row=24)
    loaded, facts = load_checkpoint(path, blank())
    for name, value in tensors(3).items():
        assert torch.equal(loaded["model0"][name], value)
    assert (facts.step, facts.stage_name, facts.row) == (3, "align", 24)
    assert facts.versions["torch"]
    assert read_facts(path) == facts


def test_megatron_core_reads_the_folder_without_our_help(tmp_path):
    read = megatron_reads(str(write(tmp_path, 1)))
    assert all(torch.equal(read[name], value) for name, value in tensors(1).items())


def test_the_folder_holds_no_path_of_the_machine_that_wrote_it(tmp_path):
    path = write(tmp_path, 1)
    for file in path.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file.name


def test_latest_names_the_newest_folder(tmp_path):
    write(tmp_path, 1)
    path = write(tmp_path, 2)
    assert (tmp_path / "latest").read_text() == "step-00000002\n"
    assert find_latest(tmp_path) == path


def test_a_run_without_checkpoints_has_no_latest(tmp_path):
    assert find_latest(tmp_path) is None
    assert find_latest(tmp_path / "not there") is None


def test_an_existing_checkpoint_is_never_overwritten(tmp_path):
    path = write(tmp_path, 1)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(UsageError, match="never overwritten"):
        save_checkpoint(tmp_path, 1, sharded(tensors(9)), CheckpointFacts(step=1))
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


def test_a_save_clears_what_dead_saves_left(tmp_path):
    (tmp_path / ".tmp-step-00000001.dead").mkdir(parents=True)
    (tmp_path / ".trash-step-00000000.dead").mkdir()
    write(tmp_path, 1)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000001"]


def test_too_little_space_is_said_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(WorkError, match="needs"):
        write(tmp_path, 1)
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_disk_that_fills_up_leaves_the_last_checkpoint_and_no_litter(tmp_path, monkeypatch):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mount is not allowed here: {mounted.stderr.decode().strip()}")
    try:
        kept = write(tmp_path, 1)
        usage = shutil.disk_usage(tmp_path)
        looks_free = iter([usage._replace(free=10**9)])
        real = shutil.disk_usage
        monkeypatch.setattr(shutil, "disk_usage", lambda path: next(looks_free, None) or real(path))
        big = {"big": ShardedTensor.from_rank_offsets("big", torch.ones(200_000))}
        with pytest.raises(WorkError, match=r"was not written.*0\.0 MB were free"):
            save_checkpoint(tmp_path, 2, big, CheckpointFacts(step=2))
        assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000001"]
        assert find_latest(tmp_path) == kept
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_folder_that_cannot_be_made_is_said_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkError, match="cannot be written"):
        write(tmp_path / "file" / "checkpoints", 1)


def test_anything_but_tensors_is_refused_rather_than_pickled(tmp_path):
    for leaf in (ShardedObject("rng", b"state", (1,), (0,)), {"lr": 0.1}):
        with pytest.raises(WorkError, match="not a sharded tensor"):
            save_checkpoint(tmp_path, 1, {"model0": leaf}, CheckpointFacts(step=1))
    assert find_latest(tmp_path) is None


def test_missing_and_unexpected_tensors_are_both_named(tmp_path):
    path = write(tmp_path, 1)
    values = tensors()
    values["new.weight"] = values.pop("head.bias")
    with pytest.raises(UsageError, match=r"lacks new\.weight and also holds head\.bias"):
        load_checkpoint(path, sharded(values))


def test_another_shape_is_named_with_both_shapes(tmp_path):
    path = write(tmp_path, 1)
    values = tensors()
    values["head.bias"] = torch.zeros(6)
    with pytest.raises(UsageError, match=r"head\.bias has shape \[5\], the model's is \[6\]"):
        load_checkpoint(path, sharded(values))


def test_optimizer_tensors_may_stay_unread_only_when_asked(tmp_path):
    values = tensors(1)
    values["optimizer.state.exp_avg.head.bias"] = torch.ones(5)
    path = save_checkpoint(tmp_path, 1, sharded(values), CheckpointFacts(step=1))
    with pytest.raises(UsageError, match="also holds optimizer"):
        load_checkpoint(path, blank())
    loaded, _ = load_checkpoint(path, blank(), weights_only=True)
    assert torch.equal(loaded["model0"]["head.bias"], values["head.bias"])


def test_a_change_of_dtype_is_said(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("megatron_medgpt"), "propagate", True)
    path = write(tmp_path, 1)
    halves = sharded({name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in SHAPES.items()})
    loaded, _ = load_checkpoint(path, halves)
    assert torch.equal(loaded["model0"]["head.bias"], tensors(1)["head.bias"].bfloat16())
    assert "3 tensors change dtype" in caplog.text


def test_rank_state_returns_to_the_layout_that_wrote_it_only(tmp_path):
    facts = CheckpointFacts(step=1, layout={"tensor": 2, "layers_per_chunk": (4,)})
    path = save_checkpoint(tmp_path, 1, sharded(tensors()), facts, rank_state={"torch": "abc"})
    assert load_rank_state(path, {"tensor": 2, "layers_per_chunk": (4,)}) == {"torch": "abc"}
    assert load_rank_state(path, {"tensor": 1, "layers_per_chunk": (4,)}) is None
    assert load_rank_state(write(tmp_path, 2), {}) is None


def test_retention_keeps_the_newest_the_ends_of_stages_and_what_is_broken(tmp_path):
    for step in range(1, 7):
        write(tmp_path, step, stage_end=step == 2)
    (tmp_path / "step-00000003" / "common.pt").unlink()
    (tmp_path / "step-00000006" / "manifest.json").unlink()
    removed = prune(tmp_path, keep=2)
    assert [path.name for path in removed] == ["step-00000001"]
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [f"step-0000000{n}" for n in (2, 3, 4, 5, 6)]


def test_retention_never_removes_the_only_whole_one(tmp_path):
    write(tmp_path, 1)
    assert prune(tmp_path, keep=0) == []


def test_save_prunes_after_it_has_published(tmp_path):
    for step in range(1, 5):
        save_checkpoint(tmp_path, step, sharded(tensors()), CheckpointFacts(step=step), keep=2)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000003", "step-00000004"]


def test_damage_falls_back_to_the_one_before_and_says_why(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("megatron_medgpt"), "propagate", True)
    whole, damaged = write(tmp_path, 1), write(tmp_path, 2)
    flip(damaged / "__0_0.distcp", 700)
    assert find_latest(tmp_path) == whole
    assert "step-00000002" in caplog.text
    assert "sha256 differs" in caplog.text


def test_a_checkpoint_is_found_by_its_run_its_folder_and_latest(tmp_path):
    write(tmp_path / "checkpoints", 1)
    newest = write(tmp_path / "checkpoints", 2)
    for given in (newest, tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "latest"):
        assert resolve_checkpoint(given) == newest
    with pytest.raises(UsageError, match="is no checkpoint and holds none"):
        resolve_checkpoint(tmp_path / "elsewhere")


def test_a_checkpoint_under_the_name_of_another_step_is_passed_over(tmp_path):
    first = write(tmp_path, 1)
    shutil.copytree(first, tmp_path / "step-00000009")
    assert find_latest(tmp_path) == first
    shutil.copytree(first, tmp_path / "best")
    assert load_checkpoint(tmp_path / "best", blank())[1].step == 1


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """The order that a power cut needs: contents, the folder, the rename, its parent, and only then latest."""
    events = []
    real = {name: getattr(os, name) for name in ("fsync", "rename", "replace")}

    def fsync(descriptor):
        events.append(("fsync", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        real["fsync"](descriptor)

    def move(kind):
        return lambda old, new: (events.append((kind, os.path.basename(new))), real[kind](old, new))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", move("rename"))
    monkeypatch.setattr(os, "replace", move("replace"))
    path = save_checkpoint(tmp_path, 1, sharded(tensors()), CheckpointFacts(step=1), rank_state={})
    published = events.index(("rename", path.name))
    contents = [name for kind, name in events[:published] if kind == "fsync"]
    assert {file.name for file in path.iterdir()} <= set(contents)
    assert contents[-1].startswith(".tmp-step-00000001")
    assert [(kind, name.partition(".")[0] or name[:8]) for kind, name in events[published:]] == [
        ("rename", path.name), ("fsync", tmp_path.name), ("fsync", ".latest."), ("replace", "latest"),
        ("fsync", tmp_path.name),
    ]  # fmt: skip


def test_garbage_in_latest_changes_nothing(tmp_path):
    path = write(tmp_path, 1)
    for garbage in (b"", b"step-99999999\n", b"\x00\xff", b"../../etc"):
        (tmp_path / "latest").write_bytes(garbage)
        assert find_latest(tmp_path) == path


def test_a_run_with_only_damaged_checkpoints_does_not_start_afresh(tmp_path):
    flip(write(tmp_path, 1) / "__0_0.distcp", 700)
    with pytest.raises(UsageError, match="none is whole"):
        find_latest(tmp_path)


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)


def test_every_kind_of_damage_is_refused_before_anything_is_unpickled(tmp_path, monkeypatch):
    def unpickled(*arguments, **options):
        raise AssertionError("unpickled before the content was verified")

    monkeypatch.setattr("megatron_medgpt.checkpoint.load.stored_tensors", unpickled)
    monkeypatch.setattr("megatron_medgpt.checkpoint.load.read_tensors", unpickled)
    path = write(tmp_path / "run", 1)
    files = sorted(file for file in path.iterdir())
    damages = 0
    for file in files:
        original = file.read_bytes()
        for position in {0, len(original) // 3, len(original) // 2, len(original) - 1}:
            flip(file, position)
            with pytest.raises(UsageError):
                load_checkpoint(path, blank())
            file.write_bytes(original)
            damages += 1
        for damaged in (original[:-1], original[: len(original) // 2], b"", bytes(len(original))):
            file.write_bytes(damaged)
            with pytest.raises(UsageError):
                load_checkpoint(path, blank())
            file.write_bytes(original)
            damages += 1
        file.unlink()
        with pytest.raises(UsageError):
            load_checkpoint(path, blank())
        file.write_bytes(original)
    first, second = path / "__0_0.distcp", path / "common.pt"
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    with pytest.raises(UsageError):
        verify(path)
    assert damages == 8 * len(files)


def test_a_missing_checkpoint_is_wrong_usage(tmp_path):
    for path, words in ((tmp_path / "no", "no such folder"), (tmp_path, "never finished")):
        with pytest.raises(UsageError, match=words):
            load_checkpoint(path, blank())


def test_facts_must_agree_with_the_folder_name(tmp_path):
    with pytest.raises(ValueError, match=r"facts\.step=2"):
        save_checkpoint(tmp_path, 1, sharded(tensors()), replace(CheckpointFacts(step=1), step=2))


def test_a_save_that_hangs_ends_the_process_with_its_own_exit_code(tmp_path, monkeypatch, capsys):
    codes = []
    released = threading.Event()
    monkeypatch.setattr(ranks.os, "_exit", lambda code: (codes.append(code), released.set()))
    monkeypatch.setattr(ranks.faulthandler, "dump_traceback", lambda file: None)
    monkeypatch.setattr("megatron_medgpt.checkpoint.save.write_tensors", lambda *a, **k: released.wait(600))
    with pytest.raises(WorkError):  # only because this test keeps the process alive
        save_checkpoint(tmp_path, 1, sharded(tensors()), CheckpointFacts(step=1), timeout_s=0.2)
    assert codes == [ranks.EXIT_HUNG]
    assert "took longer than" in capsys.readouterr().err
