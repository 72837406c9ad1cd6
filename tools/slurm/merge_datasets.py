"""Join datasets that were ingested with one tokenizer and one store into one folder, without copying where links do.

    merge_datasets.py --parts data/align.parts --expect 4 --out data/align

Shards are renumbered in the order of the parts; counts, rejects and checksums add up to those of the parts.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from megatron_medgpt.config.errors import MedgptError, UsageError
from megatron_medgpt.data.manifest import (
    MANIFEST,
    TOKENIZER,
    Manifest,
    ShardFacts,
    read_manifest,
    shard_name,
    write_manifest,
)


def merge(parts: list[Path], out: Path) -> Manifest:
    """Write one dataset of the parts' shards.

    Raises:
        UsageError: the parts differ in tokenizer or store, or ``out`` is a dataset already.
    """
    if (out / MANIFEST).exists():
        raise UsageError(f"{out} is a dataset already; remove it or choose another folder")
    manifests = [read_manifest(part)[0] for part in parts]
    for part, manifest in zip(parts, manifests):
        for field in ("tokenizer", "store"):
            if getattr(manifest, field) != getattr(manifests[0], field):
                raise UsageError(f"{part} has another {field} than {parts[0]}; ingest both with the same")
    out.mkdir(parents=True, exist_ok=True)
    shards: list[ShardFacts] = []
    for part, manifest in zip(parts, manifests):
        for shard in manifest.shards:
            shards.append(_place(shard, part, out, shard_name(len(shards))))
    _join_rejects(parts, out)
    if (parts[0] / TOKENIZER).is_file():
        shutil.copyfile(parts[0] / TOKENIZER, out / TOKENIZER)
    rejects: dict[str, int] = {}
    for manifest in manifests:
        for reason, count in manifest.rejects.items():
            rejects[reason] = rejects.get(reason, 0) + count
    return write_manifest(
        out, shards, tokenizer=manifests[0].tokenizer, store=manifests[0].store,
        num_records=sum(m.num_records for m in manifests), rejects=rejects,
        provenance={"merged": [{"part": p.name, **m.provenance} for p, m in zip(parts, manifests)]},
    )  # fmt: skip


def _place(shard: ShardFacts, part: Path, out: Path, name: str) -> ShardFacts:
    """Link a shard's files under a new number."""
    files = {}
    for old, facts in shard.files.items():
        new = name + old.removeprefix(shard.name)
        (out / new).unlink(missing_ok=True)
        try:
            os.link(part / old, out / new)
        except OSError:  # another file system, or one without links
            shutil.copyfile(part / old, out / new)
        files[new] = facts
    return replace(shard, name=name, files=files)


def _join_rejects(parts: list[Path], out: Path) -> None:
    with (out / "rejects.jsonl").open("w", encoding="utf-8") as joined:
        for part in parts:
            file = part / "rejects.jsonl"
            if file.is_file():
                joined.write(file.read_text(encoding="utf-8"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=Path, required=True, help="folder with one dataset folder per array element")
    parser.add_argument("--expect", type=int, required=True, help="how many there must be")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    wanted = [options.parts / f"part-{i:05d}" for i in range(options.expect)]
    missing = [str(i) for i, part in enumerate(wanted) if not (part / MANIFEST).is_file()]
    if missing:
        print(
            f"merge: {len(missing)} of {options.expect} parts are not whole; submit these elements again: "
            f"--array={','.join(missing)}",
            file=sys.stderr,
        )
        return 1
    try:
        merged = merge(wanted, options.out)
    except MedgptError as error:
        print(f"merge: {error}", file=sys.stderr)
        return error.exit_code
    print(f"merge: {merged.num_samples} samples, {merged.num_images} images in {len(merged.shards)} shards")
    return 0


if __name__ == "__main__":
    sys.exit(main())
