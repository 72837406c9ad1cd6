"""``medgpt inspect``: what a dataset holds, whether every byte of it is whole, and what its samples look like."""

from __future__ import annotations

import io
import json
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageOps
from rich.console import Console
from rich.table import Table

from megatron_medgpt.config.errors import UsageError, WorkError
from megatron_medgpt.data.manifest import LISTED, TOKENIZER
from megatron_medgpt.data.pack import best_fit_decreasing, quantiles_of
from megatron_medgpt.data.shards import Dataset
from megatron_medgpt.data.stored import StoredSample, unpack_pixels
from megatron_medgpt.data.text import Tokenizer
from megatron_medgpt.data.verify import verify

_TILE_PX, _TEXT_PX, _LINE_PX, _COLUMNS = 224, 620, 14, 100
_SHOWN_IMAGES = 4
_LEGEND = {
    "prompt": "prompt: no loss", "target": "target of the loss", "mark": "an image stands here",
    "other": "?: a letter that this font lacks",
}  # fmt: skip
_INK = {"prompt": (90, 90, 90), "target": (0, 110, 60), "mark": (170, 60, 0), "other": (90, 90, 90)}


def inspect(
    folder: str | Path,
    *,
    check: bool = False,
    sample: int | None = None,
    png: str | Path | None = None,
    as_json: bool = False,
    sequence_length: int = 4096,
    tokens_per_image: int = 576,
) -> str:
    """Text for the terminal about a dataset; JSON where asked for.

    Args:
        check: read every byte and compare it with what the dataset says of itself.
        sample: number of samples to draw into ``png``, spread over the dataset: images, text, marks and loss mask.
        sequence_length, tokens_per_image: what packing efficiency is computed for.

    Raises:
        UsageError: not a dataset, ``sample`` without ``png``, or no place for the picture.
        WorkError: the dataset is damaged; the message lists the first faults.
    """
    if (sample is None) != (png is None):
        raise UsageError("--sample and --png go together: --sample 8 --png samples.png")
    if sample is not None and sample < 1:
        raise UsageError(f"--sample {sample} must be at least 1")
    if png is not None and (Path(png).suffix.lower() != ".png" or not Path(png).parent.is_dir()):
        raise UsageError(f"--png {png}: give a file that ends in .png, in a folder that exists")
    faults = list(_first(verify(folder), 20)) if check else []
    if faults:
        raise WorkError(f"{folder} is damaged: {'; '.join(faults)}; restore the files or ingest again")
    dataset = Dataset(folder)
    facts = facts_of(dataset, sequence_length, tokens_per_image)
    facts["verified"] = check
    drawn = ""
    if png is not None and sample is not None:
        draw_samples(dataset, sample).save(png)
        drawn = f"{png}: {min(sample, len(dataset))} of {len(dataset):,} samples, spread over the dataset"
    return json.dumps(facts, indent=1) if as_json else _as_table(dataset, facts) + drawn


def facts_of(dataset: Dataset, sequence_length: int, tokens_per_image: int) -> dict[str, Any]:
    """Counts, lengths and packing of a dataset as plain JSON."""
    manifest = dataset.manifest
    lengths = dataset.token_lengths + dataset.num_images * (tokens_per_image - 1)
    fitting = lengths[lengths <= sequence_length]
    groups = best_fit_decreasing(np.bincount(fitting, minlength=sequence_length + 1), sequence_length)
    rows = sum(count for _, count in groups)
    quantiles = quantiles_of(dataset.token_lengths)
    return {
        "folder": dataset.folder.name, "samples": len(dataset), "images": manifest.num_images,
        "text_tokens": manifest.num_tokens, "targets": manifest.num_targets,
        **{name: getattr(manifest, name) for name in LISTED},
        "text_tokens_per_sample": quantiles,
        "most_images_per_sample": int(dataset.num_images.max()),
        "packing": {
            "sequence_length": sequence_length, "tokens_per_image": tokens_per_image, "rows": rows,
            "efficiency": round(float(fitting.sum()) / max(1, rows * sequence_length), 4),
            "over_long": int(lengths.size - fitting.size),
        },
        "records": manifest.num_records, "rejects": manifest.rejects, "store": asdict(manifest.store),
        "shards": len(manifest.shards), "bytes": sum(f["bytes"] for s in manifest.shards for f in s.files.values()),
        "tokenizer": manifest.tokenizer["sha256"], "fingerprint": dataset.fingerprint,
        "licences": _added_up(manifest.provenance, "licences"), "notes": _added_up(manifest.provenance, "notes"),
        "provenance": manifest.provenance,
    }  # fmt: skip


def _added_up(provenance: dict[str, Any], field: str) -> dict[str, int]:
    """Counts of a field of the provenance, over the parts of a joined dataset where it is one."""
    counts: Counter[str] = Counter()
    for part in provenance.get("merged", [provenance]):
        counts.update(part.get(field, {}))
    return dict(sorted(counts.items()))


def _as_table(dataset: Dataset, facts: dict[str, Any]) -> str:
    table = Table(title=str(dataset.folder), show_header=False, title_justify="left")
    packing, store = facts["packing"], facts["store"]
    rows = {
        "samples": f"{facts['samples']:,} from {facts['records']:,} records",
        "rejects": ", ".join(f"{count} {reason}" for reason, count in facts["rejects"].items()) or "none",
        "images": f"{facts['images']:,} ({store['kind']}), at most {facts['most_images_per_sample']} in a sample",
        **{
            name.replace("_", " "): ", ".join(f"{value} {count:,}" for value, count in facts[name].items())
            or "not stated"
            for name in LISTED
        },
        "licences": ", ".join(f"{name} {count:,}" for name, count in facts["licences"].items()) or "not stated",
        "noticed": ", ".join(f"{count:,} {note}" for note, count in facts["notes"].items()) or "nothing",
        "text tokens": f"{facts['text_tokens']:,}, {facts['targets']:,} of them targets",
        "tokens per sample": ", ".join(f"{name} {value}" for name, value in facts["text_tokens_per_sample"].items()),
        "packing": f"{packing['rows']:,} rows of {packing['sequence_length']} at {packing['tokens_per_image']} tokens "
        f"an image: {packing['efficiency']:.1%} full, {packing['over_long']} too long",
        "size": f"{_size(facts['bytes'])} in {facts['shards']:,} shard{'s' * (facts['shards'] != 1)}",
        "verified": "every byte" if facts["verified"] else "sizes and structure only (--verify reads every byte)",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    out = io.StringIO()
    Console(file=out, width=110).print(table)
    return out.getvalue()


def _size(count: int) -> str:
    return f"{count / 1e3:,.1f} kB" if count < 1e6 else f"{count / 1e6:,.1f} MB"


def _first(lines: Iterator[str], count: int) -> Iterator[str]:
    for _, line in zip(range(count), lines):
        yield line


def draw_samples(dataset: Dataset, count: int) -> Image.Image:
    """A picture of ``count`` samples: their images, and their text with prompts grey, targets green, marks orange."""
    numbers = np.linspace(0, len(dataset) - 1, max(1, min(count, len(dataset)))).astype(int)
    tokenizer = Tokenizer.load(dataset.folder / TOKENIZER) if (dataset.folder / TOKENIZER).is_file() else None
    tiles = [_draw_sample(dataset, dataset[int(n)], int(n), tokenizer) for n in dict.fromkeys(numbers.tolist())]
    sheet = Image.new("RGB", (max(t.width for t in tiles), _LINE_PX + 8 + sum(t.height + 8 for t in tiles)), "white")
    pen, left, top = ImageDraw.Draw(sheet), 8, _LINE_PX + 8
    for kind, meaning in _LEGEND.items():
        pen.text((left, 4), meaning, fill=_INK[kind])
        left += 160
    for tile in tiles:
        sheet.paste(tile, (0, top))
        top += tile.height + 8
    return sheet


def _draw_sample(dataset: Dataset, sample: StoredSample, number: int, tokenizer: Tokenizer | None) -> Image.Image:
    known = ", ".join(dataset.described(number))
    more = len(sample.image_keys) - _SHOWN_IMAGES
    lines = [("prompt", f"sample {number}  id {sample.sample_id[:12]}  {sample.token_ids.size} tokens  {known}")]
    lines += [("prompt", f"and {more} more image{'s' * (more > 1)}")] if more > 0 else []
    for kind, text in _pieces(sample, dataset.image_mark_id, tokenizer):
        lines += [(kind, line) for line in textwrap.wrap(text, _COLUMNS) or [""]]
    images = [_picture(dataset, key) for key in sample.image_keys[:_SHOWN_IMAGES]]
    left = _TILE_PX * max(1, len(images))
    tile = Image.new("RGB", (left + _TEXT_PX, max(_TILE_PX, _LINE_PX * len(lines) + 8)), "white")
    for place, image in enumerate(images):
        tile.paste(ImageOps.contain(image, (_TILE_PX, _TILE_PX)), (place * _TILE_PX, 0))
    pen = ImageDraw.Draw(tile)
    for row, (kind, line) in enumerate(lines):
        pen.text((left + 8, 4 + row * _LINE_PX), line.encode("latin-1", "replace").decode("latin-1"), fill=_INK[kind])
    return tile


def _pieces(sample: StoredSample, mark: int, tokenizer: Tokenizer | None) -> list[tuple[str, str]]:
    """Runs of prompt, target and mark tokens, in order, as text."""
    kinds = np.zeros(sample.token_ids.size, np.int8)
    for start, end in sample.target_spans_flat.reshape(-1, 2).tolist():
        kinds[start:end] = 1
    kinds[sample.token_ids == mark] = 2
    edges = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), kinds.size]
    runs: list[tuple[str, str]] = []
    for start, end in pairwise(edges):
        ids: Sequence[int] = sample.token_ids[start:end].tolist()
        text = tokenizer.decode(ids, keep_control=True) if tokenizer else " ".join(map(str, ids))
        runs.append((("prompt", "target", "mark")[kinds[start]], text))
    return runs


def _picture(dataset: Dataset, key: tuple[int, int]) -> Image.Image:
    record = dataset.image(key)
    if dataset.manifest.store.kind == "pixels":
        return Image.fromarray(unpack_pixels(record))
    return Image.open(io.BytesIO(record)).convert("RGB")
