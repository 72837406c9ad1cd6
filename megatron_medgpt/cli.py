"""The command ``medgpt``. Each command calls one function of a room; nothing is computed here.

Rooms are imported inside the commands: ``medgpt --help`` answers at once.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from megatron_medgpt import __version__
from megatron_medgpt.config.errors import MedgptError, UsageError, WorkError

app = typer.Typer(
    name="medgpt",
    help="Train, evaluate and export biomedical GPT-oss vision-language models on megatron-core.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
Out = Annotated[Path, typer.Option("--out", help="Where the result is written.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def _version(value: bool) -> None:
    if value:
        typer.echo(f"medgpt {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    if debug:
        os.environ["MEDGPT_DEBUG"] = "1"


@app.command()
def doctor(json: Json = False) -> None:
    """What this machine has, what will be used, what is missing and how to get it.

    Example: `medgpt doctor`
    """
    from megatron_medgpt.observe.doctor import run_doctor

    raise typer.Exit(run_doctor(json=json))


@app.command()
def demo(
    out: Out = Path("demo"),
    nproc: Annotated[int, typer.Option(help="Ranks to train with: 2 or 4.")] = 2,
    quick: Annotated[bool, typer.Option("--quick", help="A minute of everything; learns next to nothing.")] = False,
) -> None:
    """The whole way on phantoms, on this machine: images, ingest, two stages, evaluation, report.

    Example: `medgpt demo --out demo`
    """
    from megatron_medgpt.demo import run_demo

    run_demo(out, num_ranks=nproc, quick=quick)


@app.command()
def phantoms(
    out: Out = Path("phantoms"),
    images: Annotated[int, typer.Option(help="Training images.")] = 2000,
    validation: Annotated[int, typer.Option(help="Validation images.")] = 200,
    questions: Annotated[int, typer.Option(help="Held-out questions.")] = 200,
    seed: Annotated[int, typer.Option(help="Same seed, same files.")] = 0,
) -> None:
    """Write synthetic DICOM, JPEG and PNG images with captions, dialogues and OmniMedVQA-format questions.

    Example: `medgpt phantoms --out phantoms --images 500`
    """
    from megatron_medgpt.ingest.phantom_study import make_phantoms

    make_phantoms(out, num_train=images, num_validation=validation, num_test=questions, seed=seed)


@app.command()
def ingest(
    inputs: Annotated[list[str], typer.Argument(help="Tables, tars, folders or URLs to read.")],
    out: Out,
    tokenizer: Annotated[Path, typer.Option(help="Folder with tokenizer.json, or a .tiktoken or .model file.")],
    format: Annotated[str, typer.Option(help="auto, llava, messages, caption, vqa, mcq or dicom.")] = "auto",
    image_root: Annotated[str | None, typer.Option(help="Folder or URL that image paths are relative to.")] = None,
    key_file: Annotated[Path | None, typer.Option(help="Key of the opaque ids, outside of any dataset.")] = None,
    map: Annotated[list[str] | None, typer.Option(help="k=column, e.g. image=Figure_path.")] = None,
    store: Annotated[str, typer.Option(help="encoded (validated image files) or pixels.")] = "encoded",
    workers: Annotated[int, typer.Option(help="Processes; 0 uses every core.")] = 0,
    max_reject_rate: Annotated[float, typer.Option(help="Fail above this share of rejected records, 0 to 1.")] = 0.05,
    allow_burned_in: Annotated[
        bool, typer.Option("--allow-burned-in", help="Accept images that may show text of a patient.")
    ] = False,
    suspicious_text: Annotated[
        str, typer.Option(help="Texts with dates, record numbers and the like: count, mask or refuse.")
    ] = "count",
    licence: Annotated[str, typer.Option(help="Of the records that state none themselves.")] = "",
    show_names: Annotated[
        bool, typer.Option("--show-names", help="Show file names of inputs and rejects on the terminal.")
    ] = False,
    part: Annotated[str | None, typer.Option(help="i/N: write part i (from 0) of N into the same --out.")] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Make the dataset of the parts, with the command that made them.")
    ] = False,
    frames: Annotated[str, typer.Option(help="Of multi-frame files: middle, all, every:K or even:N.")] = "middle",
    slices: Annotated[str, typer.Option(help="Of series and NIfTI volumes, in the same words.")] = "middle",
    tiles: Annotated[str, typer.Option(help="Of the tissue of whole slides, in the same words.")] = "even:4",
    tile_px: Annotated[int, typer.Option(help="Side of such a tile.")] = 448,
    um_per_px: Annotated[float, typer.Option(help="Resolution of such a tile; 0.5 is about 20x.")] = 0.5,
    ct_window: Annotated[
        str, typer.Option(help="CT without a window: soft-tissue, lung, bone, brain; three shows three at once.")
    ] = "soft-tissue",
    scaled_px: Annotated[
        int, typer.Option(help="Let JPEG and JPEG 2000 be decoded at 1/2, 1/4, 1/8 while this long a side remains.")
    ] = 0,
    exclude: Annotated[Path | None, typer.Option(help="Sample ids to leave out (a leakage audit writes them).")] = None,
) -> None:
    """Turn medical images and texts into a validated, de-identified, sharded dataset.

    Example: `medgpt ingest captions.jsonl --image-root images --tokenizer tokenizer --out data/align`
    """
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


@app.command()
def inspect(
    dataset: Annotated[Path, typer.Argument(help="A dataset folder.")],
    verify: Annotated[bool, typer.Option("--verify", help="Check every byte against its checksum.")] = False,
    sample: Annotated[int | None, typer.Option(help="Draw this many samples, with --png.")] = None,
    png: Annotated[Path | None, typer.Option(help="The picture file that --sample draws into.")] = None,
    json: Json = False,
) -> None:
    """Counts, lengths and rejects of a dataset; a sample with its text, marks and loss mask.

    Example: `medgpt inspect data/align --verify`
    """
    from megatron_medgpt.data.inspect import inspect as inspect_dataset

    typer.echo(inspect_dataset(dataset, check=verify, sample=sample, png=png, as_json=json))


@app.command(context_settings={"allow_extra_args": False})
def train(
    run: Annotated[str, typer.Argument(help="A recipe's name or a run.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.field=value ...")] = None,
    nproc: Annotated[int, typer.Option(help="Ranks to start on this machine.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print sizes, memory and data; one step a stage.")] = False,
) -> None:
    """Train a run: all of its stages, from the newest whole checkpoint if there is one.

    Example: `medgpt train tiny-demo out=runs/a stages.align.num_steps=50 --nproc 2`

    The same line works under torchrun and srun, which then set the number of ranks.
    """
    from megatron_medgpt.train.command import run_train

    raise typer.Exit(run_train(run, overrides or [], num_ranks=nproc, dry_run=dry_run))


@app.command("eval")
def evaluate(
    task: Annotated[str, typer.Argument(help="omnimedvqa, phantoms, vqa-rad, slake, path-vqa, pmc-vqa ...")],
    data: Annotated[Path, typer.Option(help="The task's folder.")],
    out: Out,
    checkpoint: Annotated[Path | None, typer.Option(help="A Megatron checkpoint or a run folder.")] = None,
    hf: Annotated[Path | None, typer.Option(help="A Hugging Face folder.")] = None,
    endpoint: Annotated[str | None, typer.Option(help="An OpenAI-compatible URL.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Of the checkpoint; its run folder's by default.")] = None,
    protocol: Annotated[
        list[str] | None,
        typer.Option(
            help="chat-likelihood, official-prefix, official-qa, letter or short-answer; several with commas."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only N questions, evenly spread.")] = None,
    controls: Annotated[bool, typer.Option(help="Also ask with a blank and with a shuffled image.")] = True,
    text_only: Annotated[bool, typer.Option("--text-only", help="Also ask without any image.")] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Limit of a written answer: 64 for a checkpoint, 1024 otherwise.")
    ] = None,
    reasoning_effort: Annotated[str | None, typer.Option(help="low, medium or high, of --hf or --endpoint.")] = None,
    model: Annotated[str | None, typer.Option(help="Of an endpoint that serves several.")] = None,
    concurrency: Annotated[int, typer.Option(help="Requests to an endpoint at a time.")] = 16,
    api_key: Annotated[
        str | None, typer.Option(envvar="MEDGPT_API_KEY", show_default=False, help="Of an endpoint that wants one.")
    ] = None,
    nproc: Annotated[int, typer.Option(help="Ranks to start on this machine.")] = 1,
    tensor: Annotated[int, typer.Option(help="Tensor-parallel degree for a checkpoint.")] = 1,
    pipeline: Annotated[int, typer.Option(help="Pipeline-parallel degree for a checkpoint.")] = 1,
    expert: Annotated[int, typer.Option(help="Expert-parallel degree for a checkpoint.")] = 1,
    sequence_length: Annotated[int, typer.Option(help="Positions of an evaluation row.")] = 1024,
    reader: Annotated[str, typer.Option(help="Pictures of a checkpoint: auto, dali or pillow.")] = "auto",
) -> None:
    """Ask a model the questions of a task and score its answers under a named protocol.

    Example: `medgpt eval omnimedvqa --data OmniMedVQA --checkpoint runs/a --out runs/a/eval/omnimedvqa.json`

    With several protocols the model is loaded once and NAME.json becomes NAME.PROTOCOL.json for each.
    """
    from megatron_medgpt.config.schema import ParallelConfig
    from megatron_medgpt.evaluate.run import evaluate_model

    code = evaluate_model(
        task,
        data=data,
        out=out,
        arguments=sys.argv[1:],
        checkpoint=checkpoint,
        hf=hf,
        endpoint=endpoint,
        tokenizer=tokenizer,
        parallel=ParallelConfig(tensor=tensor, pipeline=pipeline, expert=expert),
        protocols=protocol or [],
        limit=limit,
        controls=controls,
        text_only=text_only,
        num_ranks=nproc,
        sequence_length=sequence_length,
        reader=reader,
        max_new_tokens=max_new_tokens,
        reasoning_effort=reasoning_effort,
        model=model,
        concurrency=concurrency,
        api_key=api_key,
    )
    raise typer.Exit(code)


@app.command()
def score(
    task: Annotated[str, typer.Argument(help="As for `medgpt eval`.")],
    data: Annotated[Path, typer.Option(help="The task's folder.")],
    predictions: Annotated[Path, typer.Option(help='JSONL of {"question_id", "prediction"}.')],
    out: Out,
    protocol: Annotated[
        str | None, typer.Option(help="As for `medgpt eval`; the set's usual one where none is named.")
    ] = None,
    against: Annotated[Path | None, typer.Option(help="Evaluation file of another run, for a paired test.")] = None,
) -> None:
    """Score predictions that any model has made.

    Example: `medgpt score omnimedvqa --data OmniMedVQA --predictions answers.jsonl --out score.json`
    """
    from megatron_medgpt.evaluate.score import score as score_predictions

    result = score_predictions(task, data, predictions, protocol, out, against=against)
    typer.echo(f"{result['correct']}/{result['n']} = {result['accuracy']:.4f}; written to {out}")
    if against is not None:
        paired = result["paired"]
        typer.echo(
            f"against {paired['against']}: {paired['difference']:+.4f}; right here alone {paired['only_second']}, "
            f"there alone {paired['only_first']}, p = {paired['p_value']:.3g} (McNemar, exact)"
        )


@app.command()
def plan(
    model: Annotated[str, typer.Option(help="gpt-oss-20b, gpt-oss-120b, or a YAML with a model section.")],
    gpus: Annotated[int, typer.Option(help="How many GPUs.")],
    gpu: Annotated[str, typer.Option(help="Their kind: h100, h200, b200 ...")] = "h200",
    vision: Annotated[str, typer.Option(help="Encoder preset.")] = "clip-l-14-336",
    sequence_length: Annotated[int, typer.Option(help="Positions of a row.")] = 4096,
    global_batch_rows: Annotated[int, typer.Option(help="Rows of one optimizer step.")] = 256,
    images_per_row: Annotated[float, typer.Option(help="Images of a packed row.")] = 4.0,
    target_share: Annotated[float, typer.Option(help="Positions that are targets, 0 to 1; they pay the head.")] = 1.0,
    frozen: Annotated[list[str] | None, typer.Option(help="A module that does not learn; repeatable.")] = None,
    skew: Annotated[float, typer.Option(help="Rows of the busiest expert rank over the mean.")] = 1.0,
    mxfp4_frozen: Annotated[bool, typer.Option(help="Frozen experts stay packed in MXFP4.")] = False,
    efficiency: Annotated[float | None, typer.Option(help="Your measured one, 0 to 1; else the calibrated.")] = None,
    keep: Annotated[int, typer.Option(help="Layouts shown.")] = 5,
    out: Annotated[Path | None, typer.Option(help="Write the recommended run here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw memory and time per stage here (PNG).")] = None,
    json: Json = False,
) -> None:
    """Layouts that fit a number of GPUs: memory per stage, step time, and why the others do not.

    Example: `medgpt plan --model gpt-oss-20b --gpus 8 --gpu h200`
    """
    from megatron_medgpt.parallel.plan_command import run_plan

    typer.echo(
        run_plan(
            model,
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


convert = typer.Typer(
    no_args_is_help=True, help="Checkpoints in from Hugging Face, out to it, and the proof by logits."
)
app.add_typer(convert, name="convert")


@convert.command("hf-to-megatron")
def hf_to_megatron(
    language: Annotated[Path, typer.Option(help="Folder of GPT-oss, or of a whole export of ours.")],
    out: Out,
    vision: Annotated[Path | None, typer.Option(help="Folder of a CLIP or SigLIP model.")] = None,
    new_vision: Annotated[str | None, typer.Option(help="Preset of an encoder with random weights.")] = None,
    projector: Annotated[Path | None, typer.Option(help="Folder of a projector; random when not given.")] = None,
    dtype: Annotated[str, typer.Option(help="same, bf16 or fp32.")] = "same",
    keep_packed: Annotated[bool, typer.Option(help="Keep MXFP4 experts packed (frozen stages).")] = False,
    pixel_shuffle: Annotated[int, typer.Option(help="Of a new projector: 1 or 2.")] = 1,
    projector_norm: Annotated[bool, typer.Option(help="A new projector gets a norm in front.")] = False,
    image_size_px: Annotated[int | None, typer.Option(help="Resolution, where not the encoder's own.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")] = False,
) -> None:
    """Published weights to a Megatron checkpoint of any layout.

    Example: `medgpt convert hf-to-megatron --language gpt-oss-20b --vision clip-vit-large-patch14-336 --out start`
    """
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
        dry_run=dry_run,
    )
    raise typer.Exit(code)


@convert.command("megatron-to-hf")
def megatron_to_hf(
    checkpoint: Annotated[Path, typer.Option(help="A checkpoint or a run folder.")],
    out: Out,
    dtype: Annotated[str, typer.Option(help="bf16, fp32 or mxfp4.")] = "bf16",
    part: Annotated[str, typer.Option(help="whole, language or projector.")] = "whole",
    tokenizer: Annotated[Path | None, typer.Option(help="Folder with tokenizer.json.")] = None,
    original: Annotated[
        Path | None, typer.Option(help="Published MXFP4 folder, for experts kept as they were.")
    ] = None,
    evaluation: Annotated[list[Path] | None, typer.Option(help="File of medgpt eval for the model card.")] = None,
) -> None:
    """A checkpoint to a folder that transformers and vLLM load without custom code.

    Example: `medgpt convert megatron-to-hf --checkpoint runs/a --out exported --dtype bf16`
    """
    from megatron_medgpt.convert import command

    code = command.megatron_to_hf(
        checkpoint, out, dtype=dtype, part=part, tokenizer=tokenizer, original=original, evaluation=evaluation or ()
    )
    raise typer.Exit(code)


@convert.command("verify")
def verify_conversion(
    checkpoint: Annotated[Path, typer.Option(help="A checkpoint or a run folder.")],
    hf: Annotated[Path, typer.Option(help="The Hugging Face folder.")],
    layout: Annotated[list[str] | None, typer.Option(help="single, tp2, ep2 ...; repeatable.")] = None,
    logits: Annotated[bool, typer.Option(help="Compare logits too (both models in memory, in fp32).")] = True,
) -> None:
    """Compare every tensor, and logits over prompts longer than the window; exit 1 outside the bound.

    Example: `medgpt convert verify --checkpoint runs/a --hf exported`
    """
    from megatron_medgpt.convert import command

    raise typer.Exit(command.verify(checkpoint, hf, layouts=layout or ("single",), logits=logits))


@app.command()
def chat(
    hf: Annotated[Path, typer.Option(help="A Hugging Face folder (what convert megatron-to-hf wrote).")],
    image: Annotated[Path | None, typer.Argument(help="DICOM, JPEG or PNG; without it a page is served.")] = None,
    question: Annotated[str | None, typer.Argument(help="What to ask about it.")] = None,
    host: Annotated[str, typer.Option(help="127.0.0.1 or localhost; others are refused.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Of the page.")] = 7860,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 512,
    reasoning_effort: Annotated[str | None, typer.Option(help="low, medium or high, for models that think.")] = None,
    allow_burned_in: Annotated[
        bool, typer.Option("--allow-burned-in", help="Show images that may show text of a patient.")
    ] = False,
) -> None:
    """Ask an exported model about one image, here or on a local page. Research only, not for clinical use.

    Example: `medgpt chat --hf exported image.dcm "What does the image show?"`

    Without image and question: a page on this machine alone (`pip install 'megatron-medgpt[chat]'`).
    """
    import tempfile

    from megatron_medgpt.chat.command import run_chat

    with tempfile.TemporaryDirectory(prefix="medgpt-chat-") as folder:
        # Read by Gradio and huggingface_hub: uploads lie in a folder of this user alone that goes at the end; no calls.
        os.environ.update(GRADIO_TEMP_DIR=folder, GRADIO_ANALYTICS_ENABLED="False", HF_HUB_OFFLINE="1")
        run_chat(
            hf,
            image,
            question,
            host=host,
            port=port,
            device=device,
            max_new_tokens=max_new_tokens,
            reasoning_effort=reasoning_effort,
            allow_burned_in=allow_burned_in,
        )


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Write RUN/report.html: one static page with curves, tables and sample pictures.

    Example: `medgpt report runs/a`
    """
    from megatron_medgpt.observe.report import write_report

    typer.echo(f"report: {write_report(run)}")


def _pairs(texts: list[str]) -> dict[str, str]:
    pairs = dict(pair.partition("=")[::2] for text in texts for pair in re.split(r",(?=\w+=)", text))
    for key, value in pairs.items():
        if not key or not value:
            raise UsageError(f"--map {key}={value}: expected k=column, e.g. image=Figure_path")
    return pairs


def main() -> None:
    """Entry point: an expected error is one line on stderr and its exit code, never a traceback."""
    try:
        app()
    except OSError as error:  # a full disk, no permission, a file where a folder should be
        if os.environ.get("MEDGPT_DEBUG"):
            raise
        print(f"medgpt: failed: {_in_one_line(error)}", file=sys.stderr, flush=True)
        raise SystemExit(WorkError.exit_code) from None
    except MedgptError as error:
        if os.environ.get("MEDGPT_DEBUG"):
            raise
        rank = os.environ.get("RANK", "0")
        if isinstance(error, UsageError):
            if rank == "0":  # every rank has found the same
                print(f"medgpt: error: {error}", file=sys.stderr, flush=True)
        else:
            at = f"rank {rank}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
            print(f"medgpt: {at}failed: {error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        raise SystemExit(error.exit_code) from None


def _in_one_line(error: OSError) -> str:
    files = " and ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    said = " ".join((error.strerror or str(error) or type(error).__name__).split())
    return f"{files}: {said}" if files else said


if __name__ == "__main__":
    main()
