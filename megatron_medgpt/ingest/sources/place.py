"""Where inputs lie: local files, or fsspec URLs (https://, s3://, memory:// ...). Images come from under one root."""

from __future__ import annotations

import io
import os
import re
import stat
import time
from pathlib import Path
from urllib.parse import quote, unquote

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.data.picture import LARGEST_FILE_BYTES, PictureError, read_capped, resolve_inside
from megatron_medgpt.ingest.sources.columns import IMAGE_ENDINGS
from megatron_medgpt.ingest.sources.record import Image, Inline

Place = Path | str
"""A local path, or a URL as text."""
_URL = re.compile(r"[a-z][a-z0-9+.-]*(?:::[a-z][a-z0-9+.-]*)*://", re.IGNORECASE)
_BRACES = re.compile(r"\{([0-9]{1,9})\.\.([0-9]{1,9})\}")
_MOST_PLACES = 100_000
_PAUSES_S = (0.2, 1.0)
"""Before a server that was busy is asked again."""


def is_url(place: Place) -> bool:
    return isinstance(place, str) and _URL.match(place) is not None


def as_place(given: str | Path) -> Place:
    """What a user named, as a path or a URL."""
    text = str(given)
    return text if is_url(text) else Path(given)


def name_of(place: Place) -> str:
    """The last part of a place, for messages."""
    return place.name if isinstance(place, Path) else place.rstrip("/").rsplit("/", 1)[-1].partition("?")[0]


def expand(given: str) -> list[str]:
    """``shard-{000..002}.tar`` as three names, as WebDataset and Energon write them.

    Raises:
        UsageError: a range that is empty or too long.
    """
    match = _BRACES.search(given)
    if match is None:
        return [given]
    first, last = int(match[1]), int(match[2])
    if not 0 <= last - first < _MOST_PLACES:
        raise UsageError(f"{given}: the range {match[0]} is empty or too long")
    numbers = (str(number).zfill(len(match[1])) for number in range(first, last + 1))
    found = [name for n in numbers for name in expand(given[: match.start()] + n + given[match.end() :])]
    if len(found) > _MOST_PLACES:
        raise UsageError(f"{given} names more than {_MOST_PLACES} files")
    return found


def open_place(place: Place) -> io.BufferedReader:
    """Open a file for reading.

    Raises:
        UsageError: it is missing, no regular file, or its storage cannot be reached.
    """
    try:
        if isinstance(place, Path):
            if not stat.S_ISREG(os.stat(place).st_mode):  # a pipe would be waited for
                raise UsageError(f"{place} is not a regular file")
            return open(place, "rb")
        import fsspec  # only where there is a URL

        return io.BufferedReader(fsspec.open(place, "rb").open())
    except UsageError:
        raise
    except Exception as error:  # every storage raises what it likes: OSError, ValueError, aiohttp's, botocore's
        missing = isinstance(error, FileNotFoundError)
        raise UsageError(f"{place} {'does not exist' if missing else f'cannot be read: {error!r}'}") from error


def size_of(place: Place) -> int:
    """Bytes of a file, or -1 where its server does not say."""
    if isinstance(place, Path):
        return place.stat().st_size
    with open_place(place) as file:
        size = getattr(file.raw, "size", None)
    return -1 if size is None else int(size)


def read_image(root: Place, image: Image) -> bytes:
    """Bytes of an image of a record, never of a file outside of the root.

    Raises:
        PictureError: see ``data.picture.resolve_inside`` and ``read_capped``.
    """
    if isinstance(image, Inline):
        if len(image.content) > LARGEST_FILE_BYTES:
            raise PictureError("file-too-large")
        return image.content
    read = _read_local if isinstance(root, Path) else _read_url
    try:
        return read(root, image)
    except PictureError as error:
        if error.reason != "missing-file" or "." in image.rsplit("/", 1)[-1]:
            raise
        # ROCOv2 and others name an image by its id alone.
        for ending in IMAGE_ENDINGS:
            try:
                return read(root, image + ending)
            except PictureError as other:
                if other.reason != "missing-file":
                    raise
        raise


def _read_local(root: Path, name: str) -> bytes:
    if is_url(name):
        raise PictureError("path-outside")
    return read_capped(resolve_inside(root, name))


def _read_url(root: str, name: str) -> bytes:
    content = _fetched(url_inside(root, name))
    if len(content) > LARGEST_FILE_BYTES:
        raise PictureError("file-too-large")
    if not content:
        raise PictureError("empty-file")
    return content


def _fetched(url: str, pauses_s: tuple[float, ...] = _PAUSES_S) -> bytes:
    import fsspec

    try:
        with fsspec.open(url, "rb").open() as file:
            return file.read(LARGEST_FILE_BYTES + 1)
    except FileNotFoundError as error:
        raise PictureError("missing-file") from error
    except Exception as error:  # see open_place
        if not pauses_s:
            raise PictureError("unreadable-file") from error
    time.sleep(pauses_s[0])
    return _fetched(url, pauses_s[1:])


def url_inside(root: str, name: str) -> str:
    """URL of an image under a root. A record may also hold the whole URL, if that lies under the root.

    Raises:
        PictureError: ``path-outside``, ``missing-file`` for no name.
    """
    base = root.rstrip("/") + "/"
    inner = name[len(base) :] if name.startswith(base) else name
    plain = unquote(inner)
    outside = (
        is_url(inner)
        or inner.startswith(("/", "~", "\\"))
        or any(character in plain for character in "\x00\\\r\n")
        or ".." in (*inner.split("/"), *plain.split("/"))
    )
    if outside:
        raise PictureError("path-outside")
    if not inner.strip("/"):
        raise PictureError("missing-file")
    try:
        return base + (quote(inner, safe="/%+,;=@!~*'()&$:") if base.startswith("http") else inner)
    except UnicodeEncodeError as error:
        raise PictureError("missing-file") from error


def holds_image(root: Place, image: Image) -> bool:
    """Whether an image can be read from under a root."""
    try:
        return bool(read_image(root, image))
    except PictureError:
        return False
