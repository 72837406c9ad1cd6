"""An image from a person's disk as training saw images: decoded, windowed and stripped by the code of ingest."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.data.picture import PictureError, read_capped
from megatron_medgpt.ingest.decode import decode
from megatron_medgpt.types import MODALITIES

WARNING = "Research only, not for clinical use."
"""Stands on every screen that shows an answer."""
_MENDS = {
    "burned-in-text": "the file says that it shows text of the patient; --allow-burned-in shows it all the same",
    "burned-in-text-not-ruled-out": "such pictures often show the patient's name and this one does not rule it out; "
    "--allow-burned-in shows it all the same",
    "unsupported-transfer-syntax": "its compression cannot be read; save it uncompressed",
    "dicom-without-image": "it holds no picture",
    "truncated-or-corrupt": "it is damaged or cut off",
}  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class ChatPicture:
    """A picture to ask about. Of its file nothing is left but pixels and the kind of scan."""

    image: Image.Image
    modality: str
    """One of ``types.MODALITIES``."""

    def describe(self) -> str:
        kind = "" if self.modality == "unknown" else f"{self.modality.upper()}, "
        return f"{kind}{self.image.width} × {self.image.height} pixels, 8 bits"


def picture_of(content: bytes, *, name: str = "image", allow_burned_in: bool = False) -> ChatPicture:
    """Decode a DICOM, JPEG or PNG file.

    Raises:
        UsageError: it is refused; says why and what to do.
    """
    try:
        decoded, *_ = decode(content, allow_burned_in=allow_burned_in)
    except PictureError as error:
        raise UsageError(f"{name}: {_MENDS.get(error.reason, error.reason.replace('-', ' '))}") from None
    image = Image.open(io.BytesIO(decoded.picture.encoded))
    image.load()
    return ChatPicture(image, MODALITIES[decoded.modality])


def read_picture(path: Path, *, allow_burned_in: bool = False) -> ChatPicture:
    """The same of a file on disk; it is named in the error."""
    if not path.is_file():
        raise UsageError(f"{path}: {'a folder' if path.is_dir() else 'no such file'}; give a DICOM, JPEG or PNG file")
    try:
        content = read_capped(path)
    except PictureError as error:
        raise UsageError(f"{path}: {error.reason.replace('-', ' ')}") from None
    return picture_of(content, name=str(path), allow_burned_in=allow_burned_in)
