"""``medgpt eval``, ``score``, ``report`` and ``chat``: what a model has learnt."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from megatron_medgpt.commands.options import Out
from megatron_medgpt.commands.stopping import keeping


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
    concurrency: Annotated[
        int | None, typer.Option(help="Requests to an endpoint at a time; 16 when not given.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(help="Of an endpoint that wants one; better in MEDGPT_API_KEY, where nobody sees it.")
    ] = None,
    nproc: Annotated[int, typer.Option(help="Ranks to start on this machine.")] = 1,
    tensor: Annotated[int, typer.Option(help="Tensor-parallel degree for a checkpoint.")] = 1,
    pipeline: Annotated[int, typer.Option(help="Pipeline-parallel degree for a checkpoint.")] = 1,
    expert: Annotated[int, typer.Option(help="Expert-parallel degree for a checkpoint.")] = 1,
    sequence_length: Annotated[
        int | None,
        typer.Option(
            help="Positions (tokens) that a checkpoint gives a question with its answer; 1024 when not given."
        ),
    ] = None,
    reader: Annotated[
        str | None, typer.Option(help="Pictures of a checkpoint: dali, pillow, or auto when not given.")
    ] = None,
) -> None:
    """Ask a model the questions of a task and score its answers under a named protocol.

    Example: `medgpt eval omnimedvqa --data OmniMedVQA --checkpoint runs/a --out runs/a/eval/omnimedvqa.json`

    With several protocols the model is loaded once and NAME.json becomes NAME.PROTOCOL.json for each.
    """
    with keeping(lambda: _answered(out)):
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
            # Its variable may be set for other runs: only the option is refused where there is no endpoint.
            api_key=api_key or (os.environ.get("MEDGPT_API_KEY") if endpoint else None),
        )
    raise typer.Exit(code)


def _answered(out: Path) -> str:
    if not any(file.stat().st_size for file in out.parent.glob(f"{out.stem}*.answers.jsonl")):
        return "nothing is answered yet"
    return f"the answers so far stand beside {out}, and the same command asks the rest"


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


def report(run: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Write RUN/report.html: one static page with curves, tables and sample pictures.

    Example: `medgpt report runs/a`
    """
    with keeping(f"{run / 'report.html'} was not written"):
        from megatron_medgpt.observe.report import write_report

        typer.echo(f"report: {write_report(run)}")


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
