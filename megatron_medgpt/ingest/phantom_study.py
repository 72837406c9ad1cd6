"""A whole study of phantoms on disk, in the shapes that users' data has: DICOM, PNG and JPEG files with captions,
instruction dialogues (LLaVA's JSON) and held-out questions (an OmniMedVQA folder).

Answers cannot be had without the picture: every question has the same four options, each right equally often.
"""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    MRImageStorage,
    RLELossless,
    UltrasoundImageStorage,
)

from megatron_medgpt.ingest.interrupts import deaf_to_interrupts
from megatron_medgpt.ingest.phantoms import MODALITIES, PLACES, SHAPES, SIZE_PX, Phantom, draw_phantom, render, to_grey

NAMES = {"ct": "CT", "mr": "MRI", "xray": "X-ray", "ultrasound": "ultrasound"}
OMNIMEDVQA_NAMES = {
    "ct": "CT(Computed Tomography)", "mr": "MR (Mag-netic Resonance Imaging)", "xray": "X-Ray",
    "ultrasound": "ultrasound",
}  # fmt: skip
"""As OmniMedVQA spells ``modality_type``."""
NUMBERS = ("one", "two", "three", "four")
QUESTIONS = {
    "Modality Recognition": (
        "What imaging technique was employed to obtain this picture?", "Which modality is shown?",
        "What kind of scan is this?",
    ),
    "Anatomy Identification": (
        "Where is the lesion?", "In which part of the picture does the lesion lie?", "Which quadrant holds the lesion?",
    ),
    "Disease Diagnosis": (
        "What is the shape of the lesion?", "Which shape does the abnormality have?", "What form does the lesion take?",
    ),
    "Lesion Grading": (
        "How many lesions are there?", "What is the number of lesions?", "How many abnormalities can be counted?",
    ),
}  # fmt: skip
OPTIONS = {
    "Modality Recognition": tuple(NAMES.values()), "Anatomy Identification": PLACES, "Disease Diagnosis": SHAPES,
    "Lesion Grading": NUMBERS,
}  # fmt: skip
_CHUNK = 64
"""Pictures that a process is given at a time."""
_STORAGE = {
    "ct": ("CT", CTImageStorage), "mr": ("MR", MRImageStorage),
    "xray": ("DX", DigitalXRayImageStorageForPresentation), "ultrasound": ("US", UltrasoundImageStorage),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class PhantomStudy:
    """Where the parts of a study lie."""

    train_captions: Path
    train_dialogues: Path
    validation_captions: Path
    validation_dialogues: Path
    questions: Path
    """An OmniMedVQA-format folder, held out."""


def make_phantoms(
    out: str | Path,
    *,
    num_train: int = 4000,
    num_validation: int = 200,
    num_test: int = 400,
    seed: int = 0,
    workers: int = 2,
    size_px: int = SIZE_PX,
) -> PhantomStudy:
    """Write a study. The same numbers and seed give the same pictures and texts.

    Args:
        num_train, num_validation: pictures with a caption and a dialogue each.
        num_test: held-out questions, one picture each; balanced over types and answers when a multiple of 16.
    """
    out = Path(out)
    study = PhantomStudy(
        train_captions=out / "train" / "captions.jsonl", train_dialogues=out / "train" / "dialogues.json",
        validation_captions=out / "validation" / "captions.jsonl",
        validation_dialogues=out / "validation" / "dialogues.json", questions=out / "test",
    )  # fmt: skip
    tasks = [("train", seed, i) for i in range(num_train)] + [("validation", seed, i) for i in range(num_validation)]
    for split in ("train", "validation"):
        (out / split / "images").mkdir(parents=True, exist_ok=True)
    tests = [(seed, i) for i in range(num_test)]
    (study.questions / "QA_information" / "Open-access").mkdir(parents=True, exist_ok=True)
    for modality in MODALITIES:
        (study.questions / "Images" / f"Phantom {NAMES[modality]}").mkdir(parents=True, exist_ok=True)
    write_example = partial(_write_example, out, size_px)
    write_question = partial(_write_question, study.questions, size_px)
    if len(tasks) + len(tests) <= _CHUNK:  # processes take longer to start
        examples, questions = list(map(write_example, tasks)), list(map(write_question, tests))
    else:
        with deaf_to_interrupts():
            pool = multiprocessing.get_context("spawn").Pool(max(1, workers))
        with pool:
            examples = pool.map(write_example, tasks, chunksize=_CHUNK)
            questions = pool.map(write_question, tests, chunksize=_CHUNK)
    for split in ("train", "validation"):
        _write_tables(out / split, [example for (of, _, _), example in zip(tasks, examples) if of == split])
    for modality in MODALITIES:
        rows = [row for row in questions if row["dataset"] == f"Phantom {NAMES[modality]}"]
        path = study.questions / "QA_information" / "Open-access" / f"Phantom {NAMES[modality]}.json"
        path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return study


def _write_tables(folder: Path, examples: list[tuple[dict, dict]]) -> None:
    captions = [json.dumps(caption) + "\n" for caption, _ in examples]
    (folder / "captions.jsonl").write_text("".join(captions), encoding="utf-8")
    dialogues = [dialogue for _, dialogue in examples]
    (folder / "dialogues.json").write_text(json.dumps(dialogues, indent=1) + "\n", encoding="utf-8")


def _write_example(out: Path, size_px: int, task: tuple[str, int, int]) -> tuple[dict, dict]:
    """One training picture: its file, its caption record, its dialogue record."""
    split, seed, number = task
    rng = np.random.default_rng([seed, 0 if split == "train" else 1, number])
    num_lesions = 1 if rng.random() < 0.55 else int(rng.integers(2, 5))
    modality = MODALITIES[number % len(MODALITIES)]
    phantom = draw_phantom(rng, int(rng.integers(1 << 31)), modality=modality, num_lesions=num_lesions)
    kind = "dcm" if rng.random() < 0.6 else ("png" if rng.random() < 0.5 else "jpg")
    name = f"images/{number:06d}.{kind}"
    write_phantom(out / split / name, phantom, rng, size_px)
    facts = {"image": name, "modality": OMNIMEDVQA_NAMES[modality]}
    return {**facts, "caption": caption_of(phantom, rng)}, {
        "id": f"{split}-{number:06d}", **facts, "conversations": dialogue_of(phantom, rng),
    }  # fmt: skip


def _write_question(folder: Path, size_px: int, task: tuple[int, int]) -> dict:
    """One held-out picture, exported as PNG or JPEG, and its question. Types and answers go round in turn."""
    seed, number = task
    rng = np.random.default_rng([seed, 2, number])
    kind = list(QUESTIONS)[number % 4]
    which = number // 4 % 4
    modality = MODALITIES[which if kind == "Modality Recognition" else number // 16 % 4]
    num_lesions = {"Anatomy Identification": 1, "Lesion Grading": which + 1}.get(kind, int(rng.choice([1, 1, 2, 3])))
    phantom = draw_phantom(rng, int(rng.integers(1 << 31)), modality=modality, num_lesions=num_lesions)
    if kind == "Anatomy Identification":
        phantom = Phantom(modality=modality, shape=phantom.shape, places=(PLACES[which],), seed=phantom.seed)
    elif kind == "Disease Diagnosis":
        phantom = Phantom(modality=modality, shape=SHAPES[which], places=phantom.places, seed=phantom.seed)
    dataset = f"Phantom {NAMES[modality]}"
    name = f"Images/{dataset}/{number:05d}.{'png' if rng.random() < 0.5 else 'jpg'}"
    _write_grey(folder / name, to_grey(phantom, render(phantom, size_px)))
    options = [OPTIONS[kind][i] for i in rng.permutation(4)]
    return {
        "dataset": dataset, "question_id": f"{dataset.replace(' ', '_')}_{number:05d}", "question_type": kind,
        "question": QUESTIONS[kind][rng.integers(3)], "gt_answer": answer_of(phantom, kind), "image_path": name,
        **{f"option_{letter}": option for letter, option in zip("ABCD", options)},
        "modality_type": OMNIMEDVQA_NAMES[modality],
    }  # fmt: skip


def answer_of(phantom: Phantom, kind: str) -> str:
    """The right option of a question type."""
    if kind == "Modality Recognition":
        return NAMES[phantom.modality]
    if kind == "Anatomy Identification":
        return phantom.places[0]
    return phantom.shape if kind == "Disease Diagnosis" else NUMBERS[phantom.num_lesions - 1]


def caption_of(phantom: Phantom, rng: np.random.Generator) -> str:
    """A sentence that says everything there is to know."""
    modality, shape, places = NAMES[phantom.modality], phantom.shape, " and ".join(phantom.places)
    if phantom.num_lesions == 1:
        forms = (
            f"{modality} with one {shape} lesion in the {places}.",
            f"One {shape} lesion in the {places} on {modality}.",
        )
    else:
        number = NUMBERS[phantom.num_lesions - 1]
        forms = (
            f"{modality} with {number} {shape} lesions in the {places}.",
            f"{number.capitalize()} {shape} lesions in the {places} on {modality}.",
        )
    return forms[rng.integers(2)]


def dialogue_of(phantom: Phantom, rng: np.random.Generator) -> list[dict[str, str]]:
    """Questions and answers about a picture, in LLaVA's shape; the mark stands before or, at times, after the first."""
    kinds = ["Disease Diagnosis"]
    if phantom.num_lesions == 1:
        kinds.append("Anatomy Identification")
    if phantom.num_lesions > 1 or rng.random() < 0.35:
        kinds.append("Lesion Grading")
    if rng.random() < 0.35:
        kinds.append("Modality Recognition")
    turns = []
    for i in rng.permutation(len(kinds)):
        question = QUESTIONS[kinds[i]][rng.integers(3)]
        if not turns:
            question = f"<image>\n{question}" if rng.random() < 0.9 else f"{question}\n<image>"
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer_of(phantom, kinds[i])}]
    return turns


def write_phantom(path: Path, phantom: Phantom, rng: np.random.Generator, size_px: int = SIZE_PX) -> None:
    """Write a phantom as the file type of ``path``: .dcm, .png or .jpg."""
    picture = render(phantom, size_px)
    if path.suffix == ".dcm":
        _write_dicom(path, phantom, picture, rng)
    else:
        _write_grey(path, to_grey(phantom, picture))


def _write_grey(path: Path, grey: np.ndarray) -> None:
    options = {"compress_level": 1} if path.suffix == ".png" else {"quality": 95}
    Image.fromarray(grey).save(path, **options)


def _write_dicom(path: Path, phantom: Phantom, picture: np.ndarray, rng: np.random.Generator) -> None:
    modality, storage = _STORAGE[phantom.modality]
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = storage
    # UIDs under the root that pydicom was given for its users, fixed by the phantom.
    uid = pydicom.uid.generate_uid(entropy_srcs=[str(phantom), path.name])
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = uid
    ds.StudyInstanceUID = pydicom.uid.generate_uid(entropy_srcs=[str(phantom), "study"])
    ds.SeriesInstanceUID = pydicom.uid.generate_uid(entropy_srcs=[str(phantom), "series"])
    ds.PatientName, ds.PatientID = f"PHANTOM^{phantom.seed}", f"PH{phantom.seed:010d}"
    ds.PatientIdentityRemoved, ds.DeidentificationMethod = "YES", "synthetic"
    ds.Modality, ds.BurnedInAnnotation = modality, "NO"
    ds.Rows, ds.Columns = picture.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 12, 11
    if phantom.modality == "ct":
        slope = float(rng.choice([1.0, 0.5]))
        ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = slope, -1024, "HU"
        ds.BitsStored, ds.HighBit = 16, 15
        if rng.random() < 0.5:
            ds.WindowCenter, ds.WindowWidth = 50, 400
        stored = np.clip((picture + 1024) / slope, 0, 65535)
    elif phantom.modality == "mr":
        high = float(np.percentile(picture, 99.5))
        if rng.random() < 0.5:
            ds.WindowCenter, ds.WindowWidth = round(high / 2), round(high)
        stored = np.clip(picture, 0, 4095)
    elif phantom.modality == "xray":
        ds.PhotometricInterpretation = "MONOCHROME1"
        ds.WindowCenter, ds.WindowWidth = 2048, 4096
        stored = picture * 4095
    else:
        ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 3, "RGB", 0
        ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8, 8, 7
        stored = np.repeat(picture[:, :, None], 3, axis=2)
    ds.PixelData = np.round(stored).astype("u1" if ds.BitsAllocated == 8 else "<u2").tobytes()
    ds["PixelData"].VR = "OB" if ds.BitsAllocated == 8 else "OW"
    if rng.random() < 0.2:
        ds.compress(RLELossless, generate_instance_uid=False)
    ds.save_as(path, enforce_file_format=True)
