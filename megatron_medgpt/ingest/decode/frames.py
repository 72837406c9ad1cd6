"""Frames of a DICOM file: how many there are, and which attributes hold for one of them."""

from __future__ import annotations

from pydicom.dataset import Dataset

from megatron_medgpt.data.picture import PictureError

LARGEST_FRAMES = 10_000
_GROUPS = (
    "PixelValueTransformationSequence", "IdentityPixelValueTransformationSequence", "FrameVOILUTSequence",
    "PixelMeasuresSequence",
)  # fmt: skip
_FOR_ALL_FRAMES = (
    "Modality", "PhotometricInterpretation", "SamplesPerPixel", "BitsAllocated", "BitsStored", "PixelRepresentation",
    "PixelPaddingValue", "PixelPaddingRangeLimit", "PresentationLUTShape", "PresentationLUTSequence",
    "ModalityLUTSequence", "RescaleSlope", "RescaleIntercept", "VOILUTSequence", "WindowCenter", "WindowWidth",
    "VOILUTFunction", "PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "PixelAspectRatio",
    "SequenceOfUltrasoundRegions",
)  # fmt: skip


def count_frames(header: Dataset) -> int:
    """Number of frames.

    Raises:
        PictureError: ``too-many-frames``.
    """
    frames = int(header.get("NumberOfFrames") or 1)
    if not 1 <= frames <= LARGEST_FRAMES:
        raise PictureError("too-many-frames")
    return frames


def header_of_frame(ds: Dataset, index: int) -> Dataset:
    """The header with the rescale and window that an enhanced multi-frame file states for one frame.

    Shared functional groups hold for all frames, per-frame ones for one (PS3.3 C.7.6.16); other files come back as
    they are.
    """
    shared = ds.get("SharedFunctionalGroupsSequence") or []
    per_frame = ds.get("PerFrameFunctionalGroupsSequence") or []
    if not shared and not per_frame:
        return ds
    merged = Dataset()
    for keyword in _FOR_ALL_FRAMES:
        if keyword in ds:
            merged[keyword] = ds[keyword]
    for groups in (*shared[:1], *per_frame[index : index + 1]):
        for name in _GROUPS:
            for item in groups.get(name) or []:
                merged.update({element.tag: element for element in item})
    return merged
