"""A Megatron checkpoint as an engine: built from its own facts in any layout, without the run's configuration."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_medgpt.checkpoint.find import holds_packed_experts, read_facts, resolve_checkpoint
from megatron_medgpt.checkpoint.load import load_checkpoint
from megatron_medgpt.checkpoint.manifest import CheckpointFacts, read_manifest
from megatron_medgpt.checkpoint.state import load_weights, model_state
from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.config.load import build
from megatron_medgpt.config.schema import ModelConfig, ParallelConfig
from megatron_medgpt.data.pixels import PixelSource
from megatron_medgpt.data.text import Tokenizer
from megatron_medgpt.evaluate.forward import LayoutForward
from megatron_medgpt.evaluate.generate import GreedyEngine
from megatron_medgpt.evaluate.likelihood import LikelihoodEngine
from megatron_medgpt.evaluate.predictions import Prediction
from megatron_medgpt.evaluate.scorers import GENERATIVE
from megatron_medgpt.evaluate.tasks.question import Question
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


class CheckpointEngine:
    """A checkpoint's model that answers under every protocol, by option likelihoods or in writing; loaded once.

    All ranks call ``answers`` together and get the same.
    """

    def __init__(self, forward: LayoutForward, likelihood: LikelihoodEngine, greedy: GreedyEngine, name: str) -> None:
        self.description, self.image = f"checkpoint {name}", likelihood.image
        self._forward, self._likelihood, self._greedy = forward, likelihood, greedy

    def settings(self, protocol: str) -> dict[str, Any]:
        return self._of(protocol).settings

    def answers(self, questions: Sequence[Question], protocol: str) -> Iterator[Prediction]:
        return self._of(protocol).answers(questions, protocol)

    def from_first_rank(self, value: Any) -> Any:
        """What rank 0 gives, on all ranks."""
        return self._forward.from_first_rank(value)

    def _of(self, protocol: str) -> LikelihoodEngine | GreedyEngine:
        return self._greedy if protocol in GENERATIVE else self._likelihood


def open_checkpoint(
    path: Path,
    world: World,
    *,
    parallel: ParallelConfig | None = None,
    tokenizer: Path | None = None,
    sequence_length: int = 1024,
    reader: str = "auto",
    num_rows: int = 2,
    questions_per_batch: int = 16,
    max_new_tokens: int = 64,
) -> CheckpointEngine:
    """Load a checkpoint of any layout into ``parallel`` (data parallelism alone when not given) and make it answer.
    Collective.

    Args:
        sequence_length: positions that a question with its options, or its answer, may have.
        num_rows: rows of that length in a batch of options.
        questions_per_batch: answers that are written side by side on a data-parallel rank.
    """
    checkpoint = resolve_checkpoint(path)
    facts = read_facts(checkpoint)
    model = model_of(facts)
    if not model.tokens_per_image < sequence_length <= model.language.max_length:
        raise UsageError(
            f"--sequence-length {sequence_length}: an image alone is {model.tokens_per_image} positions and the model "
            f"takes {model.language.max_length}; give what lies between"
        )
    words = find_tokenizer(checkpoint, tokenizer, facts)
    chunks, groups = load_model(checkpoint, model, world, parallel)
    forward, image = LayoutForward(chunks, groups, world.device), image_spec(model)
    source = PixelSource(image, reader=reader, device=world.device)  # type: ignore[arg-type]  # PixelSource names the readers it allows
    likelihood = LikelihoodEngine(
        forward, tokenizer=words, image=image, sequence_length=sequence_length, num_rows=num_rows, source=source
    )
    greedy = GreedyEngine(
        forward, tokenizer=words, image=image, sequence_length=sequence_length,
        questions_per_batch=questions_per_batch, max_new_tokens=max_new_tokens, source=source,
    )  # fmt: skip
    # Steps of two runs have the same name.
    return CheckpointEngine(forward, likelihood, greedy, f"{checkpoint.name}@{read_manifest(checkpoint).digest[:12]}")


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
