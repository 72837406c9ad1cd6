"""From command options to shards: one file of a record may become several pictures, with as many marks."""

import io
import json

import nibabel
import numpy as np
import pydicom
import pytest
from medical_files import dicom, encoded, picture, series, slide_file
from PIL import Image

from megatron_medgpt.config.errors import UsageError, WorkError
from megatron_medgpt.data.shards import Dataset
from megatron_medgpt.ingest.command import run_ingest
from megatron_medgpt.ingest.decode import DecodeOptions
from megatron_medgpt.types import MODALITIES


@pytest.fixture
def study(tmp_path):
    """A table with a JPEG, a multi-frame DICOM file, a NIfTI volume of CT and a whole slide, each with its text."""
    folder = tmp_path / "study"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(encoded("JPEG", picture()))
    ds = pydicom.dcmread(io.BytesIO(dicom(np.arange(5 * 1024, dtype=np.uint16).reshape(160, 32), modality="MR")))
    ds.Rows, ds.NumberOfFrames = 32, 5
    ds.save_as(folder / "b.dcm")
    voxels = np.random.default_rng(0).integers(-200, 300, (20, 24, 9)).astype(np.int16)
    nibabel.Nifti1Image(voxels, np.eye(4)).to_filename(folder / "c.nii.gz")
    slide_file(folder / "d.tif")
    rows = [{"image": name, "caption": f"Text {name}.", "modality": modality}
            for name, modality in (("a.jpg", "x-ray"), ("b.dcm", ""), ("c.nii.gz", "CT"), ("d.tif", ""))]  # fmt: skip
    (folder / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def ingest(tmp_path, tokenizer_folder, key_file):
    def run(table, name, **options):
        made = run_ingest([table], out=tmp_path / name, tokenizer=tokenizer_folder, key_file=key_file, workers=1,
                          echo=lambda line: lines.append(line), **options)  # fmt: skip
        return made, Dataset(tmp_path / name)

    lines = []
    run.lines = lines
    return run


def shown(dataset, number):
    """The pictures of a sample."""
    return [np.asarray(Image.open(io.BytesIO(bytes(dataset.image(key))))) for key in dataset[number].image_keys]


def test_every_picture_of_a_file_gets_a_mark_and_lies_in_the_shard(study, ingest, tmp_path):
    options = DecodeOptions(frames="every:2", slices="even:4", tiles="even:3", tile_px=96)
    summary, dataset = ingest(study / "table.jsonl", "out", decode=options, allow_burned_in=True)
    assert summary.rejects == {}
    assert summary.num_images == 1 + 3 + 4 + 3
    mark = json.loads((tmp_path / "out" / "dataset.json").read_text())["tokenizer"]["image_mark_id"]
    for number, count in enumerate((1, 3, 4, 3)):
        sample = dataset[number]
        assert (sample.token_ids == mark).sum() == count == len(sample.image_keys)
        assert MODALITIES[sample.modality] == ("xray", "mr", "ct", "microscopy")[number]
    assert shown(dataset, 3)[0].shape == (96, 96, 3)
    recorded = json.loads((tmp_path / "out" / "dataset.json").read_text())["provenance"]["decode"]
    assert DecodeOptions(**recorded) == options


def test_an_unfinished_ingest_is_not_continued_with_other_pictures(study, ingest, tmp_path):
    options = {"allow_burned_in": True, "max_reject_rate": 0.0}
    (study / "a.jpg").unlink()
    with pytest.raises(WorkError, match="1 of 4 records were rejected"):
        ingest(study / "table.jsonl", "out", **options)
    with pytest.raises(UsageError, match="other inputs or settings"):
        ingest(study / "table.jsonl", "out", decode=DecodeOptions(frames="all"), **options)


def test_a_series_by_its_uid_gives_its_slices_in_the_order_of_space(ingest, tmp_path):
    series(tmp_path / "tree", [30, -10, 20, 10], modality="MR", WindowCenter=2, WindowWidth=4)
    table = tmp_path / "texts.csv"
    table.write_text("SeriesInstanceUID,report\n1.2.7,Four slices.\n1.2.8,None of it.\n")
    summary, dataset = ingest(
        table, "out", image_root=tmp_path / "tree", decode=DecodeOptions(slices="all"), max_reject_rate=0.5
    )
    assert summary.rejects == {"missing-file": 1}
    assert [grey[0, 0] for grey in shown(dataset, 0)] == [85, 255, 170, 0]
    assert any("4 images of 1 SeriesInstanceUID" in line for line in ingest.lines)


def test_a_scale_below_the_square_of_the_store_is_refused(study, ingest):
    with pytest.raises(UsageError, match=r"--scaled-px 100 is below the 336 px"):
        ingest(study / "table.jsonl", "out", store="pixels", decode=DecodeOptions(scaled_px=100))
