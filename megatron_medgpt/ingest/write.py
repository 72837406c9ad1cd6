"""Records to shards: each shard is the work of one process and depends on nothing but its records.

So any number of workers writes the same bytes, and an ingest that was killed continues with the shards that are
missing. A finished shard leaves a note (``.shard-NNNNN.json``) with its facts and rejects until the dataset is whole.
"""

from __future__ import annotations

import fcntl
import json
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import TextIO

from megatron_medgpt.config.errors import UsageError, WorkError
from megatron_medgpt.data.manifest import ShardFacts, Store, shard_name, write_json
from megatron_medgpt.data.picture import Picture, PictureError, resolve_inside
from megatron_medgpt.data.shard_writer import ShardWriter
from megatron_medgpt.data.text import Tokenizer
from megatron_medgpt.ingest.decode import Decoded, DecodeOptions, decode, decode_slide, is_slide_name
from megatron_medgpt.ingest.decode.options import LARGEST_PICTURES_BYTES
from megatron_medgpt.ingest.identity import masked, plain_licence
from megatron_medgpt.ingest.interrupts import deaf_to_interrupts
from megatron_medgpt.ingest.parts import Part
from megatron_medgpt.ingest.sample import facts_of, make_sample, repeat_marks
from megatron_medgpt.ingest.sources import Image as RecordImage
from megatron_medgpt.ingest.sources import Record, RecordError
from megatron_medgpt.ingest.sources.place import Place, read_image

_FORGOTTEN = Picture(b"", 0, 0)
EXCLUDED = "listed-in-exclude"
"""Reason of the rejects that ``--exclude`` lists. They were wanted, so they do not count towards the reject rate."""
SUSPICIOUS = "texts with a "
"""How notes of texts that look identifying begin."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a worker must know. Everything that changes the bytes of a shard is here."""

    out: Path
    tokenizer: Path
    store: Store
    key: bytes
    allow_burned_in: bool
    longest_tokens: int
    suspicious_text: str = "count"
    """One of ``identity.SUSPICIOUS_TEXT``."""
    decode: DecodeOptions = field(default_factory=DecodeOptions)
    excluded: frozenset[str] = frozenset()
    """Ids of samples to leave out."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One shard: its number, its records, and the folder of each record's images."""

    number: int
    records: tuple[Record, ...]
    image_roots: tuple[Place, ...]


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A written shard."""

    shard: ShardFacts
    rejects: tuple[tuple[int, str], ...]
    """(record number, reason)."""
    notes: dict[str, int] = field(default_factory=dict)
    """Counts of things a person should know, e.g. texts that look identifying."""
    licences: dict[str, int] = field(default_factory=dict)
    """Samples by the licence that their records state; an empty name where they state none."""

    @property
    def num_records(self) -> int:
        return self.shard.num_samples + len(self.rejects)


def note_path(out: Path, number: int) -> Path:
    return out / f".{shard_name(number)}.json"


def finished_before(out: Path, number: int) -> Finished | None:
    """The note of a shard that an earlier run completed."""
    try:
        raw = json.loads(note_path(out, number).read_text(encoding="utf-8"))
        shard = ShardFacts(**raw["shard"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
    sizes = {name: (out / name).stat().st_size for name in shard.files if (out / name).is_file()}
    if sizes != {name: entry["bytes"] for name, entry in shard.files.items()}:
        return None
    return Finished(
        shard=shard, rejects=tuple((n, r) for n, r in raw["rejects"]), notes=raw["notes"], licences=raw["licences"]
    )


@lru_cache(maxsize=1)
def _tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


def write_shard(settings: Settings, task: Task) -> Finished:
    """Decode, tokenise and write the records of one shard. Every record becomes a sample or a reject."""
    writer = ShardWriter(settings.out, task.number, settings.store)
    first_of: dict[tuple, tuple[int, list[tuple[Decoded, ...]]]] = {}
    rejects: list[tuple[int, str]] = []
    notes: Counter[str] = Counter()
    licences: Counter[str] = Counter()
    for record, root in zip(task.records, task.image_roots, strict=True):
        kinds = sorted({kind for turn in record.turns for kind in masked(turn.text)[1]})
        try:
            noticed = _write_record(_cleared(record, kinds, settings), root, settings, writer, first_of)
        except (PictureError, RecordError) as error:
            rejects.append((record.number, str(error)))
            continue
        notes.update(f"{SUSPICIOUS}{kind}{' masked' * (settings.suspicious_text == 'mask')}" for kind in kinds)
        notes.update(noticed)
        licences[plain_licence(record.licence)] += 1
    finished = Finished(
        shard=writer.close(), rejects=tuple(rejects), notes=dict(sorted(notes.items())),
        licences=dict(sorted(licences.items())),
    )  # fmt: skip
    write_json(note_path(settings.out, task.number), asdict(finished))
    return finished


def _cleared(record: Record, kinds: Sequence[str], settings: Settings) -> Record:
    """The record with its texts masked, where that was chosen and something was found."""
    if not kinds or settings.suspicious_text == "count":
        return record
    if settings.suspicious_text == "refuse":
        raise RecordError("suspicious-text")
    return replace(record, turns=tuple(replace(turn, text=masked(turn.text)[0]) for turn in record.turns))


def _write_record(record: Record, root: Place, settings: Settings, writer: ShardWriter, first_of: dict) -> list[str]:
    """Write one record and return what a person should know of it."""
    if record.problem:
        raise RecordError(record.problem)
    names = (root, record.modality, *record.images)
    known = first_of.get(names) if record.images else None
    files = known[1] if known else _read_all(root, record, settings)
    images = [picture for file in files for picture in file]
    sample = make_sample(
        repeat_marks(record, [len(file) for file in files]), images, _tokenizer(settings.tokenizer), key=settings.key,
        longest_tokens=settings.longest_tokens,
    )  # fmt: skip
    if sample.sample_id in settings.excluded:
        raise RecordError(EXCLUDED)
    if known is None:
        first = writer.add_images([image.picture.encoded for image in images])
        # Later records of this shard with the same images share them; only their facts are kept in memory.
        forgotten = [tuple(Decoded(_FORGOTTEN, picture.facts) for picture in file) for file in files]
        first_of[names] = (first, forgotten)
    else:
        first = known[0]
    writer.add_sample(
        sample_id=sample.sample_id, token_ids=sample.token_ids, target_spans=sample.target_spans,
        modality=sample.modality, num_images=len(images), first_image=first, body_part=sample.body_part,
        view=sample.view, laterality=sample.laterality,
    )  # fmt: skip
    left_out = [f"records with a {field.replace('_', ' ')} on no list" for field in facts_of(record, images).left_out]
    return left_out + ["pictures made square in millimetres"] * sum(image.squared for image in images)


def _read_all(root: Place, record: Record, settings: Settings) -> list[tuple[Decoded, ...]]:
    """The pictures of each file of a record, which are in memory together."""
    files, num_bytes = [], 0
    for image in record.images:
        files.append(_read(root, image, record.modality, settings))
        num_bytes += sum(len(one.picture.encoded) for one in files[-1])
        if num_bytes > LARGEST_PICTURES_BYTES:
            raise PictureError("pictures-too-large")
    return files


def _read(root: Place, image: RecordImage, modality: str, settings: Settings) -> tuple[Decoded, ...]:
    """The pictures of one file: one, or several of a file with frames, slices or tiles."""
    if isinstance(image, str) and isinstance(root, Path) and is_slide_name(image):
        return decode_slide(resolve_inside(root, image), settings.decode, store=settings.store)
    return decode(
        read_image(root, image), settings.decode, store=settings.store, allow_burned_in=settings.allow_burned_in,
        modality=modality,
    )  # fmt: skip


def write_shards(
    settings: Settings, tasks: Iterable[Task], workers: int
) -> Generator[tuple[Finished, bool], None, None]:
    """Write shards in ``workers`` processes; at most twice as many tasks are in memory.

    Yields:
        Each shard as it is finished, and whether an earlier run had written it.

    Raises:
        WorkError: a worker process died (a codec can bring one down), named by its shard.
    """
    if workers <= 1:
        for task in tasks:
            done = finished_before(settings.out, task.number)
            yield (done, True) if done is not None else (write_shard(settings, task), False)
        return
    waiting: dict[Future, int] = {}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        try:
            for task in tasks:
                done = finished_before(settings.out, task.number)
                if done is not None:
                    yield done, True
                    continue
                if len(waiting) >= 2 * workers:
                    yield from ((shard, False) for shard in _results(waiting))
                with deaf_to_interrupts():  # the pool starts its processes one by one, as they are needed
                    waiting[pool.submit(write_shard, settings, task)] = task.number
            while waiting:
                yield from ((shard, False) for shard in _results(waiting))
        except (KeyboardInterrupt, GeneratorExit):
            # A shard may take minutes. Whole ones are kept; what is half written is written anew the next time.
            for process in active_children():
                process.terminate()
            raise


def _results(waiting: dict[Future, int]) -> Iterator[Finished]:
    for future in wait(waiting, return_when=FIRST_COMPLETED).done:
        number = waiting.pop(future)
        try:
            yield future.result()
        except BrokenProcessPool as error:
            raise WorkError(
                f"a worker died while writing {shard_name(number)} or a shard next to it; run the same command again "
                "to continue, with --workers 1 to see which record it is"
            ) from error


@contextmanager
def locked(out: Path, part: Part | None = None) -> Iterator[None]:
    """Hold the output folder, alone or together with the other parts; a second writer of the same is refused.

    Raises:
        UsageError: another ingest is writing there.
    """
    with ExitStack() as files:
        whole = files.enter_context(open(out / ".ingest.lock", "a+"))
        _hold(whole, fcntl.LOCK_SH if part else fcntl.LOCK_EX, f"another ingest is writing to {out}")
        if part:
            own = files.enter_context(open(out / f".{part.name}.lock", "a+"))
            _hold(own, fcntl.LOCK_EX, f"part {part.number}/{part.count} is being written to {out} already")
        yield
        if not part:
            # Only a finished ingest removes the file: who opened it meanwhile finds dataset.json and stops.
            (out / ".ingest.lock").unlink()


def _hold(file: TextIO, kind: int, refusal: str) -> None:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        raise UsageError(f"{refusal}; wait for it or choose another --out") from error


def remove_notes(out: Path, num_shards: int) -> None:
    """Remove what only an unfinished ingest needs."""
    for number in range(num_shards):
        note_path(out, number).unlink(missing_ok=True)
    for pattern in (".shard-*", ".part-*"):
        for path in out.glob(pattern):
            path.unlink()
    (out / ".ingest.json").unlink(missing_ok=True)
