"""The end of an ingest: rejects are counted and listed, the manifest and the datasheet are written."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version

import numpy as np
import PIL

from megatron_medgpt.config.errors import WorkError
from megatron_medgpt.data.manifest import REJECTS, TOKENIZER, Manifest, write_manifest
from megatron_medgpt.data.text import Tokenizer
from megatron_medgpt.ingest.datasheet import write_datasheet
from megatron_medgpt.ingest.sources import Source
from megatron_medgpt.ingest.write import EXCLUDED, Finished, Settings, remove_notes

_REASONS_SHOWN = 8
_MENDS = {
    "missing-file": "name the folder that image names are relative to with --image-root",
    "not-utf-8": "save the table as UTF-8, e.g. iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW",
    "duplicate-id": "name the column of their own ids with --map id=COLUMN, or go by content with --map id=",
    "burned-in-text-not-ruled-out": "look at the pictures, and give --allow-burned-in where they show no identity",
    "path-outside": "name images relative to --image-root; a link must stay inside of it",
    "slide-without-overview": "write the slides with smaller levels, e.g. vips tiffsave --tile --pyramid",
    "pictures-too-large": "take fewer with --frames, --slices or --tiles",
    "too-many-frames": "take fewer with --frames, --slices or --tiles",
}
"""Of reasons that often hold for a whole input: what a person can do."""


def complete(
    settings: Settings,
    words: Tokenizer,
    sources: Sequence[Source],
    finished: Sequence[Finished],
    *,
    max_reject_rate: float,
    licence: str,
) -> Manifest:
    """Make a dataset of the shards, in the order given.

    Raises:
        WorkError: too many rejects; they are listed in ``rejects.jsonl`` and the shards stay for another try.
    """
    rejects = sorted(reject for shard in finished for reject in shard.rejects)
    lines = [json.dumps({"record": number, "reason": reason}) + "\n" for number, reason in rejects]
    (settings.out / REJECTS).write_text("".join(lines), encoding="utf-8")
    counts = Counter(reason for _, reason in rejects)
    num_records = sum(shard.shard.num_samples for shard in finished) + len(rejects)
    unwanted = len(rejects) - counts[EXCLUDED]
    if num_records == 0 or unwanted > max_reject_rate * num_records:
        del counts[EXCLUDED]
        mend = _MENDS.get(max(counts, key=lambda reason: counts[reason], default=""), "mend the inputs")
        raise WorkError(
            f"{unwanted} of {num_records} records were rejected ({in_words(counts)}), more than "
            f"--max-reject-rate {max_reject_rate:g}; see {settings.out}/{REJECTS}; {mend}, or raise the rate"
        )
    notes: Counter[str] = Counter()
    licences: Counter[str] = Counter()
    for shard in finished:
        notes.update(shard.notes)
        for name, count in shard.licences.items():
            licences[name or licence or "not stated"] += count
    (settings.out / TOKENIZER).write_bytes(words.tokenizer_json)
    shards = [shard.shard for shard in finished]
    provenance = {
        "formats": [source.format for source in sources],
        "columns": [source.columns for source in sources], "inputs_sha256": [s.fingerprint() for s in sources],
        "licences": dict(sorted(licences.items())) if set(licences) != {"not stated"} else {},
        "suspicious_text": settings.suspicious_text, "burned_in_allowed": settings.allow_burned_in,
        "notes": dict(sorted(notes.items())), "decode": asdict(settings.decode), "square_pixels": "bicubic",
        "versions": {
            "python": sys.version.split()[0], "numpy": np.__version__, "pillow": PIL.__version__,
            "pydicom": version("pydicom"), "torch": version("torch"),
        },
    }  # fmt: skip
    write_datasheet(settings.out, shards, rejects=counts, store=settings.store, provenance=provenance, tokenizer=words)
    manifest = write_manifest(
        settings.out, shards,
        tokenizer={
            "sha256": words.fingerprint, "vocab_size": words.vocab_size, "image_mark_id": words.image_mark_id,
            "pad_id": words.pad_id,
        },
        store=settings.store, num_records=num_records, rejects=dict(counts), provenance=provenance,
    )  # fmt: skip
    remove_notes(settings.out, len(finished))
    return manifest


def in_words(counts: dict[str, int]) -> str:
    """The reasons with their counts, the most frequent first; of more than eight what is left as one number."""
    listed = Counter(counts).most_common()
    shown = [f"{count} {reason}" for reason, count in listed[:_REASONS_SHOWN]]
    if rest := sum(count for _, count in listed[_REASONS_SHOWN:]):
        shown.append(f"{rest} for {len(listed) - _REASONS_SHOWN} other reasons")
    return ", ".join(shown)
