"""Fetching LLaVA-Med's images from a server with the open-access bucket's layout."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.http_files import serving

pytest.importorskip("urllib3")
TOOL = Path(__file__).parents[3] / "tools" / "data" / "fetch_pmc.py"


def image(number):
    return b"\xff\xd8\xff" + bytes([number]) * (100 + number)


@pytest.fixture
def bucket():
    """40 pictures of 20 articles; article 3 is retracted, 4 forbids derivatives, 5 is not open, 6 is not there."""
    with serving() as files:
        files.rows = []
        for article in range(20):
            name = f"PMC{100 + article}"
            folder = f"{name}.{2 if article % 2 else 1}"
            keys = "".join(f"<Key>metadata/{name}.{v}.json</Key>" for v in range(1, 2 + article % 2))
            urls = []
            for k in range(2):
                file, content = f"nihms {article}-f{k}.jpg", image(2 * article + k)
                urls.append(f"s3://pmc-oa-opendata/{folder}/{file}?md5={hashlib.md5(content).hexdigest()}")
                files.content[f"/{folder}/{file.replace(' ', '%20')}"] = content
                files.rows.append(
                    {
                        "pmc_tar_url": f"https://ftp/{name}.tar.gz", "image_file_path": f"{name}/{file}",
                        "pair_id": f"{article}_F{k}",
                    }
                )  # fmt: skip
            record = {
                "license_code": "CC BY-NC-ND" if article == 4 else "CC BY", "is_pmc_openaccess": article != 5,
                "is_retracted": article == 3, "is_manuscript": False, "media_urls": urls,
            }  # fmt: skip
            files.content[f"/?list-type=2&prefix=metadata/{name}."] = b"" if article == 6 else keys.encode()
            files.content[f"/metadata/{folder}.json"] = json.dumps(record).encode()
        yield files


def command(bucket, tmp_path, *more):
    path = tmp_path / "list.jsonl"
    if not path.exists():
        path.write_text("".join(json.dumps(row) + "\n" for row in bucket.rows))
    return [sys.executable, TOOL, path, "--out", tmp_path / "images", "--bucket", bucket.url, "--workers", "4", *more]


def fetch(bucket, tmp_path, *more):
    return subprocess.run(command(bucket, tmp_path, *more), capture_output=True, text=True, timeout=600)


def fetched(tmp_path):
    return {p.name: p.read_bytes() for p in (tmp_path / "images").iterdir() if not p.name.startswith(".")}


def whole():
    return {f"{a}_F{k}.jpg": image(2 * a + k) for a in range(20) for k in range(2) if a not in (3, 4, 5, 6)}


def test_every_picture_is_fetched_or_refused_for_its_reason(bucket, tmp_path):
    bucket.together = 3
    done = fetch(bucket, tmp_path)
    assert done.returncode == 0, done.stderr
    assert fetched(tmp_path) == whole()
    said = done.stdout.splitlines()
    assert said[-6:] == [
        "fetched: 32", "refused license: 2", "refused no-article: 2", "refused not-open-access: 2",
        "refused retracted: 2", "40 lines in all",
    ]  # fmt: skip
    assert bucket.most_at_once >= 3
    asked = sum(bucket.asked.values())
    again = fetch(bucket, tmp_path)
    assert (again.returncode, sum(bucket.asked.values())) == (0, asked)
    assert "40 settled before, 0 to fetch" in again.stdout


def test_other_filters_settle_only_what_they_change(bucket, tmp_path):
    fetch(bucket, tmp_path)
    (tmp_path / "images" / "0_F0.jpg").unlink()
    (tmp_path / "images" / "0_F1.jpg").write_bytes(b"cut short")
    done = fetch(bucket, tmp_path, "--retracted", "--license", "CC BY", "--license", "cc by-nc-nd")
    assert "6 to fetch from 3 articles" in done.stdout
    expected = {f"{a}_F{k}.jpg": image(2 * a + k) for a in (3, 4) for k in range(2)}
    assert fetched(tmp_path) == whole() | expected


def test_what_fails_is_counted_and_fetched_another_time(bucket, tmp_path):
    good = bucket.content["/PMC100.1/nihms%200-f0.jpg"]
    bucket.content["/PMC100.1/nihms%200-f0.jpg"] = b"other bytes"
    bucket.content["/metadata/PMC102.1.json"] = b"<html>busy</html>"
    bucket.status["/PMC101.2/nihms%201-f0.jpg"] = [503, 500]
    del bucket.content["/PMC101.2/nihms%201-f1.jpg"]
    done = fetch(bucket, tmp_path)
    assert done.returncode == 1
    assert done.stderr == "fetch_pmc: error: 3 pictures failed; give the same command again\n"
    for line in ("failed md5-differs: 1", "failed unreadable-record: 2", "refused no-such-image: 1", "fetched: 28"):
        assert line in done.stdout.splitlines()
    assert bucket.asked["/PMC101.2/nihms%201-f0.jpg"] == 3
    bucket.content["/PMC100.1/nihms%200-f0.jpg"] = good
    assert "failed md5-differs" not in fetch(bucket, tmp_path).stdout
    assert fetched(tmp_path)["0_F0.jpg"] == image(0)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_fetch_goes_on_where_it_was(bucket, tmp_path, how):
    bucket.answer(40)  # of 71
    child = subprocess.Popen(command(bucket, tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / "images" / ".fetch.jsonl"
    while not log.exists() or log.read_bytes().count(b"fetched") < 6:
        assert child.poll() is None
        time.sleep(0.01)
    os.kill(child.pid, how)
    bucket.wait_s = 0.2  # what is under way is waited for, and nothing new is begun
    bucket.answer()
    assert child.wait(timeout=600) == (-9 if how == signal.SIGKILL else 1)
    records = [
        json.loads(line) for line in log.read_bytes().splitlines(keepends=True) if line.strip() and line.endswith(b"\n")
    ]
    names = [f"{record['pair_id']}.jpg" for record in records if record["state"] == "fetched"]
    assert 6 <= len(names) < 32
    kept = {name: (tmp_path / "images" / name).stat().st_mtime_ns for name in names}
    with open(log, "ab") as file:
        file.write(b'{"pair_id": "19_F1", "state": "fetch')
    bucket.wait_s = 0.0
    assert fetch(bucket, tmp_path).returncode == 0
    assert fetched(tmp_path) == whole()
    assert "40 settled before" in fetch(bucket, tmp_path).stdout  # no outcome was glued to the line that broke off
    assert kept == {name: (tmp_path / "images" / name).stat().st_mtime_ns for name in kept}


def test_names_that_would_leave_the_folder_are_refused(bucket, tmp_path):
    bad = [
        {"pair_id": "../../canary", "image_file_path": "PMC100/a.jpg"}, {"pair_id": ".x", "image_file_path": "PMC1/a"},
        {"pair_id": "a", "image_file_path": "PMC100/../metadata/x"}, {"pair_id": "b", "image_file_path": "x/a.jpg"},
        {"pair_id": "c", "image_file_path": "PMC100/.."}, {"pair_id": 3, "image_file_path": "PMC100/a"}, {}, [],
    ]  # fmt: skip
    good = bucket.rows[0]
    lines = [json.dumps(row) for row in [*bad, good, good]]
    (tmp_path / "list.jsonl").write_bytes("\n".join(lines).encode() + b'\n\xff\xfe\n{"x"\n')
    done = fetch(bucket, tmp_path)
    assert done.returncode == 0, done.stderr
    for line in ("refused bad-name: 6", "refused unreadable-line: 4", "refused duplicate-pair-id: 1", "fetched: 1"):
        assert line in done.stdout.splitlines()
    assert list(fetched(tmp_path)) == ["0_F0.jpg"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "list.jsonl"]


def test_wrong_usage_is_one_line(bucket, tmp_path):
    done = fetch(bucket, tmp_path, "--workers", "0")
    assert (done.returncode, done.stderr) == (2, "fetch_pmc: error: --workers 0; allowed: 1 to 256\n")
    (tmp_path / "images").write_text("a file")
    assert "cannot be used" in fetch(bucket, tmp_path).stderr
