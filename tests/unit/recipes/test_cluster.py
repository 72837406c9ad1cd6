"""The recipes of clusters: what the planner recommends, and models that can be built as planned."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist

from megatron_medgpt.config.load import load_run
from megatron_medgpt.config.schema import StageConfig
from megatron_medgpt.parallel.hardware import accelerator
from megatron_medgpt.parallel.memory import rank_parameters
from megatron_medgpt.parallel.plan import make_layout
from megatron_medgpt.parallel.plan_command import run_plan
from megatron_medgpt.parallel.planner import Request, make_plan
from megatron_medgpt.parallel.published import EFFICIENCY
from megatron_medgpt.recipes import RECIPES, cluster, recipe

KEYS = sorted(cluster.PLANNED)
NAMES = [cluster.name_of(*key) for key in KEYS]


def request_of(stage: StageConfig, size: str, num_gpus: int, gpu: str) -> Request:
    align = stage.name == "align"
    return Request(
        model=recipe(cluster.name_of(size, num_gpus, gpu)).model, num_gpus=num_gpus, gpu=accelerator(gpu),
        sequence_length=stage.sequence_length, global_batch_rows=stage.global_batch_rows, frozen=stage.frozen,
        images_per_row=cluster.ALIGN_IMAGES_PER_ROW if align else cluster.INSTRUCT_IMAGES_PER_ROW,
        target_share=cluster.ALIGN_TARGET_SHARE if align else cluster.INSTRUCT_TARGET_SHARE, skew=cluster.SKEW,
        efficiency=EFFICIENCY["hopper"],
    )  # fmt: skip


@pytest.mark.parametrize("key", KEYS, ids=NAMES)
def test_every_stage_has_the_layout_that_the_planner_recommends(key):
    run = recipe(cluster.name_of(*key))
    for stage in run.stages:
        best = make_plan(request_of(stage, *key), keep=1).best[0]
        assert best.layout == make_layout(run.layout_of(stage), run.model, key[1]), stage.name
        assert stage.micro_batch_rows == best.micro_batch_rows
        if stage.name == "instruct":
            assert run.recompute == best.recompute


def test_every_cluster_recipe_can_be_asked_for_by_name():
    assert set(NAMES) <= set(RECIPES)


def big_stages() -> list[tuple[str, int, StageConfig]]:
    return [(name, key[1], stage) for name, key in zip(NAMES, KEYS) for stage in recipe(name).stages]


@pytest.fixture
def fake_world(monkeypatch):
    """Process groups of any size in this one process: collectives do nothing, and no Gloo group is asked for."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_medgpt.parallel import groups

    monkeypatch.setattr(
        groups.parallel_state, "initialize_model_parallel",
        functools.partial(groups.parallel_state.initialize_model_parallel, create_gloo_process_groups=False),
    )  # fmt: skip

    def join(rank: int, size: int) -> None:
        leave()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)

    def leave() -> None:
        groups.destroy_groups()
        if dist.is_initialized():
            dist.destroy_process_group()

    leave()
    yield join
    leave()


@pytest.mark.parametrize(("name", "num_gpus", "stage"), big_stages(), ids=lambda value: getattr(value, "name", value))
def test_every_pipeline_rank_builds_with_exactly_the_parameters_that_were_planned(
    fake_world, monkeypatch, name, num_gpus, stage
):
    """Built in the layout's process groups without memory: fake tensors, and the encoder on the meta device."""
    builds_as_planned(recipe(name), stage, num_gpus, fake_world, monkeypatch)


def test_a_written_plan_loads_and_builds(fake_world, monkeypatch, tmp_path):
    """Four pipeline stages of unequal depth."""
    run_plan("gpt-oss-120b", gpus=32, gpu="h100", global_batch_rows=128, out=tmp_path / "run.yaml")
    run = load_run(tmp_path / "run.yaml")
    assert run.parallel.pipeline > 1
    builds_as_planned(run, run.stages[0], 32, fake_world, monkeypatch)


def builds_as_planned(run, stage, num_gpus, fake_world, monkeypatch) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from megatron_medgpt.model.build import build_model
    from megatron_medgpt.model.freeze import module_of
    from megatron_medgpt.model.replicated import ReplicatedModule
    from megatron_medgpt.parallel.groups import build_groups

    monkeypatch.setattr(
        ReplicatedModule, "finish", lambda self, **_: None
    )  # to_empty cannot leave the meta device here
    layout = make_layout(run.layout_of(stage), run.model, num_gpus)
    for pipeline_rank in range(layout.pipeline):
        fake_world(pipeline_rank * num_gpus // layout.pipeline, num_gpus)
        groups = build_groups(layout)
        assert groups.pp.rank() == pipeline_rank
        with FakeTensorMode():
            chunks = build_model(run.model, layout=layout, groups=groups, dtype=torch.bfloat16, frozen=stage.frozen)
        counts: dict[str, int] = {}
        for chunk in chunks:
            for parameter_name, parameter in chunk.named_parameters():
                module = module_of(parameter_name)
                counts[module] = counts.get(module, 0) + parameter.numel()
        planned = rank_parameters(run.model, layout, pipeline_rank=pipeline_rank)
        assert counts == {module: count for module, count in vars(planned).items() if count}


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_has_a_twin_that_four_ranks_carry(name):
    run = recipe(name)
    twin = cluster.tiny_twin(run)
    for stage, small in zip(run.stages, twin.stages):
        big, parallel = run.layout_of(stage), twin.layout_of(small)
        make_layout(parallel, twin.model, 4)
        if cluster.num_ranks_of(big) <= 4:
            assert (big.tensor, big.pipeline, big.expert) == (parallel.tensor, parallel.pipeline, parallel.expert)
        kinds = ("tensor", "pipeline", "virtual_pipeline", "expert")
        assert [getattr(big, k) > 1 for k in kinds] == [getattr(parallel, k) > 1 for k in kinds]
