"""Print what a checkpoint holds without loading a tensor: where the run stood, layout, lineage, names, shapes, sizes.

    python tools/convert/inspect_checkpoint.py runs/a/checkpoints/step-00000500 [--verify] [--match TEXT] [--json]

A run folder or its checkpoints folder may be given too; then the newest published step is shown.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_medgpt.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    altered_files,
    check_listing,
    listed,
    read_manifest,
    step_folders,
)
from megatron_medgpt.checkpoint.metadata import StoredTensor, stored_tensors
from megatron_medgpt.config.errors import MedgptError, UsageError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="a step-NNNNNNNN folder, or a folder that holds some")
    parser.add_argument("--verify", action="store_true", help="check the sha256 of every file")
    parser.add_argument("--match", default="", metavar="TEXT", help="only tensors whose name contains this")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    options = parser.parse_args(arguments)
    try:
        path = find(options.path)
        manifest = read_manifest(path)
        check_listing(path, manifest)
        if options.verify and (altered := altered_files(path, manifest)):
            raise UsageError(f"checkpoint {path}: the content of {listed(altered)} is not what was written")
        tensors = {name: tensor for name, tensor in stored_tensors(path).items() if options.match in name}
    except MedgptError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if options.json:
        print(json.dumps(as_json(path, manifest, tensors), indent=1))
    else:
        print(as_text(path, manifest, tensors, verified=options.verify))
    return 0


def find(path: Path) -> Path:
    """The checkpoint folder meant by ``path``."""
    if (path / MANIFEST).exists():
        return path
    newest = [*step_folders(path), *step_folders(path / "checkpoints")]
    if not newest:
        raise UsageError(f"{path} is no checkpoint and holds none; name a step-NNNNNNNN folder")
    return newest[0]


def as_json(path: Path, manifest: Manifest, tensors: dict[str, StoredTensor]) -> dict[str, Any]:
    return {
        "path": str(path),
        "digest": manifest.digest,
        "facts": asdict(manifest.facts),
        "files": {name: asdict(entry) for name, entry in manifest.files.items()},
        "tensors": {
            name: {
                "shape": tensor.shape,
                "dtype": _dtype(tensor),
                "bytes": tensor.size_bytes,
                "chunks": tensor.num_chunks,
            }
            for name, tensor in tensors.items()
        },
    }


def as_text(path: Path, manifest: Manifest, tensors: dict[str, StoredTensor], *, verified: bool) -> str:
    facts = manifest.facts
    degrees = ", ".join(f"{name} {value}" for name, value in facts.layout.items()) or "not stated"
    size = sum(entry.size_bytes for entry in manifest.files.values())
    lines = [
        f"{path}",
        f"  step      {facts.step}, stage {facts.stage_index} {facts.stage_name!r} at step {facts.stage_step}"
        + (" (its end)" if facts.stage_end else ""),
        f"  data      next row {facts.row}, plan {facts.plan_hash[:16] or '-'}, chain {facts.sample_chain[:16] or '-'}",
        f"  optimizer {'not stored' if facts.optimizer_step is None else f'after {facts.optimizer_step} steps'}",
        f"  layout    {degrees}",
        f"  lineage   {' -> '.join(facts.lineage) or 'none'}",
        *(f"  imported  {part}: {origin}" for part, origin in facts.extra.get("origins", {}).items()),
        f"  versions  {', '.join(f'{name} {version}' for name, version in facts.versions.items())}",
        f"  files     {len(manifest.files)}, {size / 1e6:.1f} MB, digest {manifest.digest[:16]}"
        + (", every sha256 right" if verified else " (contents not checked; --verify does)"),
        "",
    ]
    width = max((len(name) for name in tensors), default=0)
    for name, tensor in sorted(tensors.items()):
        shape = "x".join(map(str, tensor.shape)) or "scalar"
        lines.append(f"  {name:<{width}}  {_dtype(tensor):<9} {shape:<20} {tensor.size_bytes / 1e6:>12.3f} MB")
    total = sum(tensor.size_bytes for tensor in tensors.values())
    lines.append(f"  {len(tensors)} tensors, {total / 1e6:.1f} MB")
    return "\n".join(lines)


def _dtype(tensor: StoredTensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


if __name__ == "__main__":
    sys.exit(main())
