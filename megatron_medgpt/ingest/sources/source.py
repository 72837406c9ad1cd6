"""Finding out what an input is, and reading it as records."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.ingest.sources.archive import ARCHIVE_ENDINGS, KEY, archive_rows, is_archive
from megatron_medgpt.ingest.sources.columns import (
    FIELDS,
    FORMATS,
    NEEDED,
    UID_KEYWORDS,
    choose_columns,
    detect_format,
    in_print,
)
from megatron_medgpt.ingest.sources.energon import META, open_energon
from megatron_medgpt.ingest.sources.folder import is_text, pair_rows, pairs_in
from megatron_medgpt.ingest.sources.place import (
    Place,
    as_place,
    expand,
    holds_image,
    is_url,
    name_of,
    open_place,
    size_of,
)
from megatron_medgpt.ingest.sources.record import Record, RecordError, checked_turns, with_marks
from megatron_medgpt.ingest.sources.rows import CONVERTERS, caption_turns, images_of, names_of
from megatron_medgpt.ingest.sources.tables import ENDINGS, ending_of, read_rows

_PICTURES = (".dcm", ".dicom", ".nii", ".nii.gz", ".jpg", ".jpeg", ".png", ".tif", ".tiff", ".svs", ".ndpi", "dicomdir")
_MENDS = {
    _PICTURES: "name a table of its texts, and the folder of the images with --image-root",
    (".zip", ".7z", ".rar", ".gz", ".bz2", ".xz", ".zst"): "unpack it first",
    (".xlsx", ".xls", ".ods"): "save the sheet as CSV in UTF-8 first",
    (".arrow", ".feather"): "write it as parquet first",
    (".txt",): "name a table .csv or .tsv",
}
"""What to do with a file that is no input by itself."""
Rows = Callable[[], Iterator[dict[str, Any] | str]]
_ROWS_LOOKED_AT = 100
"""Rows in which the first usable one is looked for."""
_IMAGE_FOLDERS = ("images", "imgs", "figures", "Images")
_SPLIT = re.compile(r"(.+?)(?:-[0-9]+-of-[0-9]+)?\.parquet")
_HASHED_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Source:
    """An input with a format and the columns that were chosen. Iterate with ``read``."""

    places: tuple[Place, ...]
    """Tables or archives, in the order in which they are read; the folder itself for pairs of files."""
    format: str
    image_root: Place
    rows: Rows
    columns: dict[str, str] = field(default_factory=dict)
    uid_paths: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """SOP, series or study UID -> files of the tree, for ``dicom``."""
    remark: str = ""

    def describe(self) -> str:
        """One line for the terminal: which format, and which column serves as what."""
        chosen = ", ".join(f"{name}={in_print(column) or 'by content'}" for name, column in self.columns.items())
        more = f" and {len(self.places) - 1} more" if len(self.places) > 1 else ""
        remark = f"; {self.remark}" if self.remark else ""
        return f"{name_of(self.places[0])}{more}: format {self.format}" + (f" ({chosen})" if chosen else "") + remark

    def fingerprint(self) -> str:
        """sha256 of what is read. Of archives, parquet and folders: of names, sizes, first and last MiB."""
        digest = hashlib.sha256()
        for place in self.places:
            if isinstance(place, Path) and place.is_dir():
                listed, _ = pairs_in(place)
                facts = [(name, (place / name).stat().st_size) for names in listed.values() for name in names]
                digest.update(json.dumps(facts).encode("utf-8", "surrogatepass"))
            elif len(self.places) == 1 and not is_archive(place) and ending_of(place) != ".parquet":
                return _sha256(place)
            else:
                digest.update(json.dumps([name_of(place), size_of(place), _ends(place)]).encode())
        return digest.hexdigest()

    def read(self, first_number: int = 0) -> Iterator[Record]:
        """Every record, usable or not."""
        for number, row in enumerate(self.rows(), first_number):
            if isinstance(row, str):
                yield Record(number, problem=row)
                continue
            try:
                yield self._record(number, row)
            except RecordError as error:
                yield Record(number, problem=str(error))

    def _record(self, number: int, row: dict[str, Any]) -> Record:
        convert = CONVERTERS.get(self.format)
        images, turns = convert(row, self.columns) if convert else self._from_dicom(row)
        turns = checked_turns(with_marks(turns, len(images)), len(images))
        modality = row.get(self.columns.get("modality", "modality"))
        if not isinstance(modality, str):
            domain = row.get("domain")  # LLaVA-Med: {"chest_xray": true, "mri": false, ...}
            modality = next((k for k, v in domain.items() if v is True), "") if isinstance(domain, dict) else ""
        named = self.columns.get("id", "id")
        own = row.get(named) if named else ""
        own = row.get(KEY) if named and own in (None, "") else own
        content = json.dumps([names_of(images), [(t.role, t.text) for t in turns]])
        digest = hashlib.sha256(content.encode()).hexdigest()
        return Record(
            number, images, turns, modality, f"id:{own}" if own not in (None, "") else digest,
            **{name: self._plain(row, name) for name in ("licence", "body_part", "view", "laterality")},
        )  # fmt: skip

    def _plain(self, row: Mapping[str, Any], name: str) -> str:
        value = row.get(self.columns[name]) if name in self.columns else ""
        return value if isinstance(value, str) else ""

    def _from_dicom(self, row: dict[str, Any]) -> tuple[tuple[str, ...], list]:
        uid = row.get(next(self.columns[kind] for kind in UID_KEYWORDS if kind in self.columns))
        images = self.uid_paths.get(uid.strip(), ()) if isinstance(uid, str) else ()
        if not images:
            raise RecordError("missing-file")
        text = row.get(self.columns["text"])
        if not isinstance(text, str):
            raise RecordError("text-is-not-a-string")
        return caption_turns(images, text.strip())


def _sha256(place: Place) -> str:
    digest = hashlib.sha256()
    with open_place(place) as file:
        while piece := file.read(_HASHED_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _ends(place: Place) -> list[str]:
    with open_place(place) as file:
        pieces = [file.read(_HASHED_BYTES)]
        if isinstance(place, Path):
            file.seek(max(0, size_of(place) - _HASHED_BYTES))
            pieces.append(file.read(_HASHED_BYTES))
    return [hashlib.sha256(piece).hexdigest() for piece in pieces]


def open_source(
    path: str | Path,
    *,
    format: str = "auto",
    image_root: str | Path | None = None,
    mapping: dict[str, str] | None = None,
    slices: str = "middle",
) -> Source:
    """Find out what a file, a folder or a URL is.

    Args:
        slices: which slices of a DICOM series are taken (``ingest.decode.DecodeOptions``).

    Raises:
        UsageError: it is missing, of no known shape, or of several (the message says what to set).
    """
    mapping = dict(mapping or {})
    if format not in FORMATS:
        raise UsageError(f"--format {format}; allowed: {', '.join(FORMATS)}")
    for name in mapping:
        if name not in FIELDS:
            raise UsageError(f"--map {name}={mapping[name]}; allowed fields: {', '.join(FIELDS)}")
    places, rows, remark = _find(path)
    looked_at = list(islice(rows(), _ROWS_LOOKED_AT))
    first = next((row for row in looked_at if isinstance(row, dict)), None)
    if first is None:
        what = f"no readable record in its first {len(looked_at)}: {looked_at[0]}" if looked_at else "no record"
        raise UsageError(f"{path} holds {what}; expected {_EXPECTED}")
    if KEY in first and len(first) < 3 and "conversations" not in first:
        has = ", ".join(set(first) - {KEY}) or "files of other kinds"
        raise UsageError(
            f"{path}: its first sample has only {has}; a picture and its text lie one after the other under one name "
            "(a.jpg, a.txt, b.jpg, ...): write the tar with --sort=name, and unpack tars of any other kind"
        )
    root = _image_root(path, places, image_root)
    columns = choose_columns(first, mapping, path)
    if "image" not in columns and {"id", "text"} <= columns.keys() and holds_image(root, str(first[columns["id"]])):
        columns["image"] = columns["id"]  # ROCOv2: the id is the file's name without its ending
    chosen = detect_format(first, columns, path) if format == "auto" else format
    missing = [name for name in NEEDED[chosen] if name not in columns and not (name == "answer" and "label" in columns)]
    if missing:
        raise UsageError(f"{path} has no column for {missing[0]}; name it with --map {missing[0]}=COLUMN")
    if chosen == "dicom":
        return _dicom_source(places, rows, root, columns, slices)
    if image_root is None and isinstance(root, Path) and chosen != "messages":
        root = _with_images(root, images_at(first, columns))
    return Source(places=places, format=chosen, image_root=root, columns=columns, rows=rows, remark=remark)


_EXPECTED = (
    "a JSON array, JSONL, CSV, TSV or parquet table, a WebDataset tar, or a folder with one of these or with pairs"
)


def images_at(row: Mapping[str, Any], columns: Mapping[str, str]) -> list[str]:
    """Names of the images of a row, where it has any."""
    try:
        return [i for i in images_of(row.get(columns.get("image", "image"))) if isinstance(i, str)]
    except RecordError:
        return []


def _with_images(root: Path, names: Sequence[str]) -> Path:
    """The folder of a table, or the one inside it in which datasets keep their images (SLAKE: ``imgs``)."""
    if names and not holds_image(root, names[0]):
        for folder in _IMAGE_FOLDERS:
            if (root / folder).is_dir() and holds_image(root / folder, names[0]):
                return root / folder
    return root


def _dicom_source(places: tuple[Place, ...], rows: Rows, root: Place, columns: dict[str, str], slices: str) -> Source:
    from megatron_medgpt.ingest.dicom_tree import files_by_uid

    if not isinstance(root, Path):
        raise UsageError(f"--image-root {root}: a tree of DICOM files must lie on this machine")
    kind = next((kind for kind in UID_KEYWORDS if kind in columns), None)
    if kind is None:
        raise UsageError(f"{places[0]} has no column for sop_uid; name it with --map sop_uid=COLUMN")
    tree = files_by_uid(root, UID_KEYWORDS[kind], slices)
    return Source(
        places=places, format="dicom", image_root=root, columns=columns, rows=rows, uid_paths=tree.paths,
        remark=tree.remark,
    )  # fmt: skip


def _image_root(path: str | Path, places: tuple[Place, ...], given: str | Path | None) -> Place:
    place = as_place(path)
    if given is not None:
        root = as_place(given)
    elif isinstance(place, Path):
        root = place if place.is_dir() else place.parent
    else:
        root = place.rpartition("/")[0]
    if isinstance(root, Path) and not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise UsageError(f"--image-root {root} {what}{_mend(root) if root.exists() else ''}")
    return root


def _mend(place: Place) -> str:
    name = name_of(place).lower()
    name += ".dcm" * ("." not in name)  # as files on a PACS disc are called
    return next((f"; {mend}" for endings, mend in _MENDS.items() if name.endswith(endings)), "")


def _find(path: str | Path) -> tuple[tuple[Place, ...], Rows, str]:
    """Places, rows and a remark of an input."""
    place = as_place(path)
    if isinstance(place, Path) and place.is_dir():
        return _in_folder(place)
    places = (place,) if isinstance(place, Path) and place.exists() else tuple(map(as_place, expand(str(path))))
    for one in places:
        if isinstance(one, Path) and not one.exists():
            raise UsageError(f"input {one} does not exist")
        if not is_archive(one) and ending_of(one) not in ENDINGS:
            kind = "a URL of a folder; name" if is_url(one) and not ending_of(one) else "of no known ending; give"
            raise UsageError(f"{one} is {kind} one of {', '.join((*ENDINGS, *ARCHIVE_ENDINGS))}{_mend(one)}")
    return _files(places)


def _files(places: tuple[Place, ...], remark: str = "") -> tuple[tuple[Place, ...], Rows, str]:
    def rows() -> Iterator[dict[str, Any] | str]:
        return chain.from_iterable(archive_rows(p) if is_archive(p) else read_rows(p) for p in places)

    return places, rows, remark


def _in_folder(folder: Path) -> tuple[tuple[Place, ...], Rows, str]:
    if (folder / META).is_dir():
        return open_energon(folder)
    if (folder / "QA_information").is_dir():
        return _omnimedvqa(folder)
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    pictures = {path.stem for path in files if path.suffix.lower() not in ENDINGS and not is_text(path.name)}
    tables = [p for p in files if p.suffix.lower() in ENDINGS and not (p.suffix == ".json" and p.stem in pictures)]
    parquet = [path for path in tables if path.suffix.lower() == ".parquet"]
    if not tables and (folder / "data").is_dir():
        parquet = tables = sorted((folder / "data").glob("*.parquet"))  # the layout of the Hugging Face hub
    archives = [path for path in files if is_archive(path)]
    if parquet and parquet == tables and len({_SPLIT.fullmatch(path.name)[1] for path in parquet}) == 1:
        return _files(tuple(parquet))
    if len(tables) == 1 and not archives:
        return _files(tuple(tables))
    if archives and not tables:
        return _files(tuple(archives))
    if tables or archives:
        names = ", ".join(str(path.relative_to(folder)) for path in (*tables, *archives)[:5])
        raise UsageError(
            f"{folder} must hold exactly one table (json, jsonl, csv, tsv, parquet) or only tars, found {names}; name "
            "the file itself"
        )
    pairs, others = pairs_in(folder)
    if not pairs:
        raise UsageError(
            f"{folder} must hold exactly one table, tars, or pictures with texts, found none of these; of other images "
            "(DICOM, NIfTI, slides) name a table of their texts, and this folder with --image-root"
        )
    remark = f"pairs of files; {others} other files are not read" if others else "pairs of files"
    return (folder,), lambda: pair_rows(folder, pairs), remark


def _omnimedvqa(folder: Path) -> tuple[tuple[Place, ...], Rows, str]:
    """OmniMedVQA as it is unpacked: the tables whose images are here."""
    tables = sorted((folder / "QA_information").glob("*/*.json"))
    here = []
    for table in tables:
        first = next((row for row in read_rows(table) if isinstance(row, dict)), {})
        if any(holds_image(folder, name) for name in images_at(first, {"image": "image_path"})):
            here.append(table)
    if not here:
        raise UsageError(f"{folder} holds {len(tables)} tables of questions and none of their images; unpack Images/")
    absent = [table.stem for table in tables if table not in here]
    remark = f"left out, their images are not here: {', '.join(absent)}" if absent else ""
    return _files(tuple(here), remark)
