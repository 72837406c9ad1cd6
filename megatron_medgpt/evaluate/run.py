"""``medgpt eval``: from the command line to evaluation files, one for each protocol."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.config.schema import IMAGE_READERS, ParallelConfig
from megatron_medgpt.evaluate.engine import MAX_NEW_TOKENS, EndpointEngine
from megatron_medgpt.evaluate.score import refuse_folder
from megatron_medgpt.evaluate.scorers import GENERATIVE, PROTOCOLS, default_protocol
from megatron_medgpt.evaluate.tasks import check_task, load_task
from megatron_medgpt.evaluate.tasks.question import Task
from megatron_medgpt.parallel.launch import launched, run_ranks

CHECKPOINT_NEW_TOKENS = 64
"""Token limit of a checkpoint's answers: it writes its final words at once."""
ROW_LENGTH = 1024
"""Positions that a checkpoint is given for a question with its options, or its answer."""
CONCURRENCY = 16
"""Requests to an endpoint at a time."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is asked, and where the answers go."""

    task: str
    data: Path
    out: Path
    protocols: tuple[str, ...]
    """The set's usual one for the engine where none is named."""
    controls: tuple[str, ...]
    limit: int | None = None


def evaluate_model(
    task: str,
    *,
    data: Path,
    out: Path,
    arguments: Sequence[str],
    checkpoint: Path | None = None,
    hf: Path | None = None,
    endpoint: str | None = None,
    tokenizer: Path | None = None,
    parallel: ParallelConfig | None = None,
    protocols: Sequence[str] = (),
    limit: int | None = None,
    controls: bool = True,
    text_only: bool = False,
    num_ranks: int = 1,
    sequence_length: int | None = None,
    reader: str | None = None,
    max_new_tokens: int | None = None,
    reasoning_effort: str | None = None,
    model: str | None = None,
    concurrency: int | None = None,
    api_key: str | None = None,
) -> int:
    """Ask one model the questions of a task under one protocol or several, with controls, and write the evaluation
    files and a gallery beside them.

    Args:
        out: the evaluation file; with several protocols ``NAME.json`` becomes ``NAME.PROTOCOL.json`` for each.
        protocols: names, or several in one text with commas between; the set's usual one when none is given.
        controls: also with a blank and with a shuffled picture. ``text_only``: also without any.
        tokenizer, sequence_length, reader: of a checkpoint. Its run's copy, 1024 positions a row, and ``auto`` (DALI
            for the pictures where it is installed) when not given.
        reasoning_effort: of a Hugging Face folder or an endpoint; a checkpoint answers without thinking.
        model, concurrency, api_key: of an endpoint; 16 requests at a time when not given.
        arguments: the command line, with which further ranks are started when ``num_ranks`` > 1.

    Returns:
        The exit code.

    Raises:
        UsageError: not exactly one model, or a protocol or option that it cannot serve.
    """
    given = [name for name, value in (("--checkpoint", checkpoint), ("--hf", hf), ("--endpoint", endpoint)) if value]
    if len(given) != 1:
        raise UsageError(f"eval needs exactly one of --checkpoint, --hf, --endpoint; got {', '.join(given) or 'none'}")
    evaluation = Evaluation(
        task=task, data=data, out=out, protocols=_named(protocols, given[0]), limit=limit,
        controls=(*(("blank_image", "shuffled_image") if controls else ()), *(("text_only",) if text_only else ())),
    )  # fmt: skip
    _refuse_unused(
        given[0], num_ranks, parallel or ParallelConfig(),
        checkpoint={"--tokenizer": tokenizer, "--sequence-length": sequence_length, "--reader": reader},
        endpoint={"--model": model, "--concurrency": concurrency, "--api-key": api_key},
    )  # fmt: skip
    _refuse_early(evaluation, reader)
    _refuse_unwritten(given[0], evaluation.protocols, max_new_tokens, reasoning_effort)
    if checkpoint is not None:
        if num_ranks > 1 and not launched():
            return run_ranks(arguments, num_ranks)
        _with_checkpoint(
            evaluation, checkpoint, tokenizer=tokenizer, parallel=parallel,
            sequence_length=ROW_LENGTH if sequence_length is None else sequence_length, reader=reader or "auto",
            max_new_tokens=max_new_tokens or CHECKPOINT_NEW_TOKENS,
        )  # fmt: skip
        return 0
    from megatron_medgpt.observe.log import set_up_log

    set_up_log()
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens or MAX_NEW_TOKENS, "reasoning_effort": reasoning_effort
    }  # fmt: skip
    if hf is not None:
        from megatron_medgpt.evaluate.hugging_face import HuggingFaceFolderEngine

        _run(evaluation, HuggingFaceFolderEngine(hf, **settings))
    else:
        settings["concurrency"] = CONCURRENCY if concurrency is None else concurrency
        _run(evaluation, EndpointEngine(str(endpoint), model=model, api_key=api_key, **settings))
    return 0


def _named(protocols: Sequence[str], engine: str) -> tuple[str, ...]:
    """Protocol names in order, each once; refused before anything is loaded."""
    names = [name.strip() for text in protocols for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in PROTOCOLS]
    if unknown or (protocols and not names):
        raise UsageError(f"--protocol {', '.join(unknown) or 'is empty'}; allowed: {', '.join(PROTOCOLS)}")
    unserved = [name for name in names if engine == "--endpoint" and name not in GENERATIVE]
    if unserved:
        raise UsageError(
            f"--protocol {unserved[0]} needs token losses, which an endpoint does not give; "
            f"allowed: {', '.join(GENERATIVE)}"
        )
    return tuple(dict.fromkeys(names))


def _refuse_early(evaluation: Evaluation, reader: str | None) -> None:
    """What needs no model is refused before one is loaded."""
    refuse_folder(evaluation.out)
    if evaluation.limit is not None and evaluation.limit < 1:
        raise UsageError(f"--limit {evaluation.limit} must be at least 1")
    if reader is not None and reader not in IMAGE_READERS:
        raise UsageError(f"--reader {reader}; allowed: {', '.join(IMAGE_READERS)}")
    check_task(evaluation.task, evaluation.data)


def _refuse_unused(
    engine: str, num_ranks: int, parallel: ParallelConfig, *, checkpoint: Mapping[str, object],
    endpoint: Mapping[str, object],
) -> None:  # fmt: skip
    """Refuse options of another engine; the two mappings hold those of one engine alone, None where not given."""
    if num_ranks < 1:
        raise UsageError(f"--nproc {num_ranks} must be at least 1")
    if parallel != ParallelConfig() and engine != "--checkpoint":
        raise UsageError(f"--tensor, --pipeline and --expert are for --checkpoint; {engine} has no such layout")
    if num_ranks > 1 and engine != "--checkpoint":
        raise UsageError(f"--nproc {num_ranks} is for --checkpoint; {engine} is asked by one process")
    for owner, options in (("--checkpoint", checkpoint), ("--endpoint", endpoint)):
        given = [name for name, value in options.items() if value is not None]
        if given and engine != owner:
            raise UsageError(f"{given[0]} is for {owner} and does nothing with {engine}; leave it out")


def _refuse_unwritten(
    engine: str, protocols: Sequence[str], max_new_tokens: int | None, reasoning_effort: str | None
) -> None:
    """Refuse options of written answers where none are written."""
    if reasoning_effort is not None and engine == "--checkpoint":
        raise UsageError("--reasoning-effort is for --hf and --endpoint; a checkpoint answers without thinking")
    if not protocols or any(protocol in GENERATIVE for protocol in protocols):
        return
    for option, value in (("--max-new-tokens", max_new_tokens), ("--reasoning-effort", reasoning_effort)):
        if value is not None:
            raise UsageError(
                f"{option} is of written answers, and --protocol {', '.join(protocols)} has none; leave it out, or "
                f"name one of {', '.join(GENERATIVE)}"
            )


def _with_checkpoint(
    evaluation: Evaluation, checkpoint: Path, *, tokenizer: Path | None, parallel: ParallelConfig | None,
    sequence_length: int, reader: str, max_new_tokens: int,
) -> None:  # fmt: skip
    import torch

    from megatron_medgpt.evaluate.from_checkpoint import open_checkpoint
    from megatron_medgpt.observe.log import set_up_log
    from megatron_medgpt.parallel import groups

    set_up_log(int(os.environ.get("RANK", "0")))
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
    world = groups.start()
    try:
        engine = open_checkpoint(
            checkpoint, world, parallel=parallel, tokenizer=tokenizer, sequence_length=sequence_length, reader=reader,
            max_new_tokens=max_new_tokens,
        )  # fmt: skip
        _run(evaluation, engine, writes=world.is_first)
    finally:
        groups.stop()


def _run(evaluation: Evaluation, engine: Any, *, writes: bool = True) -> None:
    from megatron_medgpt.evaluate.command import run_eval
    from megatron_medgpt.evaluate.gallery import write_gallery

    task = load_task(evaluation.task, evaluation.data)
    protocols = evaluation.protocols or (_usual(task, engine),)
    for protocol in protocols:
        started = time.perf_counter()
        out = result_path(evaluation.out, protocol, of=protocols)
        summary, items = run_eval(
            task, evaluation.data, out, engine=engine, protocol=protocol, controls=evaluation.controls,
            limit=evaluation.limit, writes=writes, report=_progress if writes else None,
        )  # fmt: skip
        if writes:
            write_gallery(items, out.with_suffix(".gallery.json"))
            print(f"{_sentence(summary)}, {time.perf_counter() - started:.1f} s", flush=True)


def _usual(task: Task, engine: Any) -> str:
    """What is asked where no protocol is named: option likelihoods in training's form where the engine has them."""
    usual = default_protocol(task.questions)
    return "chat-likelihood" if usual == "letter" and not isinstance(engine, EndpointEngine) else usual


def result_path(out: Path, protocol: str, *, of: Sequence[str]) -> Path:
    """The evaluation file of one protocol: ``out`` itself where it is the only one."""
    return out if len(of) == 1 else out.with_name(f"{out.stem}.{protocol}.json")


def _progress(what: str, done: int, total: int) -> None:
    if done == total or done % max(1, total // 4) == 0:
        print(f"{what}: {done}/{total}", file=sys.stderr, flush=True)


def _sentence(summary: dict[str, Any]) -> str:
    low, high = summary["ci95"]
    controls = "".join(f", {name.replace('_', ' ')} {value:.3f}" for name, value in summary["controls"].items())
    failed = ""
    if summary["failed"]:
        failed = f", {summary['failed']} without an answer (most: {next(iter(summary['failed_reasons']))})"
    return (
        f"{summary['task']} ({summary['protocol']}): {summary['correct']}/{summary['n']} = {summary['accuracy']:.3f} "
        f"(95 % {low:.3f} to {high:.3f}){controls}{failed}"
    )
