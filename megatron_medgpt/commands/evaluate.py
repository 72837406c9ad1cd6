"""``medgpt eval``, ``score``, ``report`` and ``chat``: what a model has learnt."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from megatron_medgpt.commands.options import Out
from megatron_medgpt.commands.stopping import keeping

MODEL, CHECKPOINT, ENDPOINT = "Model (one of the three)", "With --checkpoint", "With --endpoint"
"""Headings of the options that depend on what is asked."""


def evaluate(
    task: Annotated[str, typer.Argument(help="The set: omnimedvqa, phantoms, vqa-rad, slake, path-vqa, pmc-vqa ...")],
    data: Annotated[Path, typer.Option(help="The task's folder.")],
    out: Out,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Ask a Megatron checkpoint, or the newest of a run folder.", rich_help_panel=MODEL),
    ] = None,
    hf: Annotated[
        Path | None, typer.Option(help="Ask a Hugging Face folder, through transformers.", rich_help_panel=MODEL)
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(help="Ask the server at this OpenAI-compatible URL, e.g. vLLM.", rich_help_panel=MODEL)
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Folder with tokenizer.json; the run folder's when not given.", rich_help_panel=CHECKPOINT),
    ] = None,
    protocol: Annotated[
        list[str] | None,
        typer.Option(
            help="How it is asked and judged: chat-likelihood, official-prefix, official-qa, letter, short-answer or "
            "report; several with commas; the set's usual one when not given."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Ask only this many questions, evenly spread over the set.")] = None,
    controls: Annotated[bool, typer.Option(help="Also ask with a blank and with a shuffled image.")] = True,
    text_only: Annotated[bool, typer.Option("--text-only", help="Also ask without any image.")] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest written answer in tokens: 64 for a checkpoint, 1024 otherwise.")
    ] = None,
    reasoning_effort: Annotated[
        str | None, typer.Option(help="How long --hf or --endpoint thinks first: low, medium or high.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Name of the model, where the server has several.", rich_help_panel=ENDPOINT)
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(help="Requests at a time; 16 when not given.", rich_help_panel=ENDPOINT)
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            help="Key of the server; better in the variable MEDGPT_API_KEY, where nobody sees it.",
            rich_help_panel=ENDPOINT,
        ),
    ] = None,
    nproc: Annotated[
        int, typer.Option(help="Processes (ranks) to start on this machine.", rich_help_panel=CHECKPOINT)
    ] = 1,
    tensor: Annotated[int, typer.Option(help="Tensor-parallel degree.", rich_help_panel=CHECKPOINT)] = 1,
    pipeline: Annotated[int, typer.Option(help="Pipeline-parallel degree.", rich_help_panel=CHECKPOINT)] = 1,
    expert: Annotated[int, typer.Option(help="Expert-parallel degree.", rich_help_panel=CHECKPOINT)] = 1,
    sequence_length: Annotated[
        int | None,
        typer.Option(
            help="Tokens for a question with its picture and answer; 1024 when not given.", rich_help_panel=CHECKPOINT
        ),
    ] = None,
    reader: Annotated[
        str | None,
        typer.Option(help="What decodes pictures: dali, pillow, or auto when not given.", rich_help_panel=CHECKPOINT),
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
    task: Annotated[str, typer.Argument(help="The set, as for `medgpt eval`.")],
    data: Annotated[Path, typer.Option(help="The task's folder.")],
    predictions: Annotated[Path, typer.Option(help='JSONL file, a {"question_id": ..., "prediction": ...} a line.')],
    out: Out,
    protocol: Annotated[
        str | None, typer.Option(help="As for `medgpt eval`; the set's usual one where none is named.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="Evaluation file of another run, to test the difference question by question.")
    ] = None,
) -> None:
    """Score predictions that any model has made.

    Example: `medgpt score omnimedvqa --data OmniMedVQA --predictions answers.jsonl --out score.json`
    """
    from megatron_medgpt.evaluate.score import score as score_predictions

    result = score_predictions(task, data, predictions, protocol, out, against=against)
    typer.echo(
        f"{result['correct']}/{result['n']} = {result['accuracy']:.4f} ({result['protocol']}){_left_over(result)}; "
        f"written to {out}"
    )
    if against is not None:
        paired = result["paired"]
        typer.echo(
            f"against {paired['against']}: {paired['difference']:+.4f}; right here alone {paired['only_second']}, "
            f"there alone {paired['only_first']}, p = {paired['p_value']:.3g} (McNemar, exact)"
        )


def _left_over(result: dict) -> str:
    """What of a predictions file did not become a verdict, or did so in an unexpected way."""
    given, unknown = result["predictions"], ", ".join(result["predictions"]["unknown_examples"][:1])
    counts = {
        "without an answer, so wrong": result["failed"],
        f"answers to questions that the set lacks (e.g. {unknown})": given["unknown_ids"],
        "ids given again, of which the last line counts": given["repeated_ids"],
        "problems of the set, which the file names": sum(result["problems"].values()),
    }
    return "".join(f"; {what}: {count:,}" for what, count in counts.items() if count)


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
    port: Annotated[int, typer.Option(help="Port of the page.")] = 7860,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 512,
    reasoning_effort: Annotated[
        str | None, typer.Option(help="How long a model that can think does so: low, medium or high.")
    ] = None,
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
