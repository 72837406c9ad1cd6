"""The dataset format: megatron-core reads it, damage is found, and nothing is trusted that was not checked."""

import contextlib
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from png_examples import png_of

from megatron_medgpt.config.errors import MedgptError, UsageError, WorkError
from megatron_medgpt.data import shards
from megatron_medgpt.data.index import IndexedFile, IndexedWriter
from megatron_medgpt.data.manifest import Store, read_manifest, sha256_of, write_manifest
from megatron_medgpt.data.shard_writer import ShardWriter
from megatron_medgpt.data.shards import Dataset
from megatron_medgpt.data.stored import pack_pixels, unpack_pixels
from megatron_medgpt.data.verify import verify

HEALTH = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def test_megatron_core_reads_what_is_written_here(write_dataset):
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    folder = write_dataset()
    dataset = Dataset(folder)
    text = indexed.IndexedDataset(str(folder / "shard-00001.text"), mmap=True)
    assert text.document_indices.tolist() == list(range(0, len(text) + 1, 3))
    for row in range(15):
        np.testing.assert_array_equal(text[3 * row], dataset[15 + row].token_ids)
        np.testing.assert_array_equal(text[3 * row + 1], dataset[15 + row].target_spans_flat)
    image = indexed.IndexedDataset(str(folder / "shard-00001.image"), mmap=True)
    for number in range(len(image)):
        np.testing.assert_array_equal(image[number], dataset.image((1, number)))


@pytest.mark.parametrize("dtype", ["int32", "uint8"])
def test_megatron_core_writes_the_same_bytes(tmp_path, dtype):
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    torch = pytest.importorskip("torch")
    sequences = [[1, 2, 3], [], [4], [200, 5]]
    ours = IndexedWriter(tmp_path / "ours", dtype)
    theirs = indexed.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.dtype(dtype).type)
    for number, sequence in enumerate(sequences):
        ours.add(np.asarray(sequence))
        theirs.add_item(torch.tensor(sequence, dtype=torch.int64))
        if number % 2:
            ours.end_document()
            theirs.end_document()
    ours.close()
    theirs.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()
    opened = IndexedFile(tmp_path / "theirs", dtype)
    assert [opened[i].tolist() for i in range(4)] == sequences


def test_every_sample_comes_back_with_its_own_images(write_dataset, tokenizer):
    dataset = Dataset(write_dataset(num_samples=40, per_shard=15))
    for number in range(40):
        sample = dataset[number]
        assert int(sample.sample_id, 16) == number
        start, end = sample.target_spans_flat
        assert tokenizer.decode(sample.token_ids[start:end]) == f"upper left {number}"
        assert [bytes(dataset.image(k)) for k in sample.image_keys] == [
            png_of(10 * number + k) for k in range(dataset.num_images[number])
        ]


def test_a_whole_dataset_has_no_faults(write_dataset):
    assert list(verify(write_dataset())) == []


def _every_file(folder):
    return sorted(path for path in folder.iterdir() if path.name.startswith("shard"))


@pytest.mark.parametrize("name", ["dataset.json", "rejects.jsonl", "tokenizer.json"])
@pytest.mark.parametrize("change", ["flipped", "truncated", "missing", "longer"])
def test_verify_finds_damage_of_every_other_file(write_dataset, tokenizer, name, change):
    folder = write_dataset(num_samples=6, per_shard=3)
    (folder / "tokenizer.json").write_bytes(tokenizer.tokenizer_json)
    (folder / "rejects.jsonl").write_text('{"record": 7, "reason": "empty-file"}\n')
    manifest = read_manifest(folder)[0]
    write_manifest(
        folder, manifest.shards, tokenizer=manifest.tokenizer, store=manifest.store, num_records=7,
        rejects={"empty-file": 1}, provenance={"licences": {"CC0": 6}},
    )  # fmt: skip
    assert list(verify(folder)) == []
    path = folder / name
    whole = path.read_bytes()
    step = {"flipped": max(1, len(whole) // 400), "truncated": max(1, len(whole) // 20)}.get(change, len(whole))
    for offset in range(0, len(whole), step):
        if change == "missing":
            path.unlink()
        elif change == "flipped":
            # A space for a line break and the like leave JSON as it was: the seal counts bytes.
            path.write_bytes(whole[:offset] + bytes([whole[offset] ^ 0x2A]) + whole[offset + 1 :])
        else:
            path.write_bytes(whole + b" " if change == "longer" else whole[:offset])
        try:
            faults = list(verify(folder))
        except MedgptError as error:
            faults = [str(error)]
        assert faults, offset
    path.write_bytes(whole)
    assert list(verify(folder)) == []


def test_a_dataset_without_a_seal_is_read_as_before(write_dataset):
    folder = write_dataset(num_samples=6, per_shard=3)
    raw = json.loads((folder / "dataset.json").read_text())
    del raw["seal"], raw["files"]
    (folder / "dataset.json").write_text(json.dumps(raw))
    assert list(verify(folder)) == []


def test_verify_finds_every_flipped_byte_of_the_small_files_and_samples_of_the_large(write_dataset):
    folder = write_dataset(num_samples=6, per_shard=3)
    for path in _every_file(folder):
        whole = path.read_bytes()
        offsets = range(len(whole)) if len(whole) < 200 else range(0, len(whole), max(1, len(whole) // 40))
        for offset in offsets:
            damaged = bytearray(whole)
            damaged[offset] ^= 0x10
            path.write_bytes(damaged)
            assert list(verify(folder)), f"{path.name} byte {offset}"
        path.write_bytes(whole)
    assert list(verify(folder)) == []


@pytest.mark.parametrize("change", ["truncated", "longer", "missing", "swapped"])
def test_files_of_another_size_are_found_when_a_dataset_is_opened(write_dataset, change):
    folder = write_dataset()
    for path in _every_file(folder):
        whole = path.read_bytes()
        if change == "truncated":
            path.write_bytes(whole[:-1])
        elif change == "longer":
            path.write_bytes(whole + b"\0")
        elif change == "missing":
            path.unlink()
        else:
            other = folder / path.name.replace("shard-00000", "shard-00002").replace("shard-00001", "shard-00000")
            if other == path or len(other.read_bytes()) == len(whole):
                continue
            path.write_bytes(other.read_bytes())
        with pytest.raises(WorkError, match="restore"):
            Dataset(folder)
        path.write_bytes(whole)
    Dataset(folder)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_last_sequence_of_another_length_is_found(tmp_path, change):
    # No pointer follows the last length: only the size of the data tells.
    writer = IndexedWriter(tmp_path / "pair", "int32")
    for sequence in ([1, 2, 3], [7, 8]):
        writer.add(np.asarray(sequence))
        writer.end_document()
    writer.close()
    idx = tmp_path / "pair.idx"
    whole = bytearray(idx.read_bytes())
    whole[34 + 4] += change
    idx.write_bytes(whole)
    with pytest.raises(WorkError, match=r"the \.bin file has 20"):
        IndexedFile(tmp_path / "pair", "int32")


@settings(max_examples=150, deadline=None, suppress_health_check=HEALTH)
@given(data=st.data())
def test_any_mutation_of_an_index_is_a_typed_error_or_changes_nothing(tmp_path, data):
    prefix = tmp_path / "pair"
    writer = IndexedWriter(prefix, "int32")
    sequences = [[1, 2, 3], [7], [], [9, 10]]
    for sequence in sequences:
        writer.add(np.asarray(sequence))
        writer.end_document()
    writer.close()
    idx = tmp_path / "pair.idx"
    whole = bytearray(idx.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    idx.write_bytes(whole[: data.draw(st.sampled_from([len(whole), len(whole), len(whole) - 3, 20]))])
    try:
        opened = IndexedFile(prefix, "int32")
        found = [opened[i].tolist() for i in range(len(opened))]
    except MedgptError:
        return
    assert found == sequences


@settings(max_examples=100, deadline=None, suppress_health_check=HEALTH)
@given(data=st.data())
def test_any_mutation_of_the_manifest_is_a_typed_error_or_a_dataset(write_dataset, tmp_path, data):
    folder = tmp_path / "dataset"
    if not folder.exists():
        write_dataset(num_samples=3, per_shard=3)
        (tmp_path / "whole").write_bytes((folder / "dataset.json").read_bytes())
    whole = bytearray((tmp_path / "whole").read_bytes())
    whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(32, 126))
    (folder / "dataset.json").write_bytes(whole)
    with contextlib.suppress(MedgptError):
        Dataset(folder)


@pytest.mark.parametrize("name", ["../evil", "shard-00000/../x", "shard-1"])
def test_a_shard_name_that_is_a_path_is_refused(write_dataset, name):
    folder = write_dataset()
    raw = json.loads((folder / "dataset.json").read_text())
    raw["shards"][0]["name"] = name
    (folder / "dataset.json").write_text(json.dumps(raw))
    with pytest.raises(WorkError, match="damaged"):
        Dataset(folder)


def test_a_dataset_of_another_tokenizer_is_refused_by_name(write_dataset):
    with pytest.raises(UsageError, match=r"was made by tokenizer .* set tokenizer"):
        Dataset(write_dataset(), tokenizer_fingerprint="0" * 64)


def test_a_folder_that_is_no_dataset_is_refused(tmp_path):
    with pytest.raises(UsageError, match="medgpt ingest"):
        Dataset(tmp_path)


def test_a_pixel_record_comes_back_and_a_broken_one_is_refused():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    record = np.frombuffer(pack_pixels(pixels), np.uint8)
    np.testing.assert_array_equal(unpack_pixels(record), pixels)
    for broken in (record[:-1], record[:6], record[1:]):
        with pytest.raises(WorkError, match="not a pixel record"):
            unpack_pixels(broken)


def test_pixels_are_read_straight_into_a_batch_and_a_damaged_record_is_refused(tmp_path):
    squares = np.random.default_rng(0).integers(0, 256, (5, 6, 6, 3), dtype=np.uint8)
    store = Store(kind="pixels", size_px=6)
    writer = ShardWriter(tmp_path, 0, store)
    for number, square in enumerate(squares):
        first = writer.add_images([pack_pixels(square)])
        writer.add_sample(
            sample_id=f"{number:x}", token_ids=np.array([3, 4]), target_spans=[(1, 2)], modality=0, num_images=1,
            first_image=first,
        )  # fmt: skip
    facts = {"sha256": "0" * 64, "vocab_size": 9, "image_mark_id": 3, "pad_id": 0}
    write_manifest(tmp_path, [writer.close()], tokenizer=facts, store=store, num_records=5, rejects={}, provenance={})
    batch = np.zeros((5, 6, 6, 3), np.uint8)
    for place, number in enumerate((3, 0, 4, 1, 2)):
        Dataset(tmp_path).read_pixels((0, number), batch[place])
        assert (batch[place] == squares[number]).all()
    with pytest.raises(WorkError, match="not the pixel record"):
        Dataset(tmp_path).read_pixels((0, 0), np.zeros((6, 5, 3), np.uint8))
    path = tmp_path / "shard-00000.image.bin"
    content = bytearray(path.read_bytes())
    content[(12 + 108) * 4] ^= 1  # the first byte of the last record
    path.write_bytes(content)
    with pytest.raises(WorkError, match="not the pixel record"):
        Dataset(tmp_path).read_pixels((0, 4), batch[0])


def test_more_shards_than_are_kept_open_are_read_all_the_same(write_dataset, monkeypatch):
    monkeypatch.setattr(shards, "_MOST_OPEN_SHARDS", 2)
    dataset = Dataset(write_dataset(num_samples=40, per_shard=5))
    order = np.random.default_rng(0).permutation(40).tolist() * 2
    assert [int(dataset[number].sample_id, 16) for number in order] == order
    assert len(dataset._shards) <= 2


def as_schema_1(folder):
    """The dataset as it was written before body part, view and laterality: four facts a sample, no counts of them."""
    manifest = json.loads((folder / "dataset.json").read_text())
    for shard in manifest["shards"]:
        new = IndexedFile(folder / f"{shard['name']}.text", "int32")
        old = IndexedWriter(folder / "old", "int32")
        for number in range(len(new)):
            old.add(new[number][:4] if number % 3 == 2 else new[number])
            if number % 3 == 2:
                old.end_document()
        old.close()
        for ending in ("bin", "idx"):
            name = f"{shard['name']}.text.{ending}"
            (folder / f"old.{ending}").replace(folder / name)
            shard["files"][name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
    for facts in (manifest, *manifest["shards"]):
        for listed in ("body_parts", "views", "lateralities"):
            del facts[listed]
    manifest |= {"schema": 1, "seal": ""}
    (folder / "dataset.json").write_text(json.dumps(manifest, indent=1))
    return folder


def test_a_dataset_of_schema_1_is_read_as_it_was(write_dataset):
    new, old = Dataset(write_dataset("new")), Dataset(as_schema_1(write_dataset("old")))
    assert list(verify(old.folder)) == []
    assert old.manifest.modalities == new.manifest.modalities
    assert old.manifest.body_parts == {}
    for number in range(len(new)):
        assert old.described(number) == new.described(number)
        for field in ("modality", "image_keys", "sample_id"):
            assert getattr(old[number], field) == getattr(new[number], field)
        np.testing.assert_array_equal(old[number].token_ids, new[number].token_ids)
        np.testing.assert_array_equal(old[number].target_spans_flat, new[number].target_spans_flat)


def test_a_later_schema_is_refused(write_dataset):
    folder = write_dataset()
    content = (folder / "dataset.json").read_text().replace('"schema": 2', '"schema": 3')
    (folder / "dataset.json").write_text(content)
    with pytest.raises(UsageError, match="schema 3, this version reads 1 and 2"):
        Dataset(folder)


@pytest.mark.parametrize("place", [4, 5, 6])
def test_a_body_part_view_or_side_that_is_on_no_list_is_a_damaged_shard(write_dataset, place):
    folder = write_dataset(num_samples=3)
    text = IndexedFile(folder / "shard-00000.text", "int32")
    at = int(text.pointers[2]) + 4 * place
    content = bytearray((folder / "shard-00000.text.bin").read_bytes())
    content[at : at + 4] = (99).to_bytes(4, "little")
    (folder / "shard-00000.text.bin").write_bytes(content)
    with pytest.raises(WorkError, match="that is not there"):
        Dataset(folder)[0]


@pytest.mark.parametrize("hard", [70, 4096])
def test_a_dataset_of_more_shards_than_files_may_be_open_is_read(write_dataset, hard):
    """In a process of its own: a hard limit cannot be raised again. 60 shards would need 300 descriptors."""
    folder = write_dataset(num_samples=60, per_shard=1)
    code = (
        "import resource, sys; from megatron_medgpt.data import shards; shards._OTHER_FILES = 60\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, (66, {hard}))\n"
        "dataset = shards.Dataset(sys.argv[1]); lengths = dataset.token_lengths\n"
        "ids = [int(dataset[n].sample_id, 16) for n in (*range(59, -1, -1), *range(60))]\n"
        "assert ids == [*range(59, -1, -1), *range(60)]; print(len(lengths))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (0, "60\n"), done.stderr
