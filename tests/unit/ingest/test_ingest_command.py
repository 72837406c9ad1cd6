"""The whole ingest: nothing is lost uncounted, nothing identifying is written, a kill changes no byte."""

import hashlib
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from medical_files import BAD_FILES, dicom, encoded, picture

from megatron_medgpt.config.errors import UsageError, WorkError
from megatron_medgpt.data.inspect import inspect
from megatron_medgpt.data.shards import Dataset
from megatron_medgpt.data.stored import unpack_pixels
from megatron_medgpt.data.verify import verify
from megatron_medgpt.ingest.command import run_ingest
from megatron_medgpt.ingest.write import locked


@pytest.fixture
def study(tmp_path):
    """20 good captions on PNG, JPEG and DICOM files."""
    folder = tmp_path / "study"
    folder.mkdir()
    rows = []
    for number in range(20):
        name = f"patient-MUSTERMANN-{number}.{('png', 'jpg', 'dcm')[number % 3]}"
        if number % 3 == 2:
            stored = np.random.default_rng(number).integers(0, 4000, (24, 24)).astype(np.uint16)
            content = dicom(stored, AccessionNumber="CANARY-ACC", PatientBirthDate="19700101")
        else:
            content = encoded("PNG" if number % 3 == 0 else "JPEG", picture(seed=number))
        (folder / name).write_bytes(content)
        rows.append({"image": name, "caption": f"A round lesion, number {number}."})
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def ingest(tokenizer_folder, key_file, tmp_path):
    def run(inputs, out="out", **options):
        defaults = {"workers": 1, "records_per_shard": 6, "key_file": key_file, "echo": lambda line: None}
        return run_ingest([inputs], out=tmp_path / out, tokenizer=tokenizer_folder, **{**defaults, **options})

    return run


def digest_of(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_good_records_become_a_whole_dataset(study, ingest, tmp_path):
    summary = ingest(study)
    assert (summary.num_records, summary.num_samples, summary.num_images, summary.rejects) == (20, 20, 20, {})
    assert list(verify(tmp_path / "out")) == []
    assert Dataset(tmp_path / "out").manifest.modalities == {"ct": 6, "unknown": 14}
    assert not [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_an_ingest_of_plain_pictures_imports_nothing_that_only_other_files_need(study, tokenizer_folder, tmp_path):
    """Each of these takes a tenth of a second to some seconds, at every start and in every worker."""
    (study / "plain.png").write_bytes(encoded())
    (study / "plain.jsonl").write_text(json.dumps({"image": "plain.png", "caption": "plain"}) + "\n")
    heavy = ("torch", "transformers", "nvidia.dali", "pydicom", "nibabel", "fsspec", "aiohttp", "pyarrow", "openslide")
    program = (
        "import sys; from megatron_medgpt.cli import app; app(sys.argv[1:], standalone_mode=False); "
        f"print('imported', [name for name in {heavy} if name in sys.modules])"
    )
    command = [sys.executable, "-c", program, "ingest", str(study / "plain.jsonl"), "--workers", "1",
               "--tokenizer", str(tokenizer_folder), "--key-file", str(tmp_path / "own.key"), "--out",
               str(tmp_path / "out")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert "1 samples" in done.stdout, done.stdout + done.stderr
    assert done.stdout.endswith("imported []\n")


def test_any_number_of_workers_writes_the_same_bytes(study, ingest, tmp_path):
    ingest(study, "one", workers=1)
    ingest(study, "two", workers=2)
    assert digest_of(tmp_path / "one") == digest_of(tmp_path / "two")


def test_bad_records_are_counted_by_reason_and_good_ones_kept(study, ingest, tmp_path):
    rows = (study / "captions.jsonl").read_text()
    expected = {}
    for number, (content, reason) in enumerate(BAD_FILES.values()):
        (study / f"bad{number}").write_bytes(content)
        rows += json.dumps({"image": f"bad{number}", "caption": f"bad {number}"}) + "\n"
        expected[reason] = expected.get(reason, 0) + 1
    (tmp_path / "secret.png").write_bytes(encoded())
    (study / "link.png").symlink_to(tmp_path / "secret.png")
    for name in ("../secret.png", str(tmp_path / "secret.png"), "link.png"):
        rows += json.dumps({"image": name, "caption": f"escape {name}"}) + "\n"
    rows += json.dumps({"image": "none.png", "caption": "x"}) + "\n"
    rows += rows.splitlines()[0] + "\n"
    rows += json.dumps({"image": "bad0", "caption": "<image> in the text"}) + "\n"
    expected |= {"path-outside": 3, "missing-file": 1, "duplicate-id": 1, "image-in-answer": 1}
    (study / "captions.jsonl").write_text(rows)
    summary = ingest(study, max_reject_rate=0.9, allow_burned_in=False)
    del expected["image-in-answer"]
    expected["marks-and-images-differ"] = 1
    assert summary.rejects == expected
    assert summary.num_records == summary.num_samples + sum(summary.rejects.values())
    assert summary.num_samples == 20
    listed = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert len(listed) == sum(expected.values())
    assert all(set(reject) == {"record", "reason"} for reject in listed)


def test_too_many_rejects_make_no_dataset_and_a_higher_rate_continues(study, ingest, tmp_path):
    rows = (study / "captions.jsonl").read_text() + json.dumps({"image": "none.png", "caption": "x"}) + "\n"
    (study / "captions.jsonl").write_text(rows)
    with pytest.raises(WorkError, match=r"1 of 21 records were rejected \(1 missing-file\)"):
        ingest(study, max_reject_rate=0.01)
    assert not (tmp_path / "out" / "dataset.json").exists()
    assert ingest(study, max_reject_rate=0.05).num_samples == 20


def test_no_identifier_is_in_any_byte_written(study, ingest, tmp_path):
    lines = []
    ingest(study, echo=lines.append)
    for path in (tmp_path / "out").iterdir():
        content = path.read_bytes()
        for canary in (b"CANARY", b"Canary", b"MUSTERMANN", b"19700101", b"1.2.3.4.5", b"captions", bytes(study)):
            assert canary not in content, path.name
    assert not any("MUSTERMANN" in line for line in lines)


def test_sample_ids_need_the_key(study, ingest, tmp_path):
    other = tmp_path / "other-key"
    other.write_bytes(b"o" * 32)
    ingest(study, "one")
    ingest(study, "two", key_file=other)
    ids = [{Dataset(tmp_path / name).sample_id(i) for i in range(20)} for name in ("one", "two")]
    assert len(ids[0]) == len(ids[1]) == 20
    assert not ids[0] & ids[1]


def test_a_killed_ingest_continues_and_gives_the_same_bytes(study, ingest, tokenizer_folder, key_file, tmp_path):
    ingest(study, "whole")
    program = (
        "import sys, time\nfrom megatron_medgpt.ingest import command, write\n"
        "whole = write.write_shard\n"
        "def slow(settings, task):\n"
        "    if task.number == 2:\n        print('third', flush=True); time.sleep(3600)\n"
        "    return whole(settings, task)\n"
        "write.write_shard = slow\n"
        f"command.run_ingest([{str(study)!r}], out={str(tmp_path / 'killed')!r}, tokenizer={str(tokenizer_folder)!r}, "
        f"workers=1, records_per_shard=6, key_file={str(key_file)!r}, echo=lambda line: None)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert child.stdout.readline() == b"third\n"
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait(timeout=300)
        child.stdout.close()
    (tmp_path / "killed" / ".shard-00002.text.bin").write_bytes(b"half a shard")
    (tmp_path / "killed" / "shard-00000.text.bin").write_bytes(b"finished, then damaged")
    assert not (tmp_path / "killed" / "dataset.json").exists()
    kept = (tmp_path / "killed" / "shard-00001.image.bin").stat().st_mtime_ns
    ingest(study, "killed")
    assert digest_of(tmp_path / "killed") == digest_of(tmp_path / "whole")
    assert (tmp_path / "killed" / "shard-00001.image.bin").stat().st_mtime_ns == kept


def test_an_unfinished_ingest_of_other_settings_is_not_continued(study, ingest, tmp_path):
    with pytest.raises(WorkError):
        ingest(study / "captions.jsonl", image_root=tmp_path, max_reject_rate=0)
    with pytest.raises(UsageError, match="unfinished ingest of other inputs or settings"):
        ingest(study / "captions.jsonl", image_root=tmp_path, longest_tokens=99)


def test_a_second_writer_and_a_finished_dataset_are_refused(study, ingest, tmp_path):
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out"), pytest.raises(UsageError, match="another ingest is writing"):
        ingest(study)
    ingest(study)
    before = digest_of(tmp_path / "out")
    with pytest.raises(UsageError, match="already a dataset"):
        ingest(study)
    assert digest_of(tmp_path / "out") == before


@pytest.mark.parametrize("wrong", [{"store": "features"}, {"format": "x"}, {"image_root": "/nowhere"}])
def test_wrong_usage_writes_nothing(study, ingest, tmp_path, wrong):
    with pytest.raises(UsageError):
        ingest(study, **wrong)
    assert not (tmp_path / "out").exists()


def test_samples_with_the_same_image_share_it(study, ingest, tmp_path):
    rows = [{"image": "patient-MUSTERMANN-0.png", "caption": f"caption {k}"} for k in range(5)]
    (study / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = ingest(study)
    assert (summary.num_samples, summary.num_images) == (5, 1)
    dataset = Dataset(tmp_path / "out")
    assert {dataset[i].image_keys for i in range(5)} == {((0, 0),)}


def test_a_pixel_store_holds_ready_squares_for_one_encoder(study, ingest, tmp_path):
    from megatron_medgpt.config.schema import BlendConfig
    from megatron_medgpt.data.loader import open_stage
    from megatron_medgpt.data.pixels import PixelSource
    from megatron_medgpt.types import ImageSpec

    ingest(study, "encoded")
    ingest(study, "pixels", store="pixels", pixel_size_px=28)
    dataset = Dataset(tmp_path / "pixels")
    assert unpack_pixels(dataset.image((0, 0))).shape == (28, 28, 3)
    clip = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
    spec = ImageSpec(size_px=28, num_tokens=4, **clip)
    sources = PixelSource(spec, "pillow"), PixelSource(spec, "pillow")
    from_bytes = sources[0].read(range(6), lambda k: ("encoded", Dataset(tmp_path / "encoded").image((0, k))))
    from_pixels = sources[1].read(range(6), lambda k: ("pixels", dataset.image((0, k))))
    largest_step = 2 / 255 / min(clip["std"])  # what data.resize promises
    assert abs(from_bytes - from_pixels).max() <= largest_step + 1e-6
    options = {"tokenizer_fingerprint": None, "sequence_length": 96, "seed": 0, "reader": "pillow"}
    stage = open_stage([BlendConfig(path=str(tmp_path / "pixels"))], image=spec, **options)
    assert len(stage.take(0, 2).pixels_ICYX) > 0
    with pytest.raises(UsageError, match="stores pixels for an encoder of 28 px"):
        larger = ImageSpec(size_px=56, num_tokens=16, **clip)
        open_stage([BlendConfig(path=str(tmp_path / "pixels"))], image=larger, **options)


def test_what_was_rejected_adds_up_on_the_terminal(study, tokenizer_folder, key_file, tmp_path):
    bad = ("empty", "html", "half a jpeg", "gif", "pixel bomb", "one pixel", "burned in", "a million frames")
    names = [*bad, "ultrasound that says nothing", "dicom of nothing", "/etc/passwd", "none.png"]
    for number, name in enumerate(names[:-2]):
        (study / f"bad{number}").write_bytes(BAD_FILES[name][0])
        names[number] = f"bad{number}"
    rows = [json.dumps({"image": name, "caption": f"Text {name}."}) for name in names]
    (study / "captions.jsonl").write_text((study / "captions.jsonl").read_text() + "\n".join(rows) + "\n")
    lines = []
    run_ingest([study / "captions.jsonl"], out=tmp_path / "out", tokenizer=tokenizer_folder, key_file=key_file,
               workers=1, max_reject_rate=0.9, echo=lines.append)  # fmt: skip
    said = lines[-1].split("rejected ")[1]
    total, _, reasons = said.partition(": ")
    assert int(total) == len(names) == sum(int(reason.split()[0]) for reason in reasons.split(", "))
    assert "other reasons" in said


def test_inspect_says_what_is_there_and_finds_damage(study, ingest, tmp_path):
    ingest(study)
    text = inspect(tmp_path / "out", check=True, sample=3, png=tmp_path / "samples.png")
    assert "20 from 20 records" in text
    assert "every byte" in text
    assert text.endswith("samples.png: 3 of 20 samples, spread over the dataset")
    assert (tmp_path / "samples.png").stat().st_size > 1000
    facts = json.loads(inspect(tmp_path / "out", as_json=True))
    assert facts["samples"] == 20
    path = tmp_path / "out" / "shard-00001.image.bin"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(WorkError, match=r"shard-00001\.image\.bin does not have the sha256"):
        inspect(tmp_path / "out", check=True)


def test_a_dead_worker_is_reported_and_not_waited_for(study, ingest, tmp_path, monkeypatch):
    # A codec that brings the interpreter down: simulated by a worker that kills itself on start.
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import os, sys\nif '--multiprocessing-fork' in sys.argv: os.kill(os.getpid(), 9)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{site}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    with pytest.raises(WorkError, match="a worker died"):
        ingest(study, workers=2)
