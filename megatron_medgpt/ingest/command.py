"""``medgpt ingest``: raw files in, a checked dataset folder out."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import PIL
import pydicom

from megatron_medgpt.config.errors import UsageError, WorkError
from megatron_medgpt.data.manifest import (
    MANIFEST,
    STORE_KINDS,
    TOKENIZER,
    Manifest,
    Store,
    write_json,
    write_manifest,
)
from megatron_medgpt.data.text import Tokenizer
from megatron_medgpt.ingest.identity import load_key
from megatron_medgpt.ingest.sources import Record, Source, open_source
from megatron_medgpt.ingest.sources.place import Place
from megatron_medgpt.ingest.write import Finished, Settings, Task, locked, remove_notes, write_shards

CLIP_MEAN_RGB = (122, 116, 104)
"""Padding of pixel stores: CLIP's mean colour (``data.square.pad_rgb``)."""
_SECONDS_BETWEEN_LINES = 5.0
_CARRIED_BYTES = 48 << 20
"""A shard is closed early where the images of archives and parquet, which travel with the records, reach this."""


@dataclass(frozen=True, kw_only=True)
class IngestSummary:
    """What an ingest did. ``num_records == num_samples + sum(rejects.values())``."""

    out: Path
    num_records: int
    num_samples: int
    num_images: int
    num_tokens: int
    rejects: dict[str, int]
    notes: dict[str, int]
    seconds: float


def run_ingest(
    inputs: Sequence[str | Path],
    *,
    out: str | Path,
    tokenizer: str | Path,
    format: str = "auto",
    image_root: str | Path | None = None,
    mapping: dict[str, str] | None = None,
    store: str = "encoded",
    pixel_size_px: int = 336,
    pixel_pad_rgb: tuple[int, int, int] = CLIP_MEAN_RGB,
    workers: int | None = None,
    max_reject_rate: float = 0.05,
    allow_burned_in: bool = False,
    key_file: str | Path | None = None,
    longest_tokens: int = 32_768,
    records_per_shard: int = 2048,
    echo: Callable[[str], None] = print,
) -> IngestSummary:
    """Make a dataset folder of what users have. Run again after a kill, it continues and gives the same bytes.

    Args:
        inputs: tables, tars, folders or fsspec URLs; see ``ingest.sources``.
        image_root: folder of the image names; each table's own folder when None.
        mapping: field -> column, where the columns are not found by name.
        store: ``encoded`` keeps JPEG/PNG bytes; ``pixels`` keeps squares of ``pixel_size_px`` padded with
            ``pixel_pad_rgb``, for one encoder.
        max_reject_rate: share of rejected records above which no dataset is made.
        echo: takes the lines for the terminal.

    Raises:
        UsageError: inputs, tokenizer or output cannot be used; nothing was written.
        WorkError: too many rejects (they are listed in ``rejects.jsonl``), or a worker died.
    """
    began = time.monotonic()
    if store not in STORE_KINDS:
        raise UsageError(f"--store {store}; allowed: {', '.join(STORE_KINDS)}")
    if not inputs:
        raise UsageError("no input; name a table (json, jsonl, csv, tsv, parquet), a tar or a folder")
    out, folder = Path(out), Path(tokenizer)
    _refuse_dataset(out)
    words = Tokenizer.load(folder)
    sources = [open_source(path, format=format, image_root=image_root, mapping=mapping) for path in inputs]
    settings = Settings(
        out=out, tokenizer=folder, key=load_key(key_file), allow_burned_in=allow_burned_in,
        longest_tokens=longest_tokens,
        store=Store(kind=store, size_px=pixel_size_px, pad_rgb=pixel_pad_rgb) if store == "pixels" else Store(),
    )  # fmt: skip
    _show(sources, echo)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        _refuse_dataset(out)  # another ingest may have finished while this one waited for its inputs
        _agree_with_earlier(settings, sources, words, records_per_shard)
        finished = _write(settings, sources, records_per_shard, workers or os.cpu_count() or 1, echo)
        manifest, notes = _complete(settings, words, sources, finished, max_reject_rate)
    seconds = time.monotonic() - began
    summary = IngestSummary(
        out=out, num_records=manifest.num_records, num_samples=manifest.num_samples, num_images=manifest.num_images,
        num_tokens=manifest.num_tokens, rejects=manifest.rejects, notes=notes, seconds=seconds,
    )  # fmt: skip
    echo(
        f"{out}: {summary.num_samples} samples, {summary.num_images} images, {summary.num_tokens} text tokens from "
        f"{summary.num_records} records in {seconds:.1f} s; rejected {_reasons(summary.rejects)}"
    )
    return summary


def _refuse_dataset(out: Path) -> None:
    if (out / MANIFEST).exists():
        raise UsageError(f"{out} is already a dataset; choose another --out or remove it")


def _show(sources: Sequence[Source], echo: Callable[[str], None]) -> None:
    for source in sources:
        echo(source.describe())
        for record in islice((record for record in source.read() if not record.problem), 3):
            turns = " | ".join(f"{turn.role}: {turn.text[:70]!r}" for turn in record.turns[:2])
            echo(f"  record {record.number}: {len(record.images)} image(s); {turns}")


def _agree_with_earlier(settings: Settings, sources: Sequence[Source], words: Tokenizer, per_shard: int) -> None:
    """Refuse to continue an unfinished ingest that had other inputs or settings."""
    facts = {
        "inputs": [[source.format, source.fingerprint(), source.columns] for source in sources],
        "tokenizer": words.fingerprint, "store": asdict(settings.store), "records_per_shard": per_shard,
        "allow_burned_in": settings.allow_burned_in, "longest_tokens": settings.longest_tokens,
        "key": hashlib.sha256(b"which key" + settings.key).hexdigest(),
    }  # fmt: skip
    path = settings.out / ".ingest.json"
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != json.loads(json.dumps(facts)):
        raise UsageError(
            f"{settings.out} holds an unfinished ingest of other inputs or settings; remove it or choose another --out"
        )
    write_json(path, facts)


def _tasks(sources: Sequence[Source], per_shard: int) -> Iterator[Task]:
    """Shards of records in the order of the inputs; a record seen before is a reject."""
    seen: set[bytes] = set()
    number = first = 0
    batch: list[tuple[Record, Place]] = []
    carried = 0
    for source in sources:
        for record in source.read(first):
            first = record.number + 1
            if not record.problem:
                digest = hashlib.sha256(record.source_id.encode("utf-8", "surrogatepass")).digest()[:16]
                if digest in seen:
                    record = Record(record.number, problem="duplicate-id")
                seen.add(digest)
            batch.append((record, source.image_root))
            carried += record.num_bytes
            if len(batch) == per_shard or carried >= _CARRIED_BYTES:
                yield Task(number=number, records=tuple(r for r, _ in batch), image_roots=tuple(p for _, p in batch))
                number, batch, carried = number + 1, [], 0
    if batch:
        yield Task(number=number, records=tuple(r for r, _ in batch), image_roots=tuple(p for _, p in batch))


def _write(
    settings: Settings, sources: Sequence[Source], per_shard: int, workers: int, echo: Callable[[str], None]
) -> list[Finished]:
    finished: list[Finished] = []
    began = last = time.monotonic()
    records = 0
    for shard in write_shards(settings, _tasks(sources, per_shard), workers):
        finished.append(shard)
        records += shard.shard.num_samples + len(shard.rejects)
        now = time.monotonic()
        if now - last > _SECONDS_BETWEEN_LINES:
            rejected = sum(len(done.rejects) for done in finished)
            echo(f"  {records} records, {records / (now - began):.0f}/s, {rejected} rejected")
            last = now
    return sorted(finished, key=lambda shard: shard.shard.name)


def _complete(
    settings: Settings, words: Tokenizer, sources: Sequence[Source], finished: Sequence[Finished], max_rate: float
) -> tuple[Manifest, dict[str, int]]:
    rejects = sorted(reject for shard in finished for reject in shard.rejects)
    lines = [json.dumps({"record": number, "reason": reason}) + "\n" for number, reason in rejects]
    (settings.out / "rejects.jsonl").write_text("".join(lines), encoding="utf-8")
    counts = Counter(reason for _, reason in rejects)
    num_records = sum(shard.shard.num_samples for shard in finished) + len(rejects)
    if num_records == 0 or len(rejects) > max_rate * num_records:
        raise WorkError(
            f"{len(rejects)} of {num_records} records were rejected ({_reasons(counts)}), more than "
            f"--max-reject-rate {max_rate}; see {settings.out}/rejects.jsonl, mend the inputs or raise the rate"
        )
    notes: Counter[str] = Counter()
    for shard in finished:
        notes.update(shard.notes)
    (settings.out / TOKENIZER).write_bytes(words.tokenizer_json)
    manifest = write_manifest(
        settings.out, [shard.shard for shard in finished],
        tokenizer={
            "sha256": words.fingerprint, "vocab_size": words.vocab_size, "image_mark_id": words.image_mark_id,
            "pad_id": words.pad_id,
        },
        store=settings.store, num_records=num_records, rejects=dict(counts),
        provenance={
            "formats": [source.format for source in sources],
            "columns": [source.columns for source in sources], "inputs_sha256": [s.fingerprint() for s in sources],
            "notes": dict(notes),
            "versions": {
                "python": sys.version.split()[0], "numpy": np.__version__, "pillow": PIL.__version__,
                "pydicom": pydicom.__version__,
            },
        },
    )  # fmt: skip
    remove_notes(settings.out, len(finished))
    return manifest, dict(notes)


def _reasons(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in Counter(counts).most_common(5)) or "none"
