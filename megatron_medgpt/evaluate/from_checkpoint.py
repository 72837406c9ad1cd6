"""A Megatron checkpoint as an engine: built from its own facts in any layout, without the run's configuration."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from megatron_medgpt.checkpoint.load import holds_packed_experts, load_checkpoint, read_facts, resolve_checkpoint
from megatron_medgpt.checkpoint.manifest import CheckpointFacts
from megatron_medgpt.checkpoint.state import load_weights, model_state
from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.config.load import build
from megatron_medgpt.config.schema import ModelConfig, ParallelConfig
from megatron_medgpt.data.text import Tokenizer
from megatron_medgpt.evaluate.forward import LayoutForward
from megatron_medgpt.evaluate.generate import GreedyEngine
from megatron_medgpt.evaluate.likelihood import LikelihoodEngine
from megatron_medgpt.model.build import build_model
from megatron_medgpt.parallel.groups import World, build_groups
from megatron_medgpt.parallel.plan import make_layout
from megatron_medgpt.types import ImageSpec

log = logging.getLogger(__name__)


def model_of(facts: CheckpointFacts) -> ModelConfig:
    """The configuration of the model that a checkpoint holds."""
    return build(ModelConfig, facts.model, "model")


def find_tokenizer(checkpoint: Path, given: Path | None, facts: CheckpointFacts) -> Tokenizer:
    """The tokenizer of a checkpoint: the one given, or the copy that training keeps in the run folder.

    Raises:
        UsageError: none is found, or it is not the one that the model was trained with.
    """
    folder = given or checkpoint.parent.parent / "tokenizer"
    if not (folder / "tokenizer.json").is_file():
        raise UsageError(f"no tokenizer.json in {folder}; name its folder with --tokenizer")
    tokenizer = Tokenizer.load(folder)
    trained_with = facts.extra.get("tokenizer")
    if trained_with is not None and tokenizer.fingerprint != trained_with:
        raise UsageError(
            f"{folder}: sha256 {tokenizer.fingerprint[:12]}, the checkpoint was trained with {trained_with[:12]}; "
            "give the tokenizer it was trained with"
        )
    return tokenizer


def image_spec(model: ModelConfig) -> ImageSpec:
    vision = model.vision
    return ImageSpec(size_px=vision.image_size_px, mean=vision.mean, std=vision.std, num_tokens=model.tokens_per_image)


def open_likelihood_engine(
    path: Path,
    world: World,
    *,
    parallel: ParallelConfig | None = None,
    tokenizer: Path | None = None,
    sequence_length: int = 1024,
    reader: str = "auto",
    num_rows: int = 2,
) -> LikelihoodEngine:
    """Load a checkpoint into ``parallel`` (data parallelism alone when not given) and make it answer. Collective."""
    checkpoint = resolve_checkpoint(path)
    facts = read_facts(checkpoint)
    model = model_of(facts)
    words = find_tokenizer(checkpoint, tokenizer, facts)
    chunks, groups = load_model(checkpoint, model, world, parallel)
    return LikelihoodEngine(
        LayoutForward(chunks, groups, world.device), tokenizer=words, image=image_spec(model),
        sequence_length=sequence_length, num_rows=num_rows, reader=reader,
        description=f"checkpoint {checkpoint.name}",
    )  # fmt: skip


def open_greedy_engine(
    path: Path,
    world: World,
    *,
    tokenizer: Path | None = None,
    sequence_length: int = 1024,
    max_new_tokens: int = 64,
    reader: str = "auto",
) -> GreedyEngine:
    """Load a checkpoint of any layout whole into this one process and make it write answers.

    Raises:
        UsageError: started on more than one rank.
    """
    if world.size > 1:
        raise UsageError(f"written answers of a checkpoint need one process, not {world.size}; leave --nproc at 1")
    checkpoint = resolve_checkpoint(path)
    facts = read_facts(checkpoint)
    model = model_of(facts)
    words = find_tokenizer(checkpoint, tokenizer, facts)
    chunks, _ = load_model(checkpoint, model, world)
    whole = chunks[0].eval()
    return GreedyEngine(
        lambda batch: whole(batch.to(world.device), want="logits"), tokenizer=words, image=image_spec(model),
        sequence_length=sequence_length, max_new_tokens=max_new_tokens, reader=reader,
        description=f"checkpoint {checkpoint.name}",
    )  # fmt: skip


def load_model(
    checkpoint: Path, model: ModelConfig, world: World, parallel: ParallelConfig | None = None
) -> tuple[list[torch.nn.Module], Any]:
    """This rank's chunks of a checkpoint's model, and the groups of the layout. Weights are float32 on a CPU and bf16
    on a GPU. Collective."""
    layout = make_layout(parallel or ParallelConfig(), model, world.size)
    groups = build_groups(layout)
    dtype = torch.bfloat16 if world.platform.is_cuda else torch.float32
    packed = holds_packed_experts(checkpoint)
    frozen = ("experts",) if packed else ()  # nothing learns here; packed experts insist
    chunks = build_model(model, layout=layout, groups=groups, dtype=dtype, frozen=frozen, packed_experts=packed)
    loaded, _ = load_checkpoint(checkpoint, model_state(chunks, groups), verify_content=False, weights_only=True)
    load_weights(chunks, loaded)
    log.info("loaded %s into %s", checkpoint.name, layout.describe())
    return chunks, groups
