"""What becomes of every picture file that pydicom and nibabel ship, as a table.

    pip install pydicom-data        # pydicom's larger test files; without it only those inside pydicom
    python tools/data/decode_outcomes.py --out tools/data/decode_outcomes.tsv

Ends with a summary by transfer syntax, and exits 1 if a file ended in anything but a picture or a stated reason.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import nibabel
import pydicom

from megatron_medgpt.data.picture import PictureError
from megatron_medgpt.ingest.decode import DecodeOptions, decode

_NOT_PICTURES = (".py", ".pyc", ".txt", ".rst", ".json", ".icc", ".dump", ".m", ".gitignore", ".cfg", ".toml")


def shipped() -> Iterator[tuple[str, str, Path]]:
    """(package, name inside of it, file) of every file that may be a picture."""
    folders = {"pydicom": Path(pydicom.__file__).parent / "data" / "test_files"}
    data = importlib.util.find_spec("data_store")
    if data is not None and data.origin:
        folders["pydicom-data"] = Path(data.origin).parent / "data"
    folders["nibabel"] = Path(nibabel.__file__).parent / "tests" / "data"
    for package, folder in folders.items():
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix not in _NOT_PICTURES and not path.name.startswith((".", "README")):
                yield package, str(path.relative_to(folder)), path


def family(path: Path) -> str:
    """The transfer syntax of a DICOM file, else the ending."""
    try:
        header = pydicom.dcmread(path, specific_tags=["TransferSyntaxUID"], stop_before_pixels=True)
        return pydicom.uid.UID(header.file_meta.TransferSyntaxUID).name
    except Exception:  # whatever pydicom raises: it is not readable as DICOM, which the outcome says too
        return path.suffix.lstrip(".") or "no ending"


def outcome(content: bytes) -> str:
    try:
        pictures = decode(content, DecodeOptions(frames="even:3", slices="even:3"), allow_burned_in=True)
    except PictureError as error:
        return error.reason
    first = pictures[0].picture
    return f"{len(pictures)} x {first.width_px} x {first.height_px}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="the table, tab-separated")
    out = parser.parse_args().out
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    rows, kinds, untyped = [], Counter(), 0
    for package, name, path in shipped():
        kind = family(path)
        try:
            result = outcome(path.read_bytes())
        except Exception as error:  # the point of the table: nothing else may come out
            result, untyped = f"RAISED {type(error).__name__}: {error}", untyped + 1
        rows.append((package, name, kind, result))
        kinds[package, kind, "decoded" if " x " in result else result] += 1
    if out:
        lines = ("\t".join(row) for row in (("package", "file", "transfer syntax or ending", "outcome"), *rows))
        out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    for (package, kind, result), count in sorted(kinds.items()):
        print(f"{package:14} {kind:70} {result:28} {count}")
    decoded = sum(" x " in row[3] for row in rows)
    print(f"{len(rows)} files: {decoded} decoded, {len(rows) - decoded - untyped} refused for a reason, {untyped} else")
    return 1 if untyped else 0


if __name__ == "__main__":
    raise SystemExit(main())
