"""Passports between the rooms: what one room hands to the next, with shapes, dtypes and units.

Shape letters (they name the *logical* dimension and do not change when a tensor is sharded):

    B  rows of a micro-batch          S  positions of a row (text tokens and image tokens)
    H  hidden size                    V  vocabulary
    I  images of a micro-batch        C, Y, X  channels, rows and columns of an image
    P  patches of one image           N  image tokens of a whole micro-batch
    T  tokens routed by a MoE layer   E  experts          K  experts chosen per token
    G  2F, the interleaved gate/up    F  expert hidden size
    M  routed rows (T * K)            A  attention heads  Q  query groups  D  head size
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

IGNORE_INDEX = -100
"""Label of a position that is not a target of the loss."""

MODALITIES: tuple[str, ...] = (
    "unknown", "ct", "mr", "xray", "ultrasound", "dermoscopy", "fundus", "oct", "microscopy",
    "endoscopy", "pet", "mammography", "photograph", "figure",
)  # fmt: skip
"""Imaging modalities by the integer that shards and batches carry. Append only: shards hold the index."""

BODY_PARTS: tuple[str, ...] = (
    "unknown", "several", "whole-body", "head", "brain", "face", "eye", "ear", "mouth", "neck", "head-and-neck",
    "chest", "lung", "heart", "breast", "chest-and-abdomen", "abdomen", "liver", "gallbladder", "pancreas", "spleen",
    "kidney", "stomach", "bowel", "abdomen-and-pelvis", "chest-abdomen-pelvis", "pelvis", "bladder", "prostate",
    "uterus", "spine", "shoulder", "upper-arm", "elbow", "forearm", "wrist", "hand", "upper-limb", "hip", "thigh",
    "knee", "lower-leg", "ankle", "foot", "lower-limb", "skin", "vessel",
)  # fmt: skip
"""Parts of the body that shards may name. Append only, as all lists here."""

VIEWS: tuple[str, ...] = (
    "unknown", "several", "ap", "pa", "frontal", "lateral", "left-lateral", "right-lateral", "left-decubitus",
    "right-decubitus", "oblique", "left-anterior-oblique", "right-anterior-oblique", "left-posterior-oblique",
    "right-posterior-oblique", "axial", "coronal", "sagittal", "craniocaudal", "mediolateral-oblique", "mediolateral",
    "lateromedial", "lateromedial-oblique",
)  # fmt: skip
"""Directions from which a picture was taken."""

LATERALITIES: tuple[str, ...] = ("unknown", "several", "left", "right", "both", "unpaired")


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageSpan:
    """One run of image tokens in a micro-batch: where it lies and which image fills it.

    The run covers ``num_tokens`` consecutive positions ``start, start + 1, ...`` of row ``row``.
    ``image`` indexes ``MedBatch.pixels_ICYX``; several spans may name one image, which is then encoded once.
    Plain integers on the host: the model slices with them and never synchronises with the device.
    """

    row: int
    start: int
    image: int
    num_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MedBatch:
    """One micro-batch of one data-parallel rank, shifted for next-token loss.

    Column s of ``label_ids_BS`` is the target for column s of ``token_ids_BS`` (that is, the token at s + 1 of
    the same document), or ``IGNORE_INDEX`` on prompt, image, padding and last places.

    Text and labels are whole on every rank. Pixels are present only where they are used: ``pixels_ICYX`` is None
    on ranks that hold no vision encoder, and under sequence parallelism ``image_spans`` and ``pixels_ICYX`` list
    only the images that reach into the positions this tensor-parallel rank owns
    (``[r * S / tp, (r + 1) * S / tp)``). I may be 0.

    ``data/collate`` has checked on the host that the spans cover exactly the image marks of the row.
    """

    token_ids_BS: Tensor
    """int64. Image positions hold the image mark's id; padding holds the pad id."""
    label_ids_BS: Tensor
    """int64, ``IGNORE_INDEX`` where there is no target."""
    position_ids_BS: Tensor
    """int64, restarts at 0 with every document of a row."""
    document_ids_BS: Tensor
    """int32: 0, 1, 2, ... in the order of the row; padding continues with one more document of its own."""
    modality_ids_BS: Tensor
    """int8 index into ``MODALITIES``; -1 on padding. Only metrics read it."""
    branch_ids_BS: Tensor | None = None
    """int32 where documents fork, None where none does: 0 on a document's trunk, i > 0 on its branch i, which sees the
    trunk and itself alone; its positions continue the trunk's."""
    pixels_ICYX: Tensor | None = None
    """float32, resized and normalised with the encoder's mean and standard deviation."""
    image_spans: tuple[ImageSpan, ...] = ()
    num_targets: int = 0
    """Targets of this micro-batch, counted on the host."""
    num_tokens: int = 0
    """Positions that hold text or image (not padding), counted on the host."""
    num_images: int = 0
    """Images of the whole rows, whichever of them this rank decodes."""
    num_documents: int = 0
    sample_ids: tuple[str, ...] = ()
    """Opaque ids of the samples, in the order of the rows and documents."""

    def to(self, device: torch.device) -> MedBatch:
        """The same batch with its tensors on ``device``; the host's integers stay where they are."""
        tensors = {
            name: value.to(device, non_blocking=True)
            for name in ("token_ids_BS", "label_ids_BS", "position_ids_BS", "document_ids_BS", "modality_ids_BS",
                         "branch_ids_BS", "pixels_ICYX")
            if (value := getattr(self, name)) is not None
        }  # fmt: skip
        return replace(self, **tensors)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageSpec:
    """What an encoder wants of an image, and how many positions of the sequence it becomes.

    Pad to a square with the mean colour, resize to ``size_px`` with antialiased bicubic, scale to [0, 1], normalise.
    """

    size_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    num_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Sample:
    """One training sample as it lies in a shard. An image is one mark token here, whatever the encoder."""

    sample_id: str
    token_ids: Tensor | object
    """int32 (n,), numpy."""
    target_spans: tuple[tuple[int, int], ...]
    """Half-open ``[start, end)`` ranges of ``token_ids`` that are targets of the loss."""
    images: tuple[bytes, ...] = field(default_factory=tuple)
    """Encoded bytes (JPEG, PNG), one per mark in ``token_ids``, in order."""
    modality: int = 0
    body_part: int = 0
    """Index into ``BODY_PARTS``; ``view`` and ``laterality`` likewise."""
    view: int = 0
    laterality: int = 0
    meta: dict[str, str] = field(default_factory=dict)
