"""A tree of DICOM files: which belong to a SOP instance, a series or a study, and in which order slices lie.

Only headers are read. Slices are sorted by where they lie along the normal of their plane: instance numbers and file
names run the other way in some archives, and start anew in others.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset

from megatron_medgpt.data.picture import PictureError, resolve_inside
from megatron_medgpt.ingest.decode.options import picked
from megatron_medgpt.ingest.decode.reading import dcmread

_TAGS = [
    "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "SeriesNumber", "InstanceNumber", "Rows",
    "ImagePositionPatient", "ImageOrientationPatient",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class _File:
    name: str
    uid: str
    series: tuple[int, str]
    number: int
    place: tuple[tuple[float, ...], float] | None
    """Orientation (rounded direction cosines) and position along its normal in mm."""


@dataclass(frozen=True, slots=True)
class Tree:
    """Files by UID, and a remark for the terminal."""

    paths: dict[str, tuple[str, ...]]
    remark: str


def files_by_uid(root: Path, keyword: str, slices: str = "all") -> Tree:
    """Relative names of the images under a folder by a UID of their headers.

    Of the slices of a series (two or more files of one orientation at different places) ``slices`` chooses, in the
    words of ``decode.DecodeOptions``; everything else is taken whole, by series and instance number. Where the folder
    has a DICOMDIR, its files are those that this lists.
    """
    by_uid: dict[str, dict[tuple[int, str], list[_File]]] = defaultdict(lambda: defaultdict(list))
    count = missing = 0
    for name in _names(root):
        if name is None:
            missing += 1
            continue
        file = _read(root, name, keyword)
        if file is not None:
            by_uid[file.uid][file.series].append(file)
            count += 1
    paths = {
        uid: tuple(name for key in sorted(series) for name in _chosen(series[key], slices))
        for uid, series in by_uid.items()
    }
    listed = f", {missing} listed in DICOMDIR are missing" if missing else ""
    return Tree(paths, f"{count} images of {len(paths)} {keyword}{listed}; slices {slices}")


def _names(root: Path) -> Iterator[str | None]:
    """Names under the root; None for one that DICOMDIR lists and that is not there."""
    index = root / "DICOMDIR"
    if index.is_file():
        try:
            records = dcmread(index).get("DirectoryRecordSequence") or []
            listed = [record.get("ReferencedFileID") for record in records]
        except Exception:  # what a damaged header leads to: ValueError, struct.error, pydicom's own ...
            listed = []
        if any(listed):
            for parts in filter(None, listed):
                yield _inside(root, "/".join([parts] if isinstance(parts, str) else parts))
            return
    for folder, subfolders, names in os.walk(root, followlinks=False):
        subfolders.sort()
        for name in sorted(names):
            path = Path(folder) / name
            if path.is_file():
                yield str(path.relative_to(root))


def _inside(root: Path, name: str) -> str | None:
    for spelling in (name, name.lower()):  # mounted discs show their names in lower case
        try:
            resolve_inside(root, spelling)
            return spelling
        except PictureError:
            continue
    return None


def _read(root: Path, name: str, keyword: str) -> _File | None:
    try:
        header = dcmread(root / name, stop_before_pixels=True, specific_tags=_TAGS)
        if keyword not in header or "Rows" not in header:
            return None  # other files lie in such trees; a table's row whose file is missing is counted there
        series = (int(header.get("SeriesNumber") or 0), str(header.get("SeriesInstanceUID", "")))
        number = int(header.get("InstanceNumber") or 0)
        return _File(name, str(header[keyword].value), series, number, _place(header))
    except Exception:  # what a damaged header leads to: ValueError, struct.error, pydicom's own ...
        return None


def _place(header: Dataset) -> tuple[tuple[float, ...], float] | None:
    position, cosines = header.get("ImagePositionPatient"), header.get("ImageOrientationPatient")
    if not position or not cosines or len(position) != 3 or len(cosines) != 6:
        return None
    along = np.array(cosines, float)
    normal = np.cross(along[:3], along[3:])
    # Cosines of one series differ in their last digits.
    return tuple(float(c) for c in np.round(along, 2) + 0.0), float(np.dot(np.array(position, float), normal))


def _chosen(files: Sequence[_File], slices: str) -> list[str]:
    """Names of one series: of each stack of slices those that the policy takes, and everything that is no stack."""
    stacks: dict[object, list[_File]] = defaultdict(list)
    for file in files:
        stacks[file.place[0] if file.place else None].append(file)
    chosen = []
    for orientation, stack in sorted(stacks.items(), key=lambda entry: min(file.number for file in entry[1])):
        if orientation is not None and len({round(file.place[1], 3) for file in stack if file.place}) > 1:
            stack.sort(key=lambda file: (file.place[1] if file.place else 0.0, file.number, file.name))
            stack = [stack[place] for place in picked(len(stack), slices)]
        else:
            stack.sort(key=lambda file: (file.number, file.name))
        chosen += [file.name for file in stack]
    return chosen
