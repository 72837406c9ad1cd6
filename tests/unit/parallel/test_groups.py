from __future__ import annotations

import pytest

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.config.presets import TINY, TINY_CLIP
from megatron_medgpt.config.schema import ModelConfig, ParallelConfig
from megatron_medgpt.parallel import groups
from megatron_medgpt.parallel.plan import make_layout

MODEL = ModelConfig(language=TINY, vision=TINY_CLIP)


@pytest.fixture
def no_launcher(monkeypatch):
    for name in (*groups.LAUNCHER_VARIABLES, "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    yield
    groups.stop()


def test_one_process_needs_no_launcher_and_no_environment(no_launcher):
    world = groups.start(timeout_s=10)
    assert (world.rank, world.size, world.is_first) == (0, 1, True)


def test_groups_can_be_built_again_after_they_were_destroyed(no_launcher):
    groups.start(timeout_s=10)
    for _ in range(2):
        collection = groups.build_groups(make_layout(ParallelConfig(), MODEL, 1))
        assert collection.tp.size() == collection.ep.size() == collection.pp.size() == 1
        groups.destroy_groups()


def test_a_layout_of_another_world_is_refused(no_launcher):
    groups.start(timeout_s=10)
    with pytest.raises(UsageError, match="for 4 processes, 1 are running"):
        groups.build_groups(make_layout(ParallelConfig(tensor=2), MODEL, 4))


def test_half_an_environment_is_refused(no_launcher, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="MASTER_ADDR, MASTER_PORT not set"):
        groups.start(timeout_s=10)
