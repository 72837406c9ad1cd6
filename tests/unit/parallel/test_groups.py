from __future__ import annotations

import os
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from native_threads import names_of_threads, started_since

from megatron_medgpt.config.errors import UsageError, WorkError
from megatron_medgpt.config.presets import TINY, TINY_CLIP
from megatron_medgpt.config.schema import ModelConfig, ParallelConfig
from megatron_medgpt.parallel import groups
from megatron_medgpt.parallel.launch import LISTENER, meeting_of
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="gloo's device is shared where all groups are gloo's")
def test_all_groups_of_a_layout_wait_in_one_thread(no_launcher):
    before = names_of_threads()
    groups.start(timeout_s=10)
    kept = groups.build_groups(make_layout(ParallelConfig(), MODEL, 1))
    started = started_since(before)
    assert kept.tp.size() == 1
    assert started.count("gloo_tcp_loop") <= 1, "none where groups before them have left it"
    assert "gloo_tcp_loop" in names_of_threads().values()


def test_a_layout_of_another_world_is_refused(no_launcher):
    groups.start(timeout_s=10)
    with pytest.raises(UsageError, match="for 4 processes, 1 are running"):
        groups.build_groups(make_layout(ParallelConfig(tensor=2), MODEL, 4))


def test_half_an_environment_is_refused(no_launcher, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="MASTER_ADDR, MASTER_PORT not set"):
        groups.start(timeout_s=10)


@pytest.fixture
def address(monkeypatch):
    """Where ranks of this process would meet."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    return f"127.0.0.1:{port}"


def test_a_rank_that_does_not_come_is_named_with_its_node(address, monkeypatch):
    """Three nodes of one rank are expected, two come."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "gpu1,gpu2,gpu7")
    with ThreadPoolExecutor() as pool:
        ranks = [pool.submit(groups.meet, rank, 3, 6) for rank in (0, 1)]
    said = f"not all of the 3 ranks came to {address} within 6 s: rank 2 (node gpu7)"
    assert str(ranks[0].exception()) == said
    assert isinstance(ranks[1].exception(), WorkError)


def test_all_ranks_that_come_share_one_store(address):
    with ThreadPoolExecutor() as pool:
        stores = [done.result() for done in [pool.submit(groups.meet, rank, 3, 300) for rank in range(3)]]
    stores[2].set("word", "said")
    assert stores[0].get("word") == b"said"


def test_the_first_rank_takes_over_the_socket_that_was_opened_for_it(monkeypatch):
    """The port is in use all the time: nobody else can have it, and it cannot be opened anew."""
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor() as pool:
        variables, (descriptor,) = meeting_of(0, listener)
        for name, value in {**variables, LISTENER: str(os.dup(descriptor))}.items():
            monkeypatch.setenv(name, value)
        stores = [done.result() for done in [pool.submit(groups.meet, rank, 2, 300) for rank in range(2)]]
        stores[1].set("word", "said")
        assert stores[0].get("word") == b"said"


def test_a_port_in_use_is_named(address):
    with socket.create_server(("", int(address.split(":")[1]))), pytest.raises(WorkError, match="the port is in use"):
        groups.meet(0, 2, 60)


def test_a_first_rank_that_does_not_answer_is_named(address):
    with pytest.raises(WorkError, match=f"rank 0 did not answer at {address} within 1 s"):
        groups.meet(1, 2, 1)
