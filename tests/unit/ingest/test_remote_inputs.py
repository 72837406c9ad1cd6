"""Tables, tars and images behind URLs; images come from under the root that the user named and from nowhere else."""

import json

import fsspec
import pytest
from medical_files import encoded, picture
from tars import tar_of

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.data.picture import PictureError
from megatron_medgpt.data.shards import Dataset
from megatron_medgpt.data.verify import verify
from megatron_medgpt.ingest.command import run_ingest
from megatron_medgpt.ingest.sources import open_source
from megatron_medgpt.ingest.sources.place import read_image, url_inside
from tests.http_files import serving

PNG, JPEG = encoded("PNG", picture(20, 20)), encoded("JPEG")
TABLE = "".join(json.dumps({"image": f"deep dir/{k}.png", "caption": f"Picture {k}."}) + "\n" for k in range(3))


@pytest.fixture(params=["memory", "http"])
def storage(request):
    """(URL of a folder, function that writes a file into it)."""
    if request.param == "http":
        pytest.importorskip("aiohttp")
        with serving() as files:
            yield f"{files.url}/set", lambda name, content: files.content.update({f"/set/{name}": content})
    else:
        folder = fsspec.filesystem("memory")
        yield "memory://set", lambda name, content: folder.pipe_file(f"/set/{name}", content)
        for name in folder.find("/set"):
            folder.rm(name)


def quoted(name, url):
    return name.replace(" ", "%20") if url.startswith("http") else name


@pytest.fixture
def ingest(tokenizer_folder, key_file, tmp_path):
    def run(place, **options):
        return run_ingest(
            [place], out=tmp_path / "out", tokenizer=tokenizer_folder, key_file=key_file, workers=1,
            echo=lambda line: None, **options,
        )  # fmt: skip

    return run


def test_a_table_and_its_images_may_lie_behind_a_url(storage, ingest, tmp_path):
    url, write = storage
    write("captions.jsonl", TABLE.encode())
    for k in range(2):
        write(quoted(f"deep dir/{k}.png", url), encoded("PNG", picture(20, 20, seed=k)))
    summary = ingest(f"{url}/captions.jsonl", max_reject_rate=0.5)
    assert (summary.num_samples, summary.rejects) == (2, {"missing-file": 1})
    assert list(verify(tmp_path / "out")) == []


def test_a_local_table_may_have_its_images_behind_a_url(storage, ingest, tmp_path):
    url, write = storage
    write("a.jpg", JPEG)
    rows = [{"image": "a.jpg", "caption": "x"}, {"image": f"{url}/a.jpg", "caption": "y"}]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    assert ingest(tmp_path / "t.json", image_root=url).num_samples == 2


def test_a_tar_is_read_from_a_url_as_from_a_disk(storage, ingest, tmp_path):
    url, write = storage
    content = tar_of([("a.jpg", JPEG), ("a.txt", b"A."), ("b.png", PNG), ("b.txt", b"B.")])
    write("s-000.tar", content)
    (tmp_path / "s-000.tar").write_bytes(content)
    remote, local = (list(open_source(place).read()) for place in (f"{url}/s-000.tar", tmp_path / "s-000.tar"))
    assert remote == local
    assert ingest(f"{url}/s-{{000..000}}.tar").num_samples == 2
    assert Dataset(tmp_path / "out").manifest.num_images == 2


def test_parquet_is_read_from_a_url(storage, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    url, write = storage
    rows = {"image": [{"bytes": PNG}], "question": ["q"], "answer": ["a"]}
    parquet.write_table(pyarrow.table(rows), tmp_path / "t.parquet")
    write("t.parquet", (tmp_path / "t.parquet").read_bytes())
    assert list(open_source(f"{url}/t.parquet").read()) == list(open_source(tmp_path / "t.parquet").read())


def test_what_a_server_does_not_have_is_one_line(storage):
    url, _ = storage
    with pytest.raises(UsageError, match=r"none\.jsonl does not exist"):
        open_source(f"{url}/none.jsonl")
    with pytest.raises(UsageError, match="cannot be read"):
        open_source("nosuchprotocol://x/t.jsonl")


def test_a_page_in_place_of_a_picture_is_counted(storage, ingest, tmp_path):
    url, write = storage
    write("page.jpg", b"<!DOCTYPE html><html></html>")
    write("empty.jpg", b"")
    write("a.jpg", JPEG)
    rows = [{"image": name, "caption": "x"} for name in ("a.jpg", "page.jpg", "empty.jpg")]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    summary = ingest(tmp_path / "t.json", image_root=url, max_reject_rate=0.9)
    assert summary.rejects == {"empty-file": 1, "not-an-image": 1}


def test_a_server_that_was_busy_is_asked_again():
    pytest.importorskip("aiohttp")
    with serving() as files:
        files.content |= {"/a.png": PNG, "/b.png": PNG}
        files.status = {"/a.png": [503, 500], "/b.png": [503] * 9}
        assert read_image(files.url, "a.png") == PNG
        with pytest.raises(PictureError, match="unreadable-file"):
            read_image(files.url, "b.png")
        assert (files.asked["/a.png"], files.asked["/b.png"]) == (3, 3)


@pytest.mark.parametrize(
    "name",
    ["../secret.png", "a/../../secret.png", "%2e%2e/secret.png", "/secret.png", "http://169.254.169.254/latest", "~/x",
     "file:///etc/hostname", "s3://other/a.png", "..\\secret.png", "a\0b", "memory://set2/a.png"],
)  # fmt: skip
def test_a_record_cannot_name_what_lies_outside_of_its_root(name):
    for root in ("http://127.0.0.1:9/set", "memory://set"):
        with pytest.raises(PictureError, match="path-outside"):
            url_inside(root, name)


@pytest.mark.parametrize("name", ["file:///etc/hostname", "http://127.0.0.1:9/a.png"])
def test_a_record_cannot_make_a_local_ingest_fetch_a_url(tmp_path, name):
    with pytest.raises(PictureError, match="path-outside"):
        read_image(tmp_path, name)
