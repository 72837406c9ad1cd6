"""``medgpt convert``: checkpoints in from Hugging Face, out to it, and the proof."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_medgpt.commands.options import Out
from megatron_medgpt.commands.stopping import keeping

convert = typer.Typer(
    no_args_is_help=True, help="Checkpoints in from Hugging Face, out to it, and the proof by logits."
)


@convert.command("hf-to-megatron")
def hf_to_megatron(
    language: Annotated[Path, typer.Option(help="Folder of GPT-oss, or of a whole model exported before.")],
    out: Out,
    vision: Annotated[Path | None, typer.Option(help="Folder of a CLIP or SigLIP model.")] = None,
    new_vision: Annotated[
        str | None,
        typer.Option(help="Preset of an encoder with random weights, e.g. clip-l-14-336, instead of --vision."),
    ] = None,
    projector: Annotated[Path | None, typer.Option(help="Folder of a projector; random when not given.")] = None,
    dtype: Annotated[str, typer.Option(help="Numbers of the checkpoint: same (as published), bf16 or fp32.")] = "same",
    keep_packed: Annotated[
        bool, typer.Option("--keep-packed", help="Keep MXFP4 experts packed, for stages that freeze them.")
    ] = False,
    pixel_shuffle: Annotated[
        int, typer.Option(help="Of a new projector: 1, or 2 to fold 2 x 2 patches into one token.")
    ] = 1,
    projector_norm: Annotated[
        bool, typer.Option("--projector-norm", help="A new projector gets a LayerNorm in front.")
    ] = False,
    image_size_px: Annotated[
        int | None, typer.Option(help="Side of the images in pixels; the encoder's own when not given.")
    ] = None,
    feature_layer: Annotated[
        int | None,
        typer.Option(
            help="Encoder layer that is the feature, from the end: -2 for CLIP, -1 for SigLIP when not given."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of random weights: a new projector, a new encoder.")] = 1234,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")] = False,
) -> None:
    """Published weights to a Megatron checkpoint of any layout.

    Example: `medgpt convert hf-to-megatron --language gpt-oss-20b --vision clip-vit-large-patch14-336 --out start`
    """
    with keeping(f"nothing was written to {out}"):
        from megatron_medgpt.convert import command

        code = command.hf_to_megatron(
            language,
            out,
            vision=vision,
            new_vision=new_vision,
            projector=projector,
            dtype=dtype,
            keep_packed=keep_packed,
            pixel_shuffle=pixel_shuffle,
            projector_norm=projector_norm,
            image_size_px=image_size_px,
            feature_layer=feature_layer,
            seed=seed,
            dry_run=dry_run,
        )
    raise typer.Exit(code)


@convert.command("megatron-to-hf")
def megatron_to_hf(
    checkpoint: Annotated[Path, typer.Option(help="A checkpoint or a run folder.")],
    out: Out,
    dtype: Annotated[str, typer.Option(help="Numbers of the export: bf16, fp32 or mxfp4 (experts packed).")] = "bf16",
    part: Annotated[str, typer.Option(help="What is exported: whole, language or projector.")] = "whole",
    scale_rule: Annotated[
        str, typer.Option(help="How MXFP4 chooses a scale: up (never saturates), floor, even, ceil.")
    ] = "up",
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder with tokenizer.json; the run folder's when not given.")
    ] = None,
    original: Annotated[
        Path | None, typer.Option(help="Published MXFP4 folder, for experts kept as they were.")
    ] = None,
    evaluation: Annotated[list[Path] | None, typer.Option(help="File of medgpt eval for the model card.")] = None,
) -> None:
    """A checkpoint to a folder that transformers and vLLM load without custom code.

    Example: `medgpt convert megatron-to-hf --checkpoint runs/a --out exported --dtype bf16`
    """
    with keeping(f"nothing was written to {out}"):
        from megatron_medgpt.convert import command

        code = command.megatron_to_hf(
            checkpoint,
            out,
            dtype=dtype,
            part=part,
            scale_rule=scale_rule,
            tokenizer=tokenizer,
            original=original,
            evaluation=evaluation or (),
        )
    raise typer.Exit(code)


@convert.command("verify")
def verify_conversion(
    checkpoint: Annotated[Path, typer.Option(help="A checkpoint or a run folder.")],
    hf: Annotated[Path, typer.Option(help="The Hugging Face folder.")],
    layout: Annotated[
        list[str] | None, typer.Option(help="Layout ours is run in: single, tp2, ep2, tp2-ep2 ...; repeatable.")
    ] = None,
    logits: Annotated[bool, typer.Option(help="Compare logits too (both models in memory, in fp32).")] = True,
    images: Annotated[
        bool | None, typer.Option(help="Prompt with images too; where the folder has a vision tower when not given.")
    ] = None,
    vision: Annotated[
        Path | None, typer.Option(help="Compare the encoder with this published CLIP or SigLIP folder, too.")
    ] = None,
) -> None:
    """Compare every tensor, and logits over prompts longer than the window; exit 1 outside the bound.

    Example: `medgpt convert verify --checkpoint runs/a --hf exported`
    """
    with keeping("not everything was compared"):
        from megatron_medgpt.convert import command

        code = command.verify(
            checkpoint, hf, layouts=layout or ("single",), logits=logits, images=images, vision=vision
        )
    raise typer.Exit(code)
