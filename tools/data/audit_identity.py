"""Look for identifiers in every byte that an ingest or a run has written.

    python tools/data/audit_identity.py data/align runs/chest --identifiers secret.txt
    python tools/data/audit_identity.py data/align --dicom /pacs/export --table captions.csv:name,mrn

Identifiers are the lines of a file, what the headers of a DICOM tree hold (names, numbers, dates, addresses, UIDs,
private tags), the columns of a table, and file names (``--names-of``). Each is looked for as UTF-8, UTF-16, base64,
hexadecimal, and as its plain MD5, SHA-1 and SHA-256 (an unkeyed hash of an identifier is an identifier), without
regard to case, in:

- the bytes of every file, and its name;
- what lies compressed in them: gzip and zip members, texts of PNG files wherever they lie in a file, base64 pictures of
  HTML reports;
- the texts of dataset folders, which are token ids there.

A finding is printed as file, place and number of the identifier, never as the identifier itself. Exit 1 where
something was found, 2 where nothing could be looked for. What is drawn into pixels is not read: see medgpt inspect.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import hashlib
import json
import re
import sys
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_medgpt.config.errors import MedgptError, UsageError
from megatron_medgpt.data.manifest import MANIFEST, TOKENIZER
from megatron_medgpt.data.shards import Dataset
from megatron_medgpt.data.text import Tokenizer
from megatron_medgpt.ingest.sources.tables import read_rows

SHORTEST = 4
"""Characters of an identifier that is worth looking for: shorter ones stand in any file by chance."""
_BLOCK = 4 << 20
_LARGEST_UNPACKED = 1 << 28
_PNG = b"\x89PNG\r\n\x1a\n"
_BASE64 = re.compile(rb"base64,([A-Za-z0-9+/=]{16,})")


@dataclass(frozen=True, slots=True)
class Finding:
    path: str
    place: str
    """Where in the file: an offset, or what it was unpacked from."""
    identifier: int
    form: str


class Needles:
    """Every form of every identifier. The time to look depends on the bytes, not on how many there are."""

    def __init__(self, identifiers: Iterable[str]) -> None:
        self.identifiers = list(dict.fromkeys(i.strip() for i in identifiers if len(i.strip()) >= SHORTEST))
        self._by_prefix: dict[bytes, dict[bytes, tuple[int, str]]] = {}
        self.longest = 0
        for number, identifier in enumerate(self.identifiers):
            for variant in dict.fromkeys((identifier, identifier.lower(), identifier.upper())):
                for form, needle in _forms(variant):
                    needle = needle.lower()
                    self._by_prefix.setdefault(needle[:4], {}).setdefault(needle, (number, form))
                    self.longest = max(self.longest, len(needle))
        self._begins = np.zeros(1 << 24, bool)
        for prefix in self._by_prefix:
            self._begins[_mixed(np.frombuffer(prefix, "<u4"))] = True

    def found_in(self, content: bytes) -> Iterator[tuple[int, int, str]]:
        """(offset, number of the identifier, form)."""
        if len(content) < SHORTEST:
            return
        low = content.lower()
        byte = np.frombuffer(low, np.uint8).astype(np.uint32)
        words = byte[:-3] | byte[1:-2] << 8 | byte[2:-1] << 16 | byte[3:] << 24
        for at in np.flatnonzero(self._begins[_mixed(words)]).tolist():
            for needle, meaning in self._by_prefix.get(low[at : at + 4], {}).items():
                if low.startswith(needle, at):
                    yield at, *meaning


def _mixed(words: np.ndarray) -> np.ndarray:
    """24 bits of a multiplicative hash (Knuth) of four bytes each."""
    return (words * np.uint32(2654435761)) >> np.uint32(8)


def _forms(identifier: str) -> Iterator[tuple[str, bytes]]:
    plain = identifier.encode("utf-8", "surrogatepass")
    yield "utf-8", plain
    yield "utf-16", identifier.encode("utf-16-le", "surrogatepass")
    if identifier.isascii() is False:
        yield "latin-1", identifier.encode("latin-1", "ignore")
    yield "json", json.dumps(identifier)[1:-1].encode()
    if len(plain) >= 8:
        yield "hexadecimal", plain.hex().encode()
        for shift in range(3):  # base64 groups three bytes: the same text has three faces
            code = base64.b64encode(b"\0" * shift + plain)
            yield "base64", code[(0, 2, 3)[shift] : len(code) - (4 if (shift + len(plain)) % 3 else 0)]
    for digest in ("md5", "sha1", "sha256"):
        yield digest, hashlib.new(digest, plain).hexdigest().encode()


def audit(folders: Iterable[Path], needles: Needles) -> Iterator[Finding]:
    """Findings in every file under the folders (or the files themselves)."""
    for folder in folders:
        paths = [folder] if folder.is_file() else sorted(p for p in folder.rglob("*") if p.is_file())
        for path in paths:
            name = str(path.relative_to(folder)) if path != folder else path.name
            for _, number, form in needles.found_in(name.encode("utf-8", "surrogateescape")):
                yield Finding(path.name if path == folder else "(a file name)", "name", number, form)
            yield from _audit_file(path, name, needles)
            if path.name == MANIFEST:
                yield from _audit_texts(path.parent, name, needles)


def _audit_file(path: Path, name: str, needles: Needles) -> Iterator[Finding]:
    overlap, start, seen = b"", 0, set()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            content = overlap + block
            for offset, number, form in needles.found_in(content):
                at = start - len(overlap) + offset
                if (at, number) not in seen:
                    seen.add((at, number))
                    yield Finding(name, f"byte {at}", number, form)
            overlap = content[-needles.longest :]
            start += len(block)
    for place, content in _unpacked(path):
        for _, number, form in needles.found_in(content):
            yield Finding(name, place, number, form)


def _unpacked(path: Path) -> Iterator[tuple[str, bytes]]:
    """(where from, bytes) of what lies compressed in a file."""
    with open(path, "rb") as file:
        head = file.read(4)
    if head[:2] == b"\x1f\x8b":
        with gzip.open(path) as packed:
            yield "gzip", packed.read(_LARGEST_UNPACKED)
    if head == b"PK\x03\x04" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.compress_type != zipfile.ZIP_STORED and member.file_size <= _LARGEST_UNPACKED:
                    yield f"zip member {member.header_offset}", archive.read(member)
    content = path.read_bytes() if path.stat().st_size <= 1 << 31 else b""
    yield from _png_texts(content, "")
    for match in _BASE64.finditer(content):
        picture = base64.b64decode(match[1] + b"=" * (-len(match[1]) % 4))
        yield f"base64 at byte {match.start()}", picture
        yield from _png_texts(picture, f"base64 at byte {match.start()}, ")


def _png_texts(content: bytes, within: str) -> Iterator[tuple[str, bytes]]:
    """Compressed texts and profiles of every PNG that begins anywhere in the bytes."""
    at = content.find(_PNG)
    while at >= 0:
        chunk = at + len(_PNG)
        while chunk + 12 <= len(content):
            length, kind = int.from_bytes(content[chunk : chunk + 4], "big"), content[chunk + 4 : chunk + 8]
            if not kind.isalpha() or chunk + 12 + length > len(content):
                break
            if kind in (b"zTXt", b"iTXt", b"iCCP"):
                body = content[chunk + 8 : chunk + 8 + length]
                for start in [m.end() for m in re.finditer(b"\0", body)]:
                    yield f"{within}PNG {kind.decode()} at byte {chunk}", _inflated(body[start:])
                    yield f"{within}PNG {kind.decode()} at byte {chunk}", _inflated(body[start + 1 :])
            chunk += 12 + length
            if kind == b"IEND":
                break
        at = content.find(_PNG, at + 1)


def _inflated(packed: bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(packed, _LARGEST_UNPACKED)
    except zlib.error:  # not where the compressed text begins
        return b""


def _audit_texts(folder: Path, name: str, needles: Needles) -> Iterator[Finding]:
    """The texts of a dataset, decoded from its token ids."""
    if not (folder / TOKENIZER).is_file():
        raise UsageError(f"{folder} has no {TOKENIZER}: its texts cannot be read; put the tokenizer's file there")
    dataset, tokenizer = Dataset(folder), Tokenizer.load(folder / TOKENIZER)
    for number in range(len(dataset)):
        text = tokenizer.decode(dataset[number].token_ids, keep_control=True)
        for _, identifier, form in needles.found_in(text.encode("utf-8", "surrogatepass")):
            yield Finding(name, f"text of sample {number}", identifier, form)


def identifiers_of_dicom(root: Path) -> Iterator[str]:
    """Values of a DICOM tree that name a patient, a person, a place, a day or the file itself, and all private ones."""
    import pydicom
    from pydicom.errors import InvalidDicomError

    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True)
        except (InvalidDicomError, OSError, ValueError, EOFError):
            continue
        for element in header.iterall():
            values = element.value if element.VM > 1 else [element.value]
            named = element.VR in ("PN", "UI", "DA", "DT", "SH", "LO", "ST", "LT", "UN") or element.tag.is_private
            if not named or str(values[0]).startswith("1.2.840.10008."):  # DICOM's own UIDs name nobody
                continue
            for value in values:
                text = value.decode("latin-1") if isinstance(value, bytes) else str(value)
                yield from {text, *text.split("^")} if element.VR == "PN" else (text,)


def identifiers_of_table(given: str) -> Iterator[str]:
    """Columns of a table, given as ``FILE:column,column``."""
    file, _, columns = given.rpartition(":")
    if not file or not Path(file).is_file():
        raise UsageError(f"--table {given}; give FILE:column,column")
    for row in read_rows(Path(file)):
        if isinstance(row, dict):
            for column in columns.split(","):
                if column not in row:
                    raise UsageError(f"--table {given}: there is no column {column}; it has {', '.join(row)}")
                yield str(row[column])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="datasets, run folders, logs")
    parser.add_argument("--identifiers", type=Path, help="a file with one a line")
    parser.add_argument("--dicom", type=Path, help="a tree whose headers hold them")
    parser.add_argument("--table", action="append", default=[], help="FILE:column,column")
    parser.add_argument("--names-of", type=Path, help="a folder whose file names are identifiers")
    given = parser.parse_args()
    asked = [*given.folders, *(path for path in (given.identifiers, given.dicom, given.names_of) if path)]
    missing = [str(path) for path in asked if not path.exists()]
    if missing:
        raise UsageError(f"{missing[0]} does not exist")
    identifiers: list[str] = []
    if given.identifiers:
        identifiers += given.identifiers.read_text(encoding="utf-8").splitlines()
    if given.dicom:
        identifiers += identifiers_of_dicom(given.dicom)
    for table in given.table:
        identifiers += identifiers_of_table(table)
    if given.names_of:
        identifiers += (path.stem for path in given.names_of.rglob("*") if path.is_file())
    needles = Needles(identifiers)
    if not needles.identifiers:
        raise UsageError(f"no identifier of at least {SHORTEST} characters is given; see --help")
    count = 0
    for finding in audit(given.folders, needles):
        count += 1
        print(f"{finding.path}: {finding.place}: identifier {finding.identifier + 1} as {finding.form}")
    print(f"{len(needles.identifiers)} identifiers looked for, {count} found", file=sys.stderr)
    return 1 if count else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MedgptError as error:
        print(f"audit_identity: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
