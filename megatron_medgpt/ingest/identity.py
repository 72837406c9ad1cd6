"""Identity stops here: what may leave a medical file, under which name, and which pictures are held back.

A safety net, not a legal de-identification: ingest copies no header at all; of a file only pixels and modality go on,
and a record is known afterwards by a keyed hash. A plain hash of an identifier can be reversed by trying all
identifiers (DICOM PS3.15 Annex E advises against it); the key makes that impossible, so it never lies beside the data.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.types import MODALITIES

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_KEY_BYTES = 32
_DICOM_MODALITIES = {
    "CT": "ct", "MR": "mr", "CR": "xray", "DX": "xray", "RF": "xray", "XA": "xray", "US": "ultrasound",
    "IVUS": "ultrasound", "OP": "fundus", "OPT": "oct", "SM": "microscopy", "GM": "microscopy", "ES": "endoscopy",
    "PT": "pet", "MG": "mammography", "XC": "photograph", "DMS": "dermoscopy",
}  # fmt: skip
_NAMED_MODALITIES = {
    "computed": "ct", "ct": "ct", "mri": "mr", "mr": "mr", "magnetic": "mr", "netic": "mr", "xray": "xray",
    "radiograph": "xray", "ultrasound": "ultrasound", "sonography": "ultrasound", "dermoscopy": "dermoscopy",
    "fundus": "fundus", "oct": "oct", "microscopy": "microscopy", "histology": "microscopy",
    "pathology": "microscopy", "endoscopy": "endoscopy", "pet": "pet", "mammography": "mammography",
    "gross": "photograph", "photograph": "photograph", "figure": "figure",
}  # fmt: skip
_BURNS_IN = ("US", "IVUS", "SC", "XC", "ES", "OT")
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_LICENCE = re.compile(r"[A-Za-z0-9 .+:/()-]{0,60}")
SUSPICIOUS_TEXT = ("count", "mask", "refuse")
"""What to do with a text that holds a date, a record number and the like."""
_MONTHS = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.?"
_SUSPICIOUS = {
    "e-mail": re.compile(r"[\w.+-]+@[\w-]+\.[\w.-]*\w"),
    "UID": re.compile(r"\b\d+(?:\.\d+){4,}\b"),
    "date": re.compile(
        rf"\b(?:\d{{1,2}}[./-]\d{{1,2}}[./-]\d{{2,4}}|\d{{4}}[./-]\d{{1,2}}[./-]\d{{1,2}}|(?:19|20)\d{{6}}"
        rf"|\d{{1,2}}(?:st|nd|rd|th)?\s+(?:of\s+)?{_MONTHS},?\s+\d{{4}}|{_MONTHS}\s+\d{{1,2}}(?:st|nd|rd|th)?,?\s+\d{{4}})\b",
        re.IGNORECASE,
    ),
    "record number": re.compile(
        r"\b(?:MRN|PID|accession|acc|patient\s+(?:id|no|number)|record\s+(?:no|number)|case\s+(?:no|number)|SSN)\b"
        r"[\s.:#-]*[A-Z-]*\d[\w-]*",
        re.IGNORECASE,
    ),
    "name": re.compile(
        r"\b(?:Mr|Mrs|Ms|Dr|Prof|Herr|Frau)\b\.?\s+[A-Z][\w'-]+(?:\s+[A-Z][\w'-]+)?|\b[A-Z][a-z]+\^[A-Z][a-z]+"
    ),
    "phone number": re.compile(r"(?<![\w.])(?:\+\d{1,3}[ /-]?)?(?:\(\d{2,5}\)|\d{2,5})[ /-]\d{3,4}[ /-]\d{3,6}\b"),
    "long number": re.compile(r"\b[A-Z]{0,3}-?\d{7,}\b"),
}
"""Kind -> pattern, in the order in which they are masked: a date is not to be masked as a long number."""


def load_key(path: str | Path | None) -> bytes:
    """The key of sample ids; made on first use (readable by its owner only).

    Without a path it lies in the user's configuration folder. The same key and records give the same ids.

    Raises:
        UsageError: the file is not a key, or cannot be made.
    """
    file = Path(path) if path else Path.home() / ".config" / "medgpt" / "identity.key"
    try:
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
                out.write(secrets.token_bytes(_KEY_BYTES))
        key = file.read_bytes()
    except OSError as error:
        raise UsageError(f"the identity key {file} cannot be used ({error.strerror}); set --key-file") from error
    if len(key) < 16:
        raise UsageError(
            f"the identity key {file} has {len(key)} bytes, at least 16 are needed; delete it or set another"
        )
    return key


def sample_id(key: bytes, source_id: str) -> str:
    """Opaque id of a record: 32 hexadecimal digits of HMAC-SHA256."""
    return hmac.new(key, source_id.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()[:32]


def held_back(header: Dataset) -> str:
    """Why a DICOM picture may show who the patient is, or an empty string.

    Burned-in text is refused where the header says so, and where it says nothing although such pictures usually have it
    (ultrasound, endoscopy, photographs, secondary captures).
    """
    stated = str(header.get("BurnedInAnnotation", "")).upper()
    if stated == "YES":
        return "burned-in-text"
    burns_in = header.get("Modality") in _BURNS_IN or str(header.get("SOPClassUID", "")).startswith(_SECONDARY_CAPTURE)
    return "burned-in-text-not-ruled-out" if burns_in and stated != "NO" else ""


def modality_of_header(header: Dataset) -> int:
    """Index into ``MODALITIES`` of a DICOM file."""
    return MODALITIES.index(_DICOM_MODALITIES.get(str(header.get("Modality", "")), "unknown"))


def modality_of_name(name: str) -> int:
    """Index into ``MODALITIES`` of what a table calls a modality, in any of the usual spellings."""
    words = re.findall(r"[a-z]+", name.lower().replace("x-ray", "xray").replace("_", " "))
    return MODALITIES.index(next((_NAMED_MODALITIES[word] for word in words if word in _NAMED_MODALITIES), "unknown"))


def plain_licence(stated: str) -> str:
    """The name of a licence, or ``other`` for a text that is too long or odd to be one: it goes into the manifest."""
    stated = " ".join(stated.split())
    return stated if _LICENCE.fullmatch(stated) and not masked(stated)[1] else "other"


def masked(text: str) -> tuple[str, tuple[str, ...]]:
    """The text with ``[date]``, ``[long number]`` and so on where identifiers seem to stand, and the kinds found.

    A hint, not a judgement: a name without a title, for one, is not found.
    """
    kinds = []
    for kind, pattern in _SUSPICIOUS.items():
        text, count = pattern.subn(f"[{kind}]", text)
        if count:
            kinds.append(kind)
    return text, tuple(kinds)
