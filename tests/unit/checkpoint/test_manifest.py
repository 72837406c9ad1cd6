from __future__ import annotations

import json
import os

import pytest

from megatron_medgpt.checkpoint.manifest import (
    MANIFEST,
    CheckpointFacts,
    FileEntry,
    altered_files,
    check_listing,
    hash_file,
    read_manifest,
    step_folders,
    write_manifest,
)
from megatron_medgpt.config.errors import UsageError

FACTS = CheckpointFacts(step=7, stage_name="align", row=56, lineage=("step-00000003@ab",), extra={"lr": 0.1})


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.distcp").write_bytes(b"weights" * 100)
    (tmp_path / "b.distcp").write_bytes(b"moments" * 50)
    write_manifest(tmp_path, FACTS, {name: hash_file(tmp_path / name) for name in ("a.distcp", "b.distcp")})
    return tmp_path


def test_facts_come_back_as_they_were(folder):
    assert read_manifest(folder).facts == FACTS


def test_every_changed_byte_of_the_manifest_is_refused(folder):
    original = (folder / MANIFEST).read_bytes()
    for position in range(len(original)):
        broken = bytearray(original)
        broken[position] ^= 1
        (folder / MANIFEST).write_bytes(broken)
        with pytest.raises(UsageError):
            read_manifest(folder)


def test_every_truncation_of_the_manifest_is_refused(folder):
    original = (folder / MANIFEST).read_bytes()
    for length in range(len(original)):
        (folder / MANIFEST).write_bytes(original[:length])
        with pytest.raises(UsageError):
            read_manifest(folder)


def test_a_manifest_of_another_schema_names_both(folder):
    body = json.loads((folder / MANIFEST).read_bytes())
    import megatron_medgpt.checkpoint.manifest as manifest_room

    body.pop("digest")
    body["schema"] = 99
    body["digest"] = manifest_room._digest(body)
    (folder / MANIFEST).write_bytes(manifest_room._canonical(body))
    with pytest.raises(UsageError, match="schema 99, this version reads 1"):
        read_manifest(folder)


def test_facts_that_are_not_json_are_refused_when_written(tmp_path):
    with pytest.raises(TypeError):
        write_manifest(tmp_path, CheckpointFacts(step=1, extra={"state": object()}), {})
    assert not (tmp_path / MANIFEST).exists()


@pytest.mark.parametrize("make", ["extra", "missing", "longer", "link", "folder"])
def test_a_listing_that_differs_is_refused_without_reading_content(folder, make):
    if make == "extra":
        (folder / "c.distcp").write_bytes(b"")
    elif make == "missing":
        (folder / "a.distcp").unlink()
    elif make == "longer":
        with open(folder / "a.distcp", "ab") as stream:
            stream.write(b"x")
    elif make == "link":
        content = (folder / "a.distcp").read_bytes()
        (folder.parent / "elsewhere").write_bytes(content)
        (folder / "a.distcp").unlink()
        (folder / "a.distcp").symlink_to(folder.parent / "elsewhere")
    else:
        (folder / "a.distcp").unlink()
        (folder / "a.distcp").mkdir()
    with pytest.raises(UsageError, match=r"[ac]\.distcp"):
        check_listing(folder, read_manifest(folder))


def test_a_pipe_in_the_place_of_an_empty_file_is_refused_rather_than_waited_for(tmp_path):
    write_manifest(tmp_path, FACTS, {"empty": FileEntry(size_bytes=0, sha256="")})
    os.mkfifo(tmp_path / "empty")
    with pytest.raises(UsageError, match="empty not a plain file"):
        check_listing(tmp_path, read_manifest(tmp_path))


@pytest.mark.parametrize("num_parts", [1, 2, 3, 5])
def test_ranks_together_look_at_every_file_once(folder, num_parts, monkeypatch):
    manifest = read_manifest(folder)
    seen = []
    monkeypatch.setattr(
        "megatron_medgpt.checkpoint.manifest.hash_file", lambda path, _=None: seen.append(path.name) or hash_file(path)
    )
    for part in range(num_parts):
        assert altered_files(folder, manifest, part=part, num_parts=num_parts) == []
    assert sorted(seen) == ["a.distcp", "b.distcp"]


def test_step_folders_are_ordered_by_number_and_nothing_else_counts(tmp_path):
    for name in ("step-00000002", "step-00000010", "step-100000000", "step-x", ".tmp-step-00000011.ab", "latest"):
        (tmp_path / name).mkdir()
    assert [path.name for path in step_folders(tmp_path)] == ["step-100000000", "step-00000010", "step-00000002"]
