"""``medgpt eval`` and ``medgpt score``: from the command line to an evaluation file."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.config.schema import ParallelConfig
from megatron_medgpt.evaluate.scorers import GENERATIVE, LIKELIHOOD
from megatron_medgpt.parallel.launch import launched, run_ranks


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
    protocol: str = "chat-likelihood",
    limit: int | None = None,
    controls: bool = True,
    num_ranks: int = 1,
    sequence_length: int = 1024,
    reader: str = "auto",
) -> int:
    """Ask one model the questions of a task, with controls, and write the evaluation file and a gallery beside it.

    Args:
        reader: ``dali`` or ``pillow`` for the pictures of a checkpoint; DALI where it is installed when ``auto``.
        arguments: the command line, with which further ranks are started when ``num_ranks`` > 1.

    Returns:
        The exit code.

    Raises:
        UsageError: not exactly one model, or a protocol that it cannot serve.
    """
    given = [name for name, value in (("--checkpoint", checkpoint), ("--hf", hf), ("--endpoint", endpoint)) if value]
    if len(given) != 1:
        raise UsageError(f"eval needs exactly one of --checkpoint, --hf, --endpoint; got {', '.join(given) or 'none'}")
    if checkpoint is not None:
        if protocol in GENERATIVE and num_ranks > 1:
            raise UsageError(
                f"--protocol {protocol} writes answers, which a checkpoint does in one process: leave --nproc at 1, or "
                f"use {' or '.join(LIKELIHOOD)}"
            )
        if num_ranks > 1 and not launched():
            return run_ranks(arguments, num_ranks)
        _with_checkpoint(
            task, data, out, checkpoint=checkpoint, tokenizer=tokenizer, parallel=parallel, protocol=protocol,
            limit=limit, controls=controls, sequence_length=sequence_length, reader=reader,
        )  # fmt: skip
        return 0
    from megatron_medgpt.evaluate.engine import EndpointEngine, HuggingFaceEngine

    engine: Any
    if hf is not None and protocol in LIKELIHOOD:
        from megatron_medgpt.evaluate.hugging_face import HuggingFaceLikelihoodEngine

        engine = HuggingFaceLikelihoodEngine(hf)
    else:
        engine = HuggingFaceEngine(hf) if hf is not None else EndpointEngine(str(endpoint))
    _run(task, data, out, engine, protocol=protocol, limit=limit, controls=controls)
    return 0


def _with_checkpoint(
    task: str, data: Path, out: Path, *, checkpoint: Path, tokenizer: Path | None, parallel: ParallelConfig | None,
    protocol: str, limit: int | None, controls: bool, sequence_length: int, reader: str,
) -> None:  # fmt: skip
    import torch

    from megatron_medgpt.evaluate.from_checkpoint import open_greedy_engine, open_likelihood_engine
    from megatron_medgpt.observe.log import set_up_log
    from megatron_medgpt.parallel import groups

    set_up_log(int(os.environ.get("RANK", "0")))
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
    world = groups.start()
    try:
        engine: Any
        if protocol in GENERATIVE:
            engine = open_greedy_engine(
                checkpoint, world, tokenizer=tokenizer, sequence_length=sequence_length, reader=reader
            )
        else:
            engine = open_likelihood_engine(
                checkpoint,
                world,
                parallel=parallel,
                tokenizer=tokenizer,
                sequence_length=sequence_length,
                reader=reader,
            )
        _run(task, data, out, engine, protocol=protocol, limit=limit, controls=controls, writes=world.is_first)
    finally:
        groups.stop()


def _run(
    task: str, data: Path, out: Path, engine: Any, *, protocol: str, limit: int | None, controls: bool,
    writes: bool = True,
) -> None:  # fmt: skip
    from megatron_medgpt.evaluate.command import DEFAULT_CONTROLS, run_eval
    from megatron_medgpt.evaluate.gallery import write_gallery

    summary, items = run_eval(
        task, data, out, engine=engine, protocol=protocol, controls=DEFAULT_CONTROLS if controls else (), limit=limit,
        writes=writes, report=_progress if writes else None,
    )  # fmt: skip
    if writes:
        write_gallery(items, out.parent / "gallery.json")
        print(_sentence(summary))


def _progress(what: str, done: int, total: int) -> None:
    if done == total or done % max(1, total // 4) == 0:
        print(f"{what}: {done}/{total}", file=sys.stderr, flush=True)


def _sentence(summary: dict[str, Any]) -> str:
    low, high = summary["ci95"]
    controls = "".join(f", {name.replace('_', ' ')} {value:.3f}" for name, value in summary["controls"].items())
    return (
        f"{summary['task']} ({summary['protocol']}): {summary['correct']}/{summary['n']} = {summary['accuracy']:.3f} "
        f"(95 % {low:.3f} to {high:.3f}){controls}"
    )
