"""One rank that loads a checkpoint in a layout and saves it again from there, as training does."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from megatron_medgpt.checkpoint import state
from megatron_medgpt.checkpoint.load import load_checkpoint
from megatron_medgpt.checkpoint.manifest import CheckpointFacts
from megatron_medgpt.checkpoint.save import save_checkpoint
from megatron_medgpt.config.load import build
from megatron_medgpt.config.schema import ModelConfig, ParallelConfig
from megatron_medgpt.model.build import build_model
from megatron_medgpt.parallel.groups import build_groups, destroy_groups, start, stop
from megatron_medgpt.parallel.plan import make_layout


def main(task: Path) -> None:
    settings = json.loads(task.read_text())
    config = build(ModelConfig, settings["model"], "model")
    torch.set_num_threads(1)
    world = start(timeout_s=300, kind="cpu")
    layout = make_layout(build(ParallelConfig, settings["parallel"], "parallel"), config, world.size)
    groups = build_groups(layout)
    chunks = build_model(config, layout=layout, groups=groups, dtype=torch.float32, seed=99)
    loaded, _ = load_checkpoint(settings["load"], state.model_state(chunks, groups), weights_only=True)
    state.load_weights(chunks, loaded)
    facts = CheckpointFacts(step=5, stage_name="align", model=asdict(config), layout=asdict(layout))
    save_checkpoint(Path(settings["save"]), 5, state.model_state(chunks, groups), facts, parallel_group=groups.dp_cp)
    destroy_groups()
    stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
