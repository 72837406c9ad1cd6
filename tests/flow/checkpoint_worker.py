"""What every rank of the checkpoint flow tests runs: ``checkpoint_worker.py <folder> <cases as JSON>``.

A case is ``[name, function, arguments...]``. All cases of one call share the processes, because starting them takes
longer than most cases; each prints its name when it is done.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_medgpt.checkpoint import state as checkpoint_state
from megatron_medgpt.checkpoint.find import find_latest
from megatron_medgpt.checkpoint.load import load_checkpoint, load_rank_state
from megatron_medgpt.checkpoint.manifest import CheckpointFacts
from megatron_medgpt.checkpoint.save import save_checkpoint
from megatron_medgpt.checkpoint.tensors import sharded_tensors
from megatron_medgpt.config.presets import TINY, TINY_CLIP
from megatron_medgpt.config.schema import ModelConfig, ParallelConfig
from megatron_medgpt.model.build import build_model
from megatron_medgpt.parallel import groups as parallel_groups
from megatron_medgpt.parallel.plan import make_layout
from megatron_medgpt.types import IGNORE_INDEX, ImageSpan, MedBatch

# isort: split
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

MODEL = ModelConfig(language=TINY, vision=TINY_CLIP)
NUM_POSITIONS = 64
FORM = "tensor", "pipeline", "expert"


class Training:
    """A model in one layout with its optimizer, enough of a trainer to move every parameter."""

    def __init__(self, size: int, form: str, *, seed: int, dtype: torch.dtype = torch.float32, frozen=()) -> None:
        degrees = dict(zip(FORM, map(int, form.split(","))))
        self.layout = make_layout(ParallelConfig(**degrees), MODEL, size)
        self.groups = parallel_groups.build_groups(self.layout)
        chunks = build_model(MODEL, layout=self.layout, groups=self.groups, dtype=dtype, seed=seed, frozen=frozen)
        config = chunks[0].config
        config.finalize_model_grads_func = partial(finalize_model_grads, pg_collection=self.groups)
        ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
        self.models = [DistributedDataParallel(config, ddp_config, c, pg_collection=self.groups) for c in chunks]
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam", lr=1e-3, weight_decay=0.01, clip_grad=1.0, use_distributed_optimizer=True,
                bf16=dtype == torch.bfloat16, params_dtype=dtype,
            ),
            self.models,
        )  # fmt: skip

    def step(self, number: int) -> None:
        for model in self.models:
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=iter([batch(number, self.groups.dp.rank())]),
            model=self.models[0], num_microbatches=1, seq_length=NUM_POSITIONS, micro_batch_size=1, forward_only=False,
        )  # fmt: skip
        self.optimizer.step()

    def save(self, folder: Path, step: int) -> Path:
        facts = CheckpointFacts(
            step=step, optimizer_step=checkpoint_state.optimizer_step(self.optimizer), layout=asdict(self.layout)
        )
        state = checkpoint_state.full_state(self.models, self.optimizer, self.groups)
        return save_checkpoint(
            folder, step, state, facts, rank_state=checkpoint_state.rank_state(), parallel_group=self.groups.dp_cp
        )

    def load(self, path: Path) -> CheckpointFacts:
        state = checkpoint_state.full_state(self.models, self.optimizer, self.groups, loading=True)
        loaded, facts = load_checkpoint(path, state)
        checkpoint_state.load_weights(self.models, loaded)
        checkpoint_state.load_optimizer(self.optimizer, loaded, facts.optimizer_step)
        own = load_rank_state(path, asdict(self.layout))
        if own is not None:
            checkpoint_state.restore_rank_state(own)
        return facts

    def digests(self) -> dict[str, str]:
        """sha256 of this rank's part of every weight, main parameter and moment, and of the step."""
        state = checkpoint_state.full_state(self.models, self.optimizer, self.groups)
        found = {leaf.key + str(leaf.global_offset): _sha(leaf.data) for leaf in sharded_tensors(state)}
        return found | {"step": str(checkpoint_state.optimizer_step(self.optimizer))}

    def end(self) -> None:
        parallel_groups.destroy_groups()


def batch(number: int, data_rank: int) -> MedBatch:
    generator = torch.Generator().manual_seed(1000 * number + data_rank)
    tokens = torch.randint(0, MODEL.language.vocab_size, (1, NUM_POSITIONS), generator=generator)
    labels = tokens.roll(-1, 1)
    labels[:, :24] = IGNORE_INDEX
    labels[:, -1] = IGNORE_INDEX
    documents = torch.zeros(1, NUM_POSITIONS, dtype=torch.int32)
    return MedBatch(
        token_ids_BS=tokens, label_ids_BS=labels, position_ids_BS=torch.arange(NUM_POSITIONS).expand(1, -1),
        document_ids_BS=documents, modality_ids_BS=torch.ones(1, NUM_POSITIONS, dtype=torch.int8),
        pixels_ICYX=torch.randn(1, 3, 56, 56, generator=generator),
        image_spans=(ImageSpan(row=0, start=2, image=0, num_tokens=MODEL.tokens_per_image),),
        num_targets=int((labels != IGNORE_INDEX).sum()),
    )  # fmt: skip


def _forward_step(batches: Any, model: Any) -> Any:
    row = next(batches)

    def sum_and_count(loss_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return loss_BS.sum(), torch.tensor(row.num_targets, dtype=torch.int), loss_BS.sum().detach()

    return model(row), sum_and_count


def _sha(tensor: torch.Tensor) -> str:
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.sha256(raw.tobytes()).hexdigest()


def resume(folder: Path, size: int, form: str, dtype: str, frozen: str = "") -> None:
    """Four steps without a break, against two steps, a save, a fresh model, a load, and two steps."""
    options = {"dtype": getattr(torch, dtype), "frozen": tuple(filter(None, frozen.split("+")))}
    unbroken = Training(size, form, seed=1, **options)
    for number in range(4):
        unbroken.step(number)
        if number == 1:
            unbroken.save(folder, 2)
    expected = unbroken.digests()
    unbroken.end()
    resumed = Training(size, form, seed=2, **options)
    assert resumed.digests() != expected
    facts = resumed.load(find_latest(folder))
    assert (facts.step, facts.optimizer_step) == (2, 2), facts
    for number in (2, 3):
        resumed.step(number)
    got = resumed.digests()
    assert got.keys() == expected.keys()
    assert got == expected, [name for name in got if got[name] != expected[name]][:5]
    resumed.end()


def reshard(folder: Path, size: int, *forms: str) -> None:
    """Train in the first layout, then load into and save from each of the others in turn."""
    first = Training(size, forms[0], seed=1)
    for number in range(2):
        first.step(number)
    first.save(folder / "0", 2)
    first.end()
    for index, form in enumerate(forms[1:], start=1):
        other = Training(size, form, seed=index + 1)
        other.load(find_latest(folder / str(index - 1)))
        other.save(folder / str(index), 2)
        other.end()


def take_over(folder: Path, size: int, form: str, source: str, target: str) -> None:
    """Load any checkpoint into this layout and save it from there, as the next process of another world does."""
    other = Training(size, form, seed=7)
    other.load(find_latest(folder / source))
    other.save(folder / target, 2)
    other.end()


def weights(folder: Path, size: int, form: str) -> None:
    """A stage hands its weights over: the next has another layout, a fresh optimizer and other frozen modules."""
    first = Training(size, form, seed=1, frozen=("language", "experts", "router", "encoder"), dtype=torch.bfloat16)
    first.step(0)
    path = first.save(folder, 1)
    first.end()
    for number, next_form in enumerate(("1,1,1", "1,2,1", "2,1,2"), start=2):
        following = Training(size, next_form, seed=number, dtype=torch.bfloat16)
        sharded = checkpoint_state.model_state(following.models, following.groups)
        loaded, _ = load_checkpoint(path, sharded, weights_only=True)
        checkpoint_state.load_weights(following.models, loaded, following.optimizer)
        state = checkpoint_state.full_state(following.models, following.optimizer, following.groups)
        stored = "optimizer.state.param."
        mains = [leaf for leaf in sharded_tensors(state) if leaf.key.startswith(stored)]
        own = {(leaf.key, leaf.global_offset): leaf.data for leaf in sharded_tensors(sharded)}
        assert mains
        for main in mains:
            weight = own[main.key.removeprefix(stored), main.global_offset]
            assert torch.equal(main.data.bfloat16(), weight.reshape(main.data.shape)), main.key
        save_checkpoint(folder, number, checkpoint_state.model_state(following.models, following.groups),
                        CheckpointFacts(step=number))  # fmt: skip
        following.end()


CASES = {case.__name__: case for case in (resume, reshard, take_over, weights)}

if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    world = parallel_groups.start(timeout_s=300, kind="cpu")
    for name, function, *arguments in json.loads(sys.argv[2]):
        CASES[function](Path(sys.argv[1]) / name, world.size, *arguments)
        print("done", name, flush=True)
    parallel_groups.stop()
