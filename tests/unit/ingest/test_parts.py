"""An ingest in parts is the ingest in one go, byte for byte; what is missing is named."""

import hashlib
import json

import pytest
from medical_files import encoded, picture

from megatron_medgpt.config.errors import UsageError, WorkError
from megatron_medgpt.data.verify import verify
from megatron_medgpt.ingest.command import run_ingest
from megatron_medgpt.ingest.parts import Part, leave_note
from megatron_medgpt.ingest.seen import SeenIds
from megatron_medgpt.ingest.write import locked


@pytest.fixture
def ingest(tokenizer_folder, key_file, tmp_path):
    """Ingest 11 records, two of them bad and one twice, into shards of two."""
    folder = tmp_path / "study"
    folder.mkdir()
    rows = [{"id": str(i % 10), "image": f"{i % 4}.png", "caption": f"A round lesion, number {i}."} for i in range(11)]
    rows[3]["image"], rows[6]["caption"] = "none.png", " "
    for number in range(4):
        (folder / f"{number}.png").write_bytes(encoded("PNG", picture(seed=number)))
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(out, **options):
        defaults = {"workers": 1, "records_per_shard": 2, "max_reject_rate": 0.5, "echo": lambda line: None}
        return run_ingest(
            [folder], out=tmp_path / out, tokenizer=tokenizer_folder, key_file=key_file, **{**defaults, **options}
        )

    return run


def digest_of(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_any_number_of_parts_in_any_order_gives_the_bytes_of_one_ingest(ingest, tmp_path, count):
    whole = ingest("whole")
    parts = [ingest("parts", part=f"{number}/{count}") for number in reversed(range(count))]
    assert sum(part.num_records for part in parts) == whole.num_records == 11
    assert not (tmp_path / "parts" / "dataset.json").exists()
    merged = ingest("parts", merge=True)
    assert (merged.num_samples, merged.rejects) == (whole.num_samples, whole.rejects)
    assert merged.rejects == {"duplicate-id": 1, "empty-text": 1, "missing-file": 1}
    assert digest_of(tmp_path / "parts") == digest_of(tmp_path / "whole")
    assert list(verify(tmp_path / "parts")) == []


def test_a_merge_names_the_parts_that_are_not_done(ingest, tmp_path):
    with pytest.raises(UsageError, match="no finished part"):
        ingest("parts", merge=True)
    ingest("parts", part="1/3")
    with pytest.raises(WorkError, match=r"2 of 3 parts are not done.*: 0,2"):
        ingest("parts", merge=True)
    ingest("parts", part="0/3")
    ingest("parts", part="2/3")
    (tmp_path / "parts" / "shard-00001.ids").unlink()
    with pytest.raises(WorkError, match=r"1 of 6 shards .* missing or damaged \(shard-00001\)"):
        ingest("parts", merge=True)
    ingest("parts", part="1/3")
    ingest("parts", merge=True)
    assert list(verify(tmp_path / "parts")) == []


def test_parts_of_other_settings_or_of_another_array_are_not_joined(ingest, tmp_path):
    ingest("parts", part="0/2")
    with pytest.raises(UsageError, match="other inputs or settings"):
        ingest("parts", part="1/2", suspicious_text="mask")
    with pytest.raises(UsageError, match=r"--part 1/3: .* holds parts of 2; give all the same count"):
        ingest("parts", part="1/3")
    leave_note(tmp_path / "parts", Part(number=1, count=3), num_shards=1, settings_digest="")  # begun at one moment
    with pytest.raises(UsageError, match=r"parts of arrays of \[2, 3\]; remove it"):
        ingest("parts", merge=True)


def test_parts_write_side_by_side_but_one_part_only_once_and_never_beside_a_whole_ingest(ingest, tmp_path):
    (tmp_path / "parts").mkdir()
    with locked(tmp_path / "parts", Part(number=0, count=2)):
        ingest("parts", part="1/2")
        with pytest.raises(UsageError, match="part 0/2 is being written"):
            ingest("parts", part="0/2")
        for options in ({}, {"merge": True}):
            with pytest.raises(UsageError, match="another ingest is writing"):
                ingest("parts", **options)
    with locked(tmp_path / "parts"), pytest.raises(UsageError, match="another ingest is writing"):
        ingest("parts", part="0/2")


def test_seen_ids_are_those_of_a_set_while_the_table_grows():
    ids = [str(number * number % 99_991) for number in range(120_000)]
    seen, expected = SeenIds(), set()
    for name in ids:
        assert seen.add(name) == (name in expected)
        expected.add(name)
    assert len(expected) > 2 / 3 * 2**16


@pytest.mark.parametrize("text", ["4/4", "1", "-1/4", "1/0", "a/b"])
def test_a_part_that_cannot_be_is_refused_with_an_example(ingest, tmp_path, text):
    with pytest.raises(UsageError, match="--part 0/4"):
        ingest("parts", part=text)
    assert not (tmp_path / "parts").exists()
