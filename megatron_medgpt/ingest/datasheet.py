"""DATASHEET.md: what a dataset holds, in the order of "Datasheets for Datasets" (Gebru et al., 2021).

What ingest has counted is filled in; what only the people behind the data know is left as questions for them. The file
is made to be edited, so it is no part of the dataset's seal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_medgpt.data.index import IndexedFile
from megatron_medgpt.data.manifest import ShardFacts, Store, added_up
from megatron_medgpt.data.pack import quantiles_of
from megatron_medgpt.data.text import Tokenizer

DATASHEET = "DATASHEET.md"
_LISTED = {
    "modalities": ("Modalities", "modality"), "body_parts": ("Body parts", "body part"), "views": ("Views", "view"),
    "lateralities": ("Lateralities", "laterality"),
}  # fmt: skip
_TO_ANSWER = {
    "Motivation": ("For what purpose was the dataset made, and by whom?",),
    "Collection": (
        "Where do the images and texts come from, and over what time were they acquired?",
        "Which ethics approval, consent or data-use agreement covers them?",
        "Which patients are in it (age, sex, site, scanner), and who is missing?",
    ),
    "Uses": ("What should it be used for, and what not?", "Is any of it in a test set that a model will be scored on?"),
    "Distribution and maintenance": ("Who may receive it, under which terms?", "Whom does one tell of a mistake?"),
}


def write_datasheet(
    folder: Path,
    shards: Sequence[ShardFacts],
    *,
    rejects: Mapping[str, int],
    store: Store,
    provenance: Mapping[str, Any],
    tokenizer: Tokenizer,
) -> None:
    """Write ``folder/DATASHEET.md``. The same inputs give the same text: no clock, no names of files or people."""
    samples, num_rejected = sum(s.num_samples for s in shards), sum(rejects.values())
    pixels = f"squares of {store.size_px} px, padded with RGB {store.pad_rgb}" if store.kind == "pixels" else (
        "validated JPEG and PNG bytes, stripped of everything but pixels"
    )  # fmt: skip
    facts = {
        "records read": samples + num_rejected, "samples": samples, "images": sum(s.num_images for s in shards),
        "text tokens (an image is one)": sum(s.num_tokens for s in shards),
        "of them targets of the loss": sum(s.num_targets for s in shards),
        "tokens of a sample": _lengths(folder, shards), "images are stored as": pixels,
        "tokenizer (sha256)": f"{tokenizer.fingerprint}, {tokenizer.vocab_size} tokens",
    }  # fmt: skip
    lines = ["# Datasheet", "", "Written by `medgpt ingest`; please answer the questions marked **?**.", ""]
    lines += [*_questions("Motivation"), "## Composition", "", *_table(("", ""), facts)]
    for listed, (title, one) in _LISTED.items():
        counts = added_up(shards, listed)
        lines += [f"### {title}", "", *(_table((one, "samples"), counts) if counts else ["Not stated.", ""])]
    lines += ["### Licences", ""]
    lines += _table(("licence", "samples"), provenance["licences"]) if provenance["licences"] else [
        "**?** Not stated at ingest (`--licence`).", ""
    ]  # fmt: skip
    lines += ["### Left out", ""]
    lines += _table(("reason", "records"), rejects) if rejects else ["Nothing: every record became a sample.", ""]
    lines += [*_questions("Collection"), "## Preprocessing", ""]
    inputs = zip(provenance["formats"], provenance["columns"], provenance["inputs_sha256"])
    lines += [
        f"- Input {number}: format `{form}`, columns {_columns(columns)}, sha256 `{digest}`."
        for number, (form, columns, digest) in enumerate(inputs, 1)
    ]
    lines += [
        "- Of a header only modality, body part, view and laterality went on, each as a word of a closed list.",
        "- No other header, path, file name, UID, EXIF, comment or PNG text was copied; ids are keyed hashes.",
        "- Pixels of DICOM files, volumes and slides that are not square in millimetres were made square (bicubic).",
        "- Pictures that may show text of a patient were "
        + ("accepted." if provenance["burned_in_allowed"] else "held back."),
        f"- Texts that look identifying were {_treated(provenance['suspicious_text'])}"
        + "".join(f"; {count} {note}" for note, count in provenance["notes"].items()) + ".",
        "- This is a safety net. It is not a legal de-identification, and nobody has looked at every picture.",
        "- Versions: " + ", ".join(f"{name} {version}" for name, version in provenance["versions"].items()) + ".",
        "",
    ]  # fmt: skip
    lines += _questions("Uses") + _questions("Distribution and maintenance")
    lines += ["Check every byte with `medgpt inspect FOLDER --verify`; look at samples with", "`medgpt inspect FOLDER "]
    lines[-1] += "--sample 8 --png samples.png`."
    (folder / DATASHEET).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _questions(section: str) -> list[str]:
    return [f"## {section}", "", *(f"- **?** {question}" for question in _TO_ANSWER[section]), ""]


def _table(head: tuple[str, str], rows: Mapping[str, Any]) -> list[str]:
    body = [f"| {name} | {f'{value:,}' if isinstance(value, int) else value} |" for name, value in rows.items()]
    return [f"| {head[0]} | {head[1]} |", "|---|---|", *body, ""]


def _lengths(folder: Path, shards: Sequence[ShardFacts]) -> str:
    lengths = [IndexedFile(folder / f"{s.name}.text", "int32").lengths[0::3] for s in shards if s.num_samples]
    if not lengths:
        return "none"
    found = quantiles_of(np.concatenate(lengths))
    return "{least} to {most}, median {median}, 99 % up to {p99}".format(**found)


def _columns(columns: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={column}" for name, column in columns.items()) or "by the format"


def _treated(choice: str) -> str:
    return {"count": "only counted", "mask": "masked", "refuse": "refused"}[choice]
