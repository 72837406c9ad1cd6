"""WebDataset tars, read as a stream: samples are runs of members with one name up to the first dot.

Nothing is ever extracted: a member's name is only a key. A name that would leave a folder, a link that is not a file, a
header that does not check or an archive without its end stops the reading, because nobody can count what follows.
"""

from __future__ import annotations

import gzip
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from typing import IO, Any

from megatron_medgpt.config.errors import WorkError
from megatron_medgpt.data.picture import LARGEST_FILE_BYTES
from megatron_medgpt.ingest.sources.place import Place, name_of, open_place
from megatron_medgpt.ingest.sources.record import Inline
from megatron_medgpt.ingest.sources.tables import parse_json, row_of

ARCHIVE_ENDINGS = (".tar", ".tar.gz", ".tgz")
_SYSTEM_NAMES = (".ds_store", "thumbs.db", "desktop.ini")
KEY = "__key__"
"""Column with the key of a sample, as WebDataset calls it."""
_BLOCK = tarfile.BLOCKSIZE
_LARGEST_HEADER_BYTES = 1 << 20
_MOST_PARTS = 512
_MOST_ZEROS = 64 << 20
_TEXTS = ("txt", "text", "caption")
_PICTURES = ("jpg", "jpeg", "png", "dcm", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2", "img", "image", "pyd")
_NUMBER = re.compile(r"([0-9]+)")


def is_archive(place: Place) -> bool:
    return name_of(place).lower().endswith(ARCHIVE_ENDINGS)


def is_of_the_system(name: str) -> bool:
    """Whether a name is that of a file which macOS or Windows leaves in folders, and their archivers put into archives.

    ``._a.jpg`` lies between ``a.jpg`` and ``a.txt``, and would divide them.
    """
    *folders, base = name.split("/")
    return base.startswith("._") or base.lower() in _SYSTEM_NAMES or "__MACOSX" in folders


def archive_rows(place: Place) -> Iterator[dict[str, Any] | str]:
    """The samples of an archive as rows: their pictures under ``image``, a text under ``caption``, a JSON as itself.

    Raises:
        WorkError: the archive is damaged or hostile.
    """
    for key, parts in samples(place):
        yield parts if isinstance(parts, str) else row_of_parts(f"{name_of(place)}/{key}", parts)


def row_of_parts(key: str, parts: Mapping[str, bytes]) -> dict[str, Any] | str:
    """One sample as a row, or the reason why it is none."""
    row: dict[str, Any] = {}
    for ending in sorted(parts):
        kind = ending.rsplit(".", 1)[-1].lower()
        if kind == "json":
            found = json_part(parts[ending])
            if isinstance(found, str):
                return found
            if any(name in row for name in found):
                return "several-texts"
            row |= found
        elif kind in _TEXTS:
            if "caption" in row:
                return "several-texts"
            try:
                row["caption"] = parts[ending].decode("utf-8")
            except UnicodeDecodeError:
                return "not-utf-8"
    pictures = [parts[e] for e in sorted(parts, key=_natural) if e.rsplit(".", 1)[-1].lower() in _PICTURES]
    if pictures:
        row["image"] = [Inline.of(content) for content in pictures]
    row[KEY] = key
    return row


def json_part(content: bytes) -> dict[str, Any] | str:
    """The columns of a JSON member; a bare list is a LLaVA dialogue, as Megatron-LM's converter writes it."""
    try:
        value = parse_json(content)
    except ValueError:
        return row_of(content)
    return {"conversations": value} if isinstance(value, list) else row_of(content)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() and part.isascii() else (-1, part) for part in _NUMBER.split(name)]


def samples(place: Place) -> Iterator[tuple[str, dict[str, bytes] | str]]:
    """(key, ending -> content) of each sample, or (key, reason) of one that cannot be used."""
    key, parts, problem, total = None, {}, "", 0
    for name, content in members(place):
        if is_of_the_system(name):
            continue
        folder, _, base = name.rpartition("/")
        stem, _, ending = base.partition(".")
        stem = f"{folder}/{stem}" if folder else stem
        if stem != key:
            if key is not None:
                yield key, problem or parts
            key, parts, problem, total = stem, {}, "", 0
        total += len(content or b"")
        if content is None or total > LARGEST_FILE_BYTES:
            problem, parts = "file-too-large", {}
        elif ending in parts:
            problem, parts = "duplicate-part", {}
        elif len(parts) >= _MOST_PARTS:
            problem, parts = "too-many-parts", {}
        elif not problem:
            parts[ending] = content
    if key is not None:
        yield key, problem or parts


def members(place: Place) -> Iterator[tuple[str, bytes | None]]:
    """(name, content) of each file of an archive in its order; the content of one above the cap is None.

    Raises:
        WorkError: see ``archive_rows``.
    """
    with open_place(place) as file:
        stream = file if name_of(place).lower().endswith(".tar") else gzip.GzipFile(fileobj=file)
        number = 0
        try:
            for member in _members(stream):
                number += 1
                yield member
        except (tarfile.HeaderError, EOFError, OSError, ValueError, zlib.error) as error:
            raise WorkError(
                f"{name_of(place)}: {error} behind member {number}; nothing behind it was read: fetch or write the "
                "archive again"
            ) from error


def _members(stream: IO[bytes]) -> Iterator[tuple[str, bytes | None]]:
    long_name, pax = None, {}
    while True:
        block = _exactly(stream, _BLOCK)
        if block == bytes(_BLOCK):
            _refuse_more(stream)
            return
        member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        size = int(pax["size"]) if pax.get("size", "").isdigit() else member.size
        if size < 0:
            raise ValueError("a negative size")
        padding = -size % _BLOCK
        if member.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE):
            if size > _LARGEST_HEADER_BYTES:
                raise ValueError("a header that is too large")
            header = _exactly(stream, size + padding)[:size]
            if member.type == tarfile.GNUTYPE_LONGNAME:
                long_name = header.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif member.type == tarfile.XHDTYPE:
                pax = _pax(header)
            continue
        name = pax.get("path") or long_name or member.name
        _refuse_attack(name, member, pax)
        long_name, pax = None, {}
        if member.type == tarfile.DIRTYPE:
            _skip(stream, size + padding)
            continue
        whole = size <= LARGEST_FILE_BYTES
        if whole:
            yield name.removeprefix("./"), _exactly(stream, size)
            _skip(stream, padding)
        else:
            _skip(stream, size + padding)
            yield name.removeprefix("./"), None


def _refuse_attack(name: str, member: tarfile.TarInfo, pax: Mapping[str, str]) -> None:
    if name.startswith(("/", "\\", "~")) or ".." in re.split(r"[/\\]", name) or "\x00" in name:
        raise ValueError("a member whose name leaves the archive")
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE, tarfile.DIRTYPE):
        raise ValueError("a member that is a link, a device, a pipe or has holes")
    if any(key.startswith("GNU.sparse") for key in pax):
        raise ValueError("a member that has holes")


def _pax(header: bytes) -> dict[str, str]:
    """Records ``length key=value\\n`` of an extended header."""
    found = {}
    while header.strip(b"\0"):
        length, blank, _ = header.partition(b" ")
        if not blank or not length.isdigit() or not len(length) < int(length) <= len(header):
            raise ValueError("an extended header that is none")
        key, equals, value = header[len(length) + 1 : int(length)].removesuffix(b"\n").partition(b"=")
        if not equals:
            raise ValueError("an extended header that is none")
        found[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        header = header[int(length) :]
    return found


def _exactly(stream: IO[bytes], size: int) -> bytes:
    pieces = []
    while size > 0:
        piece = stream.read(min(size, 1 << 20))  # a header may claim more than there is
        if not piece:
            raise EOFError("the archive breaks off")
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def _refuse_more(stream: IO[bytes]) -> None:
    """Behind the end stand zeros; a second archive there would be left out silently."""
    total = 0
    while piece := stream.read(1 << 16):
        total += len(piece)
        if piece.strip(b"\0") or total > _MOST_ZEROS:
            raise ValueError("something stands behind its end,")


def _skip(stream: IO[bytes], size: int) -> None:
    while size > 0:
        piece = stream.read(min(size, 1 << 20))
        if not piece:
            raise EOFError("the archive breaks off")
        size -= len(piece)
