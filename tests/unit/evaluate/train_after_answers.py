"""Answers questions with a stage's model in both ways, as its first use in this process, then trains it a step.

Usage, as one of two ranks: train_after_answers.py FOLDER
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

from question_folders import omnimedvqa_folder

from megatron_medgpt.config.schema import ParallelConfig
from megatron_medgpt.evaluate.forward import LayoutForward
from megatron_medgpt.evaluate.generate import GreedyEngine
from megatron_medgpt.evaluate.likelihood import LikelihoodEngine
from megatron_medgpt.evaluate.tasks import load_task
from megatron_medgpt.parallel import groups
from megatron_medgpt.train.build import build_stage, image_spec
from megatron_medgpt.train.step import train_step
from tests.small_data import small_run


def main(folder: Path) -> None:
    folder = folder / f"of-rank-{os.environ['RANK']}"
    run = small_run(folder, parallel=ParallelConfig(tensor=2))
    stage = replace(run.stages[0], validation_data=(), validation_interval=0)
    world = groups.start(timeout_s=60, kind="cpu")
    parts = build_stage(replace(run, stages=(stage,)), 0, world)
    task = load_task("phantoms", omnimedvqa_folder(folder / "set", num_questions=2))
    forward = LayoutForward(parts.chunks, parts.groups, parts.device)
    common = {"tokenizer": parts.tokenizer, "image": image_spec(run), "reader": "pillow"}
    for engine, protocol in (
        (LikelihoodEngine(forward, sequence_length=128, num_rows=1, **common), "chat-likelihood"),
        (GreedyEngine(forward, sequence_length=600, max_new_tokens=3, **common), "letter"),
    ):
        answers = list(engine.answers(task.questions, protocol))
        assert [answer.error for answer in answers] == [None, None], answers
    with parts.batches_from(0) as batches:
        train_step(parts, batches, step=0, stop_here=False)
    groups.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
