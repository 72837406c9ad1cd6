"""``medgpt demo``, ``plan`` and ``train``: the whole way, the layout of a run, and the run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_medgpt.commands.options import Json, Out
from megatron_medgpt.commands.stopping import keeping


def demo(
    out: Out = Path("demo"),
    nproc: Annotated[int, typer.Option(help="Processes (ranks) to train with: 2 or 4.")] = 2,
    quick: Annotated[bool, typer.Option("--quick", help="A minute of everything; learns next to nothing.")] = False,
) -> None:
    """The whole way on phantoms, on this machine: images, ingest, two stages, evaluation, report.

    Example: `medgpt demo --out demo`
    """
    with keeping(f"{out} is not complete; the same command begins anew"):
        from megatron_medgpt.demo import run_demo

        run_demo(out, num_ranks=nproc, quick=quick)


def plan(
    model: Annotated[str, typer.Option(help="gpt-oss-20b, gpt-oss-120b, or a YAML with a model section.")],
    gpus: Annotated[int, typer.Option(help="Number of GPUs.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Kernels, as kernels.field=value (kernels.experts=fp8).")
    ] = None,
    gpu: Annotated[str, typer.Option(help="Kind of the GPUs: h100, h200, b200 ...")] = "h200",
    vision: Annotated[
        str | None, typer.Option(help="Encoder of a model preset: clip-l-14-336 (when not given) or medsiglip-448.")
    ] = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a packed row.")] = 4096,
    global_batch_rows: Annotated[int, typer.Option(help="Rows of one optimizer step, over all GPUs.")] = 256,
    images_per_row: Annotated[float, typer.Option(help="Images in a row, on average.")] = 4.0,
    target_share: Annotated[
        float, typer.Option(help="Share of tokens that are targets of the loss, 0 to 1; only they pay for the head.")
    ] = 1.0,
    frozen: Annotated[
        list[str] | None,
        typer.Option(help="Module that does not learn: encoder, projector, language, experts or router; repeatable."),
    ] = None,
    skew: Annotated[float, typer.Option(help="Load of the busiest expert rank over the mean, 1 or more.")] = 1.0,
    mxfp4_frozen: Annotated[bool, typer.Option("--mxfp4-frozen", help="Keep frozen experts packed in MXFP4.")] = False,
    efficiency: Annotated[
        float | None,
        typer.Option(
            help="Share of the GPU's rate that your kernels reach, 0 to 1; calibrated on published runs when not given."
        ),
    ] = None,
    keep: Annotated[int, typer.Option(help="Number of layouts shown.")] = 5,
    out: Annotated[Path | None, typer.Option(help="Write the recommended run to this YAML.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw memory and time of each pipeline stage into this PNG.")
    ] = None,
    json: Json = False,
) -> None:
    """Layouts that fit a number of GPUs: memory per stage, step time, and why the others do not.

    Example: `medgpt plan --model gpt-oss-20b --gpus 8 --gpu h200 kernels.experts=fp8 kernels.loss=chunked`
    """
    from megatron_medgpt.parallel.plan_command import run_plan

    typer.echo(
        run_plan(
            model,
            overrides or [],
            gpus=gpus,
            gpu=gpu,
            vision=vision,
            sequence_length=sequence_length,
            global_batch_rows=global_batch_rows,
            images_per_row=images_per_row,
            target_share=target_share,
            frozen=frozen or (),
            skew=skew,
            mxfp4_frozen=mxfp4_frozen,
            efficiency=efficiency,
            keep=keep,
            json=json,
            out=out,
            plot=plot,
        )
    )


def train(
    run: Annotated[str, typer.Argument(help="Name of a recipe, or a run.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Fields to set, as section.field=value; stages by name or number.")
    ] = None,
    nproc: Annotated[int, typer.Option(help="Processes (ranks) to start on this machine.")] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print sizes, memory and data, run one step of each stage, keep nothing.")
    ] = False,
) -> None:
    """Train a run: all of its stages, from the newest whole checkpoint if there is one.

    Example: `medgpt train tiny-demo out=runs/a stages.align.num_steps=50 --nproc 2`

    The same line works under torchrun and srun, which then set the number of ranks.
    """
    with keeping(
        "nothing was written" if dry_run else "what the last checkpoint holds is kept, and the same command continues"
    ):
        from megatron_medgpt.train.command import run_train

        code = run_train(run, overrides or [], num_ranks=nproc, dry_run=dry_run)
    raise typer.Exit(code)
