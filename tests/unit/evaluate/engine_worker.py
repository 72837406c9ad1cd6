"""One rank of the layout test: answers the questions in several layouts with the weights of one checkpoint.

Usage: engine_worker.py FOLDER LAYOUT [LAYOUT ...], a layout being "tensor,pipeline,expert" and, where chunks are
interleaved, the chunks of a pipeline rank. The first call writes the checkpoint; every rank writes
FOLDER/LAYOUT-rankN.json for each layout, and then learns from a row: a model that has answered can be trained.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from megatron_medgpt.checkpoint.load import load_checkpoint
from megatron_medgpt.checkpoint.save import CheckpointFacts, save_checkpoint
from megatron_medgpt.checkpoint.state import load_weights, model_state
from megatron_medgpt.config.presets import TINY, TINY_CLIP
from megatron_medgpt.config.schema import ModelConfig, ParallelConfig
from megatron_medgpt.data.collate import RowShape, batch_of_documents
from megatron_medgpt.data.text import Tokenizer
from megatron_medgpt.evaluate.command import run_eval
from megatron_medgpt.evaluate.forward import LayoutForward
from megatron_medgpt.evaluate.from_checkpoint import CheckpointEngine
from megatron_medgpt.evaluate.generate import GreedyEngine
from megatron_medgpt.evaluate.likelihood import LikelihoodEngine
from megatron_medgpt.model.build import build_model
from megatron_medgpt.model.medgpt import MedGPT
from megatron_medgpt.parallel import groups as process_groups
from megatron_medgpt.parallel.plan import make_layout
from megatron_medgpt.types import ImageSpec

MODEL = ModelConfig(language=replace(TINY, vocab_size=512), vision=TINY_CLIP)
IMAGE = ImageSpec(
    size_px=TINY_CLIP.image_size_px, mean=TINY_CLIP.mean, std=TINY_CLIP.std, num_tokens=MODEL.tokens_per_image
)
NEW_TOKENS = 24
"""More than the sliding window (16) holds."""


def learn_from_one_row(model: MedGPT, forward: LayoutForward, tokenizer: Tokenizer) -> None:
    """Gradients of one row. Under torch.inference_mode answering would leave the engine with tensors that autograd
    refuses: the buffers of gathered sequences, the angles of positions."""
    shape = RowShape(
        sequence_length=64, image_mark_id=tokenizer.image_mark_id, pad_id=tokenizer.pad_id,
        tokens_per_image=IMAGE.num_tokens,
    )  # fmt: skip
    document = (np.arange(10, 60, dtype=np.int32), [(20, 50)], [])
    batch, _ = batch_of_documents([document], shape=shape, source=None, keep=forward.own_positions(64))
    model.train()
    model(batch).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients and all(bool(gradient.isfinite().all()) for gradient in gradients)


def main(folder: Path, layouts: list[str]) -> None:
    torch.set_num_threads(1)
    world = process_groups.start(timeout_s=300, kind="cpu")
    tokenizer = Tokenizer.load(folder / "tokenizer")
    for text in layouts:
        tensor, pipeline, expert, *virtual = (int(degree) for degree in text.split(","))
        parallel = ParallelConfig(
            tensor=tensor, pipeline=pipeline, expert=expert, virtual_pipeline=virtual[0] if virtual else 1
        )  # fmt: skip
        layout = make_layout(parallel, MODEL, world.size)
        groups = process_groups.build_groups(layout)
        chunks = build_model(MODEL, layout=layout, groups=groups, dtype=torch.float32)
        checkpoints = folder / "checkpoints"
        if not checkpoints.exists():
            save_checkpoint(
                checkpoints, 1, model_state(chunks, groups), CheckpointFacts(step=1), parallel_group=groups.dp_cp
            )
        loaded, _ = load_checkpoint(checkpoints / "step-00000001", model_state(chunks, groups), weights_only=True)
        load_weights(chunks, loaded)
        forward = LayoutForward(chunks, groups, torch.device("cpu"))
        likelihood = LikelihoodEngine(
            forward, tokenizer=tokenizer, image=IMAGE, sequence_length=192, num_rows=2, reader="pillow"
        )  # fmt: skip
        greedy = GreedyEngine(
            forward, tokenizer=tokenizer, image=IMAGE, sequence_length=600, questions_per_batch=3,
            max_new_tokens=NEW_TOKENS, reader="pillow",
        )  # fmt: skip
        engine = CheckpointEngine(forward, likelihood, greedy, "step-00000001")
        answers = {}
        for protocol in ("chat-likelihood", "letter"):
            _, items = run_eval(
                "phantoms", folder / "set", folder / text / f"{protocol}.json", engine=engine, protocol=protocol,
                controls=("blank_image",), writes=world.rank == 0,
            )  # fmt: skip
            answers[protocol] = {
                item.question.question_id: [item.error, item.option_losses or item.output] for item in items
            }
        (folder / f"{text}-rank{world.rank}.json").write_text(json.dumps(answers))
        if pipeline == 1:
            learn_from_one_row(chunks[0], forward, tokenizer)
        process_groups.destroy_groups()
    process_groups.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
