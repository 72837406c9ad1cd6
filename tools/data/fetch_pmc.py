"""Fetch LLaVA-Med's images from the open-access bucket of PubMed Central, one file each.

    python tools/data/fetch_pmc.py llava_med_image_urls.jsonl --out images

The list has ``pmc_tar_url``, ``image_file_path`` (``PMC7236913/name.jpg``) and ``pair_id``. Its tarballs are gone; the
bucket holds each article's files under ``PMC7236913.<version>/`` and a record ``metadata/PMC7236913.<version>.json``
with ``license_code``, ``is_retracted`` and ``media_urls`` (each with its md5). An image becomes ``OUT/<pair_id>.jpg``.

Every line of the list ends as fetched, refused (licence, retracted, not there ...) or failed; ``OUT/.fetch.jsonl`` says
which. Give the same command again and it goes on: what is there is not fetched again, what failed is. Exit 1 while
anything failed. Needs urllib3.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

import urllib3

from megatron_medgpt.config.errors import MedgptError, UsageError, WorkError

BUCKET = "https://pmc-oa-opendata.s3.amazonaws.com"
LICENSES = ("CC0", "CC BY", "CC BY-SA", "CC BY-NC", "CC BY-NC-SA")
"""Taken by default: those that let one make something new of the picture."""
LARGEST_IMAGE_BYTES = 64 << 20
_LARGEST_RECORD_BYTES = 16 << 20
_LOG = ".fetch.jsonl"
_PATH = re.compile(r"(PMC[0-9]{1,12})/([^/\\\x00-\x1f]{1,255})")
_PAIR_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_SECONDS_BETWEEN_LINES = 5.0


@dataclass(frozen=True)
class Wanted:
    """One line of the list."""

    pair_id: str
    article: str
    name: str


@dataclass(frozen=True)
class Article:
    """What the bucket says of an article. ``refusal`` is empty where its pictures may be taken."""

    folder: str = ""
    license: str = ""
    refusal: str = ""
    md5_of: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What became of one line: state is ``fetched``, ``refused`` or ``failed``."""

    pair_id: str
    state: str
    reason: str = ""
    license: str = ""
    bytes: int = 0


class Gone(Exception):
    """The bucket does not have it."""


class Failed(Exception):
    """It may work another time; the text is the reason."""


class Bucket:
    """The bucket over HTTPS; connections are kept, and 429 and 5xx are tried again after a growing pause."""

    def __init__(self, url: str, workers: int, pause_s: float = 0.5) -> None:
        self.url = url.rstrip("/")
        again = urllib3.Retry(
            total=5, backoff_factor=pause_s, status_forcelist=(429, 500, 502, 503, 504), raise_on_status=False
        )
        timeout = urllib3.Timeout(connect=20, read=60)
        self._pool = urllib3.PoolManager(maxsize=workers, block=True, retries=again, timeout=timeout)

    def get(self, path: str, largest_bytes: int) -> bytes:
        """Bytes of an object.

        Raises:
            Gone: 403 and 404. Failed: anything else but 200, a break, or an object that is too large.
        """
        try:
            answer = self._pool.request("GET", self.url + path, preload_content=False)
            try:
                if answer.status in (403, 404):
                    raise Gone
                if answer.status != 200:
                    raise Failed(f"status-{answer.status}")
                content = answer.read(largest_bytes + 1)
            finally:
                answer.drain_conn() if answer.status != 200 else answer.release_conn()
        except urllib3.exceptions.HTTPError as error:
            raise Failed("connection") from error
        if len(content) > largest_bytes:
            raise Failed("too-large")
        return content

    def article(self, name: str) -> Article:
        """The record of an article's latest version."""
        listed = self.get(f"/?list-type=2&prefix=metadata/{name}.", _LARGEST_RECORD_BYTES)
        versions = [int(v) for v in re.findall(rb"<Key>metadata/%s\.([0-9]{1,9})\.json</Key>" % name.encode(), listed)]
        if not versions:
            return Article(refusal="no-article")
        folder = f"{name}.{max(versions)}"
        try:
            record = json.loads(self.get(f"/metadata/{folder}.json", _LARGEST_RECORD_BYTES))
            urls = [urlsplit(url) for url in record["media_urls"]]
            md5_of = {unquote(url.path.rsplit("/", 1)[-1]): parse_qs(url.query).get("md5", [""])[0] for url in urls}
            license, retracted, is_open = (record[k] for k in ("license_code", "is_retracted", "is_pmc_openaccess"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Failed("unreadable-record") from error
        refusal = "retracted" if retracted else "" if is_open else "not-open-access"
        return Article(folder, str(license or ""), refusal, md5_of)


def read_list(path: Path) -> Iterator[Wanted | Outcome]:
    """The lines of the list; one that cannot be used is its outcome."""
    seen: set[str] = set()
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                    pair_id, whole = row["pair_id"], _PATH.fullmatch(row["image_file_path"])
                except (ValueError, KeyError, TypeError):
                    yield Outcome(f"line {number}", "refused", "unreadable-line")
                    continue
                if not isinstance(pair_id, str) or not _PAIR_ID.fullmatch(pair_id) or not whole or whole[2] == "..":
                    yield Outcome(f"line {number}", "refused", "bad-name")
                elif pair_id in seen:
                    yield Outcome(f"line {number}", "refused", "duplicate-pair-id")
                else:
                    seen.add(pair_id)
                    yield Wanted(pair_id, whole[1], whole[2])
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error


def read_log(path: Path) -> dict[str, Outcome]:
    """Pair id -> its last outcome. A line that a kill cut short is no outcome."""
    found = {}
    if path.exists():
        for line in path.read_bytes().splitlines():
            try:
                outcome = Outcome(**json.loads(line))
            except (ValueError, TypeError):
                continue
            found[outcome.pair_id] = outcome
    return found


class Fetch:
    """One run: which lines are still to do, and what becomes of them."""

    def __init__(self, bucket: Bucket, out: Path, licenses: tuple[str, ...], retracted: bool) -> None:
        self.bucket, self.out, self.take_retracted = bucket, out, retracted
        self.licenses = {_plain(name) for name in licenses}
        self.stop = threading.Event()

    def is_done(self, wanted: Wanted, before: Outcome | None) -> bool:
        """Whether an earlier run settled a line: refused, or fetched and still there in its whole length."""
        if before is None or before.state == "failed":
            return False
        if before.state == "refused":
            return self._refused(before.license, before.reason) == before.reason
        path = self._path(wanted)
        return path.is_file() and path.stat().st_size == before.bytes and not self._refused(before.license, "")

    def _refused(self, license: str, reason: str) -> str:
        """The reason that holds under this run's filters."""
        if reason not in ("", "license", "retracted"):
            return reason
        if reason == "retracted" and not self.take_retracted:
            return reason
        return "" if _plain(license) in self.licenses else "license"

    def _path(self, wanted: Wanted) -> Path:
        return self.out / f"{wanted.pair_id}{'.jpg' if not wanted.name.lower().endswith('.png') else '.png'}"

    def article(self, pictures: list[Wanted]) -> list[Outcome]:
        """Fetch the pictures of one article."""
        try:
            article = self.bucket.article(pictures[0].article)
        except Gone:
            article = Article(refusal="no-article")
        except Failed as failure:
            return [Outcome(wanted.pair_id, "failed", str(failure)) for wanted in pictures]
        refusal = self._refused(article.license, article.refusal)
        if refusal:
            return [Outcome(wanted.pair_id, "refused", refusal, article.license) for wanted in pictures]
        return [self._picture(wanted, article) for wanted in pictures if not self.stop.is_set()]

    def _picture(self, wanted: Wanted, article: Article) -> Outcome:
        md5 = article.md5_of.get(wanted.name)
        if not md5:
            reason = "no-such-image" if md5 is None else "no-md5"
            return Outcome(wanted.pair_id, "refused", reason, article.license)
        try:
            content = self.bucket.get(f"/{article.folder}/{quote(wanted.name)}", LARGEST_IMAGE_BYTES)
        except Gone:
            return Outcome(wanted.pair_id, "refused", "no-such-image", article.license)
        except Failed as failure:
            return Outcome(wanted.pair_id, "failed", str(failure), article.license)
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
            return Outcome(wanted.pair_id, "failed", "md5-differs", article.license)
        path = self._path(wanted)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_bytes(content)
        os.replace(partial, path)
        return Outcome(wanted.pair_id, "fetched", "", article.license, len(content))


def _plain(license: str) -> str:
    return license.upper().replace("-", " ").strip()


def run(fetch: Fetch, list_path: Path, workers: int, limit: int | None = None) -> Counter[tuple[str, str]]:
    """Fetch what is missing. Returns (state, reason) -> count over every line of the list, also of earlier runs.

    Raises:
        UsageError: the list or the output cannot be used.
    """
    counts: Counter[tuple[str, str]] = Counter()
    by_article: dict[str, list[Wanted]] = {}
    try:
        fetch.out.mkdir(parents=True, exist_ok=True)
        before = read_log(fetch.out / _LOG)
    except OSError as error:
        raise UsageError(f"--out {fetch.out} cannot be used: {error.strerror}") from error
    for number, wanted in enumerate(read_list(list_path)):
        if limit is not None and number >= limit:
            break
        if isinstance(wanted, Outcome):
            counts[wanted.state, wanted.reason] += 1
        elif fetch.is_done(wanted, before.get(wanted.pair_id)):
            done = before[wanted.pair_id]
            counts[done.state, done.reason] += 1
        else:
            by_article.setdefault(wanted.article, []).append(wanted)
    todo = sum(map(len, by_article.values()))
    print(f"{sum(counts.values())} settled before, {todo} to fetch from {len(by_article)} articles", flush=True)
    began = last = time.monotonic()
    done = 0
    with open(fetch.out / _LOG, "a", encoding="utf-8") as log, ThreadPoolExecutor(workers) as pool:
        log.write("\n")  # ends a line that a kill may have cut short
        for outcomes in _all(pool, fetch, list(by_article.values()), 2 * workers):
            log.writelines(json.dumps(vars(outcome)) + "\n" for outcome in outcomes)
            log.flush()
            counts.update((outcome.state, outcome.reason) for outcome in outcomes)
            done += len(outcomes)
            now = time.monotonic()
            if now - last > _SECONDS_BETWEEN_LINES:
                rate = done / (now - began)
                print(f"  {done} of {todo}, {rate:.1f}/s, {(todo - done) / rate / 60:.0f} min left", flush=True)
                last = now
    counts["failed", "stopped"] += todo - done
    return +counts


def _all(pool: ThreadPoolExecutor, fetch: Fetch, articles: list[list[Wanted]], most: int) -> Iterator[list[Outcome]]:
    waiting = set()
    for pictures in articles:
        if fetch.stop.is_set():
            break
        waiting.add(pool.submit(fetch.article, pictures))
        if len(waiting) >= most:
            ready, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in ready:
                yield future.result()
    while waiting:
        ready, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        for future in ready:
            yield future.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("list", type=Path, help="llava_med_image_urls.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="folder that gets <pair_id>.jpg")
    parser.add_argument("--license", action="append", help=f"take this licence; repeatable; default {LICENSES}")
    parser.add_argument("--retracted", action="store_true", help="take pictures of retracted articles too")
    parser.add_argument("--workers", type=int, default=16, help="articles at a time")
    parser.add_argument("--limit", type=int, help="only the first lines of the list")
    parser.add_argument("--bucket", default=BUCKET, help="another server with the same layout")
    given = parser.parse_args()
    if not 1 <= given.workers <= 256:
        raise UsageError(f"--workers {given.workers}; allowed: 1 to 256")
    bucket = Bucket(given.bucket, given.workers)
    fetch = Fetch(bucket, given.out, tuple(given.license or LICENSES), given.retracted)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: fetch.stop.set())
    counts = run(fetch, given.list, given.workers, given.limit)
    for (state, reason), count in sorted(counts.items()):
        print(f"{state}{f' {reason}' if reason else ''}: {count}")
    print(f"{sum(counts.values())} lines in all")
    failed = sum(count for (state, _), count in counts.items() if state == "failed")
    if failed:
        raise WorkError(f"{failed} pictures failed; give the same command again")


if __name__ == "__main__":
    try:
        main()
    except MedgptError as error:
        print(f"fetch_pmc: error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
