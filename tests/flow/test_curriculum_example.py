"""The published curriculum's example, on stand-ins for every download, as a reader gives it."""

from __future__ import annotations

import json

import pytest

from megatron_medgpt.checkpoint.find import find_latest, read_facts
from megatron_medgpt.data.exclude import read_excluded
from megatron_medgpt.data.manifest import read_manifest
from megatron_medgpt.data.shards import Dataset
from tests.example_scripts import run_example

for needed in ("pyarrow", "openslide", "tifffile", "urllib3", "imagehash"):
    pytest.importorskip(needed)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("curriculum") / "with a space"
    said = run_example("06_curriculum", folder)
    (folder / "log").write_text(said)
    return folder


def test_pictures_that_may_not_be_taken_are_counted_from_the_fetch_to_the_rejects(work):
    said = (work / "log").read_text().splitlines()
    num_asked = len((work / "stand-ins" / "llava_med" / "llava_med_image_urls.jsonl").read_text().splitlines())
    assert [line for line in said if line.startswith(("fetched", "refused"))] == [
        f"fetched: {num_asked - 4}", "refused license: 2", "refused retracted: 2",
    ]  # fmt: skip
    for name in ("align", "instruct"):
        manifest, _ = read_manifest(work / "data" / name)
        assert (manifest.num_records, manifest.rejects) == (num_asked, {"missing-file": 4})


def test_the_picture_of_the_evaluation_is_found_and_left_out_of_training_and_nothing_else_is(work):
    listed = read_excluded(work / "leakage" / "exclude.jsonl")
    assert len(listed) == 1
    found = {path.name: len(Dataset(path).numbers_of(listed)) for path in (work / "data").iterdir()}
    assert {name for name, count in found.items() if count} == {"pmc_vqa"}
    num_instruct = sum(len(Dataset(work / "data" / name)) for name in found if "align" not in name)
    assert f"1 of {num_instruct} samples are listed in exclude and left out" in (work / "log").read_text()


def test_both_stages_end_and_every_protocol_has_its_controls(work):
    facts = read_facts(find_latest(work / "run" / "checkpoints"))
    assert (facts.stage_name, facts.stage_end, len(facts.lineage)) == ("instruct", True, 1)
    for protocol in ("official-qa", "official-prefix", "letter"):
        result = json.loads((work / "run" / "eval" / f"omnimedvqa.{protocol}.json").read_text())
        assert result["n"] == 16
        assert {"blank_image", "shuffled_image", "text_only"} <= set(result["controls"])
    assert "equal" in (work / "log").read_text().splitlines()
    assert (work / "run" / "report.html").stat().st_size > 10_000
