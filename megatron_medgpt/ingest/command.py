"""``medgpt ingest``: raw files in, a checked dataset folder out."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from megatron_medgpt.config.errors import UsageError, WorkError
from megatron_medgpt.data.exclude import read_excluded
from megatron_medgpt.data.manifest import MANIFEST, SCHEMA, STORE_KINDS, Store, shard_name, write_json
from megatron_medgpt.data.text import Tokenizer
from megatron_medgpt.ingest.complete import complete, in_words
from megatron_medgpt.ingest.decode import DecodeOptions
from megatron_medgpt.ingest.identity import SUSPICIOUS_TEXT, load_key, masked
from megatron_medgpt.ingest.parts import Part, leave_note, shards_of_parts
from megatron_medgpt.ingest.progress import Progress, expected_records
from megatron_medgpt.ingest.seen import SeenIds
from megatron_medgpt.ingest.sources import Record, Source, open_source
from megatron_medgpt.ingest.sources.place import Place, name_of
from megatron_medgpt.ingest.write import SUSPICIOUS, Finished, Settings, Task, finished_before, locked, write_shards

CLIP_MEAN_RGB = (122, 116, 104)
"""Padding of pixel stores: CLIP's mean colour (``data.square.pad_rgb``)."""
_CARRIED_BYTES = 48 << 20
"""A shard is closed early where the images of archives and parquet, which travel with the records, reach this."""
_REJECTS_SHOWN = 20


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
    """Counts of things a person should know, e.g. of texts that look identifying."""
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
    decode: DecodeOptions | None = None,
    key_file: str | Path | None = None,
    suspicious_text: str = "count",
    licence: str = "",
    show_names: bool = False,
    part: str | None = None,
    merge: bool = False,
    longest_tokens: int = 32_768,
    records_per_shard: int = 2048,
    exclude: str | Path | None = None,
    echo: Callable[[str], None] = print,
) -> IngestSummary:
    """Make a dataset folder of what users have. Run again after a kill, it continues and gives the same bytes.

    Args:
        inputs: tables, tars, folders or fsspec URLs; see ``ingest.sources``.
        image_root: folder of the image names; each table's own folder when None.
        mapping: field -> column, where the columns are not found by name.
        store: ``encoded`` keeps JPEG/PNG bytes; ``pixels`` keeps squares of ``pixel_size_px`` padded with
            ``pixel_pad_rgb``, for one encoder.
        max_reject_rate: share of rejected records above which no dataset is made; ``exclude`` does not count.
        exclude: JSONL with a ``sample_id`` a line (tools/data/audit_leakage.py writes one); those samples become
            rejects. Ids are keyed: the key must be the one of the dataset that was audited.
        suspicious_text: what to do with texts that hold a date, a record number and the like: ``count``, ``mask`` or
            ``refuse``.
        licence: of the records that state none in a column of their own, for the manifest and the datasheet.
        show_names: show file names of inputs and rejects on the terminal; they are written nowhere.
        part: ``i/N`` writes only part i (from 0) of the shards, into the ``out`` that all parts share.
        merge: make the dataset of the parts: the same call as theirs, with ``merge`` in place of ``part``.
        decode: frames, slices, tiles, windows and scales of pictures.
        echo: takes the lines for the terminal.

    Returns:
        What was done, of a part only its own.

    Raises:
        UsageError: inputs, tokenizer or output cannot be used; nothing was written.
        WorkError: too many rejects (they are listed in ``rejects.jsonl``), or a worker died.
    """
    began = time.monotonic()
    if store not in STORE_KINDS:
        raise UsageError(f"--store {store}; allowed: {', '.join(STORE_KINDS)}")
    if suspicious_text not in SUSPICIOUS_TEXT:
        raise UsageError(f"--suspicious-text {suspicious_text}; allowed: {', '.join(SUSPICIOUS_TEXT)}")
    if not 0 <= max_reject_rate <= 1:
        raise UsageError(f"--max-reject-rate {max_reject_rate:g}; allowed: 0 to 1, the share of rejected records")
    if workers is not None and workers < 0:
        raise UsageError(f"--workers {workers}; allowed: 0 (every core) or more")
    if part and merge:
        raise UsageError("--part and --merge exclude each other: every part first, then --merge")
    if not inputs:
        raise UsageError("no input; name a table (json, jsonl, csv, tsv, parquet), a tar or a folder")
    out, folder, own = Path(out), Path(tokenizer), Part.parse(part) if part else None
    decode = decode or DecodeOptions()
    if store == "pixels" and 0 < decode.scaled_px < pixel_size_px:
        raise UsageError(f"--scaled-px {decode.scaled_px} is below the {pixel_size_px} px that the store keeps")
    _refuse_dataset(out)
    words = Tokenizer.load(folder)
    sources = [
        open_source(path, format=format, image_root=image_root, mapping=mapping, slices=decode.slices)
        for path in inputs
    ]
    settings = Settings(
        out=out, tokenizer=folder, key=load_key(key_file), allow_burned_in=allow_burned_in,
        longest_tokens=longest_tokens, suspicious_text=suspicious_text, decode=decode,
        excluded=read_excluded(exclude),
        store=Store(kind=store, size_px=pixel_size_px, pad_rgb=pixel_pad_rgb) if store == "pixels" else Store(),
    )  # fmt: skip
    if merge and not out.is_dir():
        raise UsageError(f"--merge: {out} holds no finished part; run every part first, e.g. --part 0/4 to 3/4")
    _refuse_inside(out, sources)
    if own:
        own.refuse_other_counts(out)
    _show(sources, echo, show_names)
    out.mkdir(parents=True, exist_ok=True)
    with _room_on_the_disk(out), locked(out, own):
        _refuse_dataset(out)  # another ingest may have finished while this one waited for its inputs
        agreed = _agree_with_earlier(settings, sources, words, records_per_shard)
        if merge:
            finished = _finished_parts(settings.out, shards_of_parts(out, agreed))
        else:
            workers = workers or os.cpu_count() or 1
            finished, num_shards = _write(settings, sources, records_per_shard, workers, echo, own)
        if show_names:
            _show_rejects(sources, finished, echo)
        if own:
            leave_note(out, own, num_shards=num_shards, settings_digest=agreed)
        else:
            complete(settings, words, sources, finished, max_reject_rate=max_reject_rate, licence=licence)
    summary = _summary(out, finished, time.monotonic() - began)
    for note, count in summary.notes.items():
        advice = suspicious_text == "count" and note.startswith(SUSPICIOUS)
        echo(f"{count} {note}" + " (--suspicious-text mask or refuse)" * advice)
    rejected = sum(summary.rejects.values())
    echo(
        f"{out}: {summary.num_samples} samples, {summary.num_images} images, {summary.num_tokens} text tokens from "
        f"{summary.num_records} records in {summary.seconds:.1f} s; rejected "
        + (f"{rejected}: {in_words(summary.rejects)}" if rejected else "none")
    )
    if own:
        echo(f"part {part} is done; when all are, run the same command with --merge in place of --part")
    return summary


def _summary(out: Path, finished: Sequence[Finished], seconds: float) -> IngestSummary:
    notes: Counter[str] = Counter()
    for shard in finished:
        notes.update(shard.notes)
    return IngestSummary(
        out=out, num_records=sum(shard.num_records for shard in finished),
        num_samples=sum(shard.shard.num_samples for shard in finished),
        num_images=sum(shard.shard.num_images for shard in finished),
        num_tokens=sum(shard.shard.num_tokens for shard in finished),
        rejects=dict(sorted(Counter(reason for shard in finished for _, reason in shard.rejects).items())),
        notes=dict(sorted(notes.items())), seconds=seconds,
    )  # fmt: skip


def _refuse_dataset(out: Path) -> None:
    for place in (out, *out.parents):
        if place.exists() and not place.is_dir():
            raise UsageError(f"--out {out}: {place} is a file; name a folder for the dataset")
    if (out / MANIFEST).exists():
        raise UsageError(f"{out} is already a dataset; choose another --out or remove it")


@contextmanager
def _room_on_the_disk(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise WorkError(
            f"--out {out}: {error.strerror}; make room and run the same command again, which continues"
        ) from error


def _refuse_inside(out: Path, sources: Sequence[Source]) -> None:
    """A folder of pairs is read by its files: those of the dataset would be among them."""
    for source in sources:
        for place in source.places:
            if isinstance(place, Path) and place.is_dir() and out.resolve().is_relative_to(place.resolve()):
                raise UsageError(f"--out {out} lies inside of the input {place}; choose a folder outside of it")


def _show(sources: Sequence[Source], echo: Callable[[str], None], show_names: bool) -> None:
    """What was recognised, with the first three records. Their texts are masked here: this may go into a log."""
    for number, source in enumerate(sources, 1):
        what = source.describe()
        echo(what if show_names else f"input {number}" + what.removeprefix(name_of(source.places[0])))
        for record in islice((record for record in source.read() if not record.problem), 3):
            turns = " | ".join(f"{turn.role}: {masked(turn.text)[0][:70]!r}" for turn in record.turns[:2])
            echo(f"  record {record.number}: {len(record.images)} image(s); {turns}")


def _show_rejects(sources: Sequence[Source], finished: Sequence[Finished], echo: Callable[[str], None]) -> None:
    """The first rejects with the names of their files, for whoever asked to see names."""
    reasons = dict(sorted(reject for shard in finished for reject in shard.rejects)[:_REJECTS_SHOWN])
    first = 0
    for source in sources:
        for record in source.read(first):
            first = record.number + 1
            if record.number in reasons:
                names = ", ".join(i if isinstance(i, str) else "inside" for i in record.images) or "no image"
                echo(f"  record {record.number}: {reasons.pop(record.number)}: {names}")
            if not reasons:
                return


def _agree_with_earlier(settings: Settings, sources: Sequence[Source], words: Tokenizer, per_shard: int) -> str:
    """Refuse to continue an unfinished ingest that had other inputs or settings. Returns a digest of them."""
    facts = {
        "schema": SCHEMA,
        "inputs": [[source.format, source.fingerprint(), source.columns] for source in sources],
        "tokenizer": words.fingerprint, "store": asdict(settings.store), "records_per_shard": per_shard,
        "allow_burned_in": settings.allow_burned_in, "longest_tokens": settings.longest_tokens,
        "suspicious_text": settings.suspicious_text, "decode": asdict(settings.decode),
        "key": hashlib.sha256(b"which key" + settings.key).hexdigest(),
        "excluded": hashlib.sha256("\n".join(sorted(settings.excluded)).encode()).hexdigest(),
    }  # fmt: skip
    path = settings.out / ".ingest.json"
    if not path.exists():
        # Parts begin at the same moment: each writes a file of its own, and one of them stays.
        own = settings.out / f".ingest-{secrets.token_hex(8)}.json"
        write_json(own, facts)
        os.replace(own, path)
    earlier, now = json.loads(path.read_text(encoding="utf-8")), json.loads(json.dumps(facts))
    if earlier != now:
        differ = ", ".join(name.replace("_", " ") for name in now if earlier.get(name) != now[name])
        raise UsageError(
            f"{settings.out} holds an unfinished ingest of other inputs or settings ({differ}); remove it or choose "
            "another --out"
        )
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _tasks(sources: Sequence[Source], per_shard: int) -> Iterator[Task]:
    """Shards of records in the order of the inputs; a record seen before is a reject."""
    seen = SeenIds()
    number = first = 0
    batch: list[tuple[Record, Place]] = []
    carried = 0
    for source in sources:
        for record in source.read(first):
            first = record.number + 1
            if not record.problem and seen.add(record.source_id):
                record = Record(record.number, problem="duplicate-id")
            batch.append((record, source.image_root))
            carried += record.num_bytes
            if len(batch) == per_shard or carried >= _CARRIED_BYTES:
                yield Task(number=number, records=tuple(r for r, _ in batch), image_roots=tuple(p for _, p in batch))
                number, batch, carried = number + 1, [], 0
    if batch:
        yield Task(number=number, records=tuple(r for r, _ in batch), image_roots=tuple(p for _, p in batch))


def _write(
    settings: Settings,
    sources: Sequence[Source],
    per_shard: int,
    workers: int,
    echo: Callable[[str], None],
    part: Part | None,
) -> tuple[list[Finished], int]:
    """Write what is not written yet, all of it or one part: the shards in order, and how many all parts make."""
    num_shards = 0

    def own_tasks() -> Iterator[Task]:
        nonlocal num_shards
        for task in _tasks(sources, per_shard):
            num_shards = task.number + 1
            if part is None or part.writes(task.number):
                yield task

    total = expected_records(sources)
    if part is not None and total is not None:
        total = -(-total // part.count)  # about: shards are dealt out whole
    finished: list[Finished] = []
    with Progress(total, echo) as progress, closing(write_shards(settings, own_tasks(), workers)) as shards:
        for shard, from_before in shards:
            finished.append(shard)
            progress.add(shard.num_records, len(shard.rejects), from_before=from_before)
    return sorted(finished, key=lambda shard: shard.shard.name), num_shards


def _finished_parts(out: Path, num_shards: int) -> list[Finished]:
    """The notes of all shards, in order.

    Raises:
        WorkError: a shard that a part has written is missing or has another size now.
    """
    shards = [finished_before(out, number) for number in range(num_shards)]
    lost = [shard_name(number) for number, shard in enumerate(shards) if shard is None]
    if lost:
        raise WorkError(
            f"{len(lost)} of {num_shards} shards of {out} are missing or damaged ({', '.join(lost[:3])}); run the "
            "parts again, which writes only these"
        )
    return [shard for shard in shards if shard is not None]
