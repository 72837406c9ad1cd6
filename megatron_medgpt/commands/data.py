"""``medgpt phantoms``, ``ingest`` and ``inspect``: raw images and texts to shards, and a look at them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from megatron_medgpt.commands.options import Json, Out
from megatron_medgpt.commands.stopping import keeping
from megatron_medgpt.config.errors import UsageError

IDENTITY, PICTURES, PARTS = "Identity of patients", "Pictures of volumes, slides and large files", "Several machines"
"""Headings of the options of ingest."""


def phantoms(
    out: Out = Path("phantoms"),
    images: Annotated[int, typer.Option(min=0, help="Number of training images.")] = 2000,
    validation: Annotated[int, typer.Option(min=0, help="Number of validation images.")] = 200,
    questions: Annotated[int, typer.Option(min=0, help="Number of held-out questions.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same files.")] = 0,
) -> None:
    """Write synthetic DICOM, JPEG and PNG images with captions, dialogues and OmniMedVQA-format questions.

    Example: `medgpt phantoms --out phantoms --images 500`
    """
    with keeping(f"{out} is not complete; the same command writes it anew"):
        from megatron_medgpt.ingest.phantom_study import make_phantoms

        above = next(place for place in (out, *out.absolute().parents) if place.exists())
        if not above.is_dir():
            raise UsageError(f"--out {out}: {above} is a file; name a folder")
        make_phantoms(out, num_train=images, num_validation=validation, num_test=questions, seed=seed)
    typer.echo(f"{out}: {images} training and {validation} validation images, {questions} held-out questions")


def ingest(
    inputs: Annotated[list[str], typer.Argument(help="Tables, tars, folders or URLs to read.")],
    out: Out,
    tokenizer: Annotated[Path, typer.Option(help="Folder with tokenizer.json, or a .tiktoken or .model file.")],
    format: Annotated[
        str, typer.Option(help="What the inputs are: auto, llava, messages, caption, vqa, mcq or dicom.")
    ] = "auto",
    image_root: Annotated[str | None, typer.Option(help="Folder or URL that image paths are relative to.")] = None,
    key_file: Annotated[
        Path | None,
        typer.Option(
            help="File with the key of the opaque ids, kept outside of any dataset.", rich_help_panel=IDENTITY
        ),
    ] = None,
    map: Annotated[
        list[str] | None,
        typer.Option(help="Column of a field, e.g. image=Figure_path; repeatable. id= where records have none."),
    ] = None,
    store: Annotated[str, typer.Option(help="Keep encoded image files, or pixels ready for one encoder.")] = "encoded",
    workers: Annotated[int, typer.Option(help="Number of processes; 0 uses every core.")] = 0,
    max_reject_rate: Annotated[float, typer.Option(help="Fail above this share of rejected records, 0 to 1.")] = 0.05,
    allow_burned_in: Annotated[
        bool,
        typer.Option(
            "--allow-burned-in", help="Accept images that may show text of a patient.", rich_help_panel=IDENTITY
        ),
    ] = False,
    suspicious_text: Annotated[
        str,
        typer.Option(
            help="Texts with dates, record numbers and the like: count, mask or refuse.", rich_help_panel=IDENTITY
        ),
    ] = "count",
    licence: Annotated[str, typer.Option(help="Licence of the records that state none themselves.")] = "",
    show_names: Annotated[
        bool,
        typer.Option(
            "--show-names", help="Show file names of inputs and rejects on the terminal.", rich_help_panel=IDENTITY
        ),
    ] = False,
    part: Annotated[
        str | None, typer.Option(help="Write part i (from 0) of N into the same --out, as i/N.", rich_help_panel=PARTS)
    ] = None,
    merge: Annotated[
        bool,
        typer.Option(
            "--merge", help="Make the dataset of the parts, with the command that made them.", rich_help_panel=PARTS
        ),
    ] = False,
    frames: Annotated[
        str, typer.Option(help="Frames of multi-frame files: middle, all, every:K or even:N.", rich_help_panel=PICTURES)
    ] = "middle",
    slices: Annotated[
        str, typer.Option(help="Slices of series and NIfTI volumes, in the same words.", rich_help_panel=PICTURES)
    ] = "middle",
    tiles: Annotated[
        str, typer.Option(help="Tiles of the tissue of whole slides, in the same words.", rich_help_panel=PICTURES)
    ] = "even:4",
    tile_px: Annotated[int, typer.Option(help="Side of a tile in pixels.", rich_help_panel=PICTURES)] = 448,
    um_per_px: Annotated[
        float, typer.Option(help="Micrometres a pixel of a tile; 0.5 is about 20x.", rich_help_panel=PICTURES)
    ] = 0.5,
    ct_window: Annotated[
        str,
        typer.Option(
            help="Window of CT that states none: soft-tissue, lung, bone or brain; three shows three at once.",
            rich_help_panel=PICTURES,
        ),
    ] = "soft-tissue",
    scaled_px: Annotated[
        int,
        typer.Option(
            help="Decode JPEG and JPEG 2000 at 1/2, 1/4 or 1/8 while a side of this many pixels remains; 0 never.",
            rich_help_panel=PICTURES,
        ),
    ] = 0,
    exclude: Annotated[
        Path | None, typer.Option(help="JSONL with sample ids to leave out; a leakage audit writes it.")
    ] = None,
) -> None:
    """Turn medical images and texts into a validated, de-identified, sharded dataset.

    Example: `medgpt ingest captions.jsonl --image-root images --tokenizer tokenizer --out data/align`
    """
    with keeping(lambda: _begun(out)):
        from megatron_medgpt.ingest.command import run_ingest
        from megatron_medgpt.ingest.decode import DecodeOptions

        run_ingest(
            inputs,
            out=out,
            format=format,
            image_root=image_root,
            tokenizer=tokenizer,
            mapping=_pairs(map or []) or None,
            store=store,
            workers=workers or None,
            max_reject_rate=max_reject_rate,
            allow_burned_in=allow_burned_in,
            decode=DecodeOptions(
                frames=frames,
                slices=slices,
                tiles=tiles,
                tile_px=tile_px,
                um_per_px=um_per_px,
                ct_window=ct_window,
                scaled_px=scaled_px,
            ),
            key_file=key_file,
            suspicious_text=suspicious_text,
            licence=licence,
            show_names=show_names,
            part=part,
            merge=merge,
            exclude=exclude,
        )


def _begun(out: Path) -> str:
    whole = len(list(out.glob(".shard-*.json")))  # the note of a finished one
    return f"{whole} finished shards in {out} are kept, and the same command continues" if whole else "nothing is kept"


def _pairs(texts: list[str]) -> dict[str, str]:
    pairs = dict(pair.partition("=")[::2] for text in texts for pair in re.split(r",(?=\w+=)", text))
    for key, value in pairs.items():
        if not key or (not value and key != "id"):
            raise UsageError(f"--map {key}={value}: expected k=column, e.g. image=Figure_path")
    return pairs


def inspect(
    dataset: Annotated[Path, typer.Argument(help="A dataset folder.")],
    verify: Annotated[bool, typer.Option("--verify", help="Check every byte against its checksum.")] = False,
    sample: Annotated[int | None, typer.Option(help="Draw this many samples into --png.")] = None,
    png: Annotated[Path | None, typer.Option(help="The picture file that --sample draws into.")] = None,
    json: Json = False,
) -> None:
    """Counts, lengths and rejects of a dataset; a sample with its text, marks and loss mask.

    Example: `medgpt inspect data/align --verify`
    """
    from megatron_medgpt.data.inspect import inspect as inspect_dataset

    typer.echo(inspect_dataset(dataset, check=verify, sample=sample, png=png, as_json=json))
