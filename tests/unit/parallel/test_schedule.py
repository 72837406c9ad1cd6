from __future__ import annotations

import numpy as np
import pytest

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.parallel.schedule import Pass, order_of, simulate


def even(current: Pass) -> float:
    return 1.0 if current.forward else 2.0


@pytest.mark.parametrize(("pipeline", "micro_batches"), [(2, 2), (4, 4), (4, 16), (8, 32)])
def test_even_stages_wait_for_exactly_the_textbook_bubble(pipeline, micro_batches):
    """1F1B takes (m + p - 1) (forward + backward): Narayanan et al. 2021, section 2.2.1."""
    line = simulate(even, pipeline=pipeline, num_micro_batches=micro_batches)
    assert line.end == pytest.approx(3.0 * (micro_batches + pipeline - 1))
    assert line.idle_share == pytest.approx((pipeline - 1) / (micro_batches + pipeline - 1))


@pytest.mark.parametrize(("pipeline", "virtual", "micro_batches"), [(4, 2, 8), (4, 3, 16), (2, 4, 4)])
def test_interleaving_divides_the_bubble_by_the_number_of_chunks(pipeline, virtual, micro_batches):
    """Section 2.2.2 of the same: the bubble shrinks from (p - 1) to (p - 1) / v passes of a whole stage."""
    line = simulate(
        lambda current: even(current) / virtual, pipeline=pipeline, virtual=virtual, num_micro_batches=micro_batches
    )
    assert line.end == pytest.approx(3.0 * (micro_batches + (pipeline - 1) / virtual))


def test_every_pass_is_run_once_on_the_rank_that_holds_its_chunk():
    passes = [p for rank in range(4) for p in order_of(rank, 4, 2, 8)]
    assert len(passes) == len(set(passes)) == 4 * 2 * 8 * 2
    assert all(p.chunk % 4 == rank for rank in range(4) for p in order_of(rank, 4, 2, 8))


def test_the_slowest_stage_sets_the_pace():
    def uneven(current: Pass) -> float:
        return even(current) * (1.5 if current.chunk == 3 else 1.0)

    line = simulate(uneven, pipeline=4, num_micro_batches=64)
    assert line.end == pytest.approx(64 * 4.5, rel=0.05)


def test_replicas_are_simulated_side_by_side():
    speeds = np.array([1.0, 1.0, 2.0])
    line = simulate(lambda current: even(current) * speeds, pipeline=2, num_micro_batches=4)
    assert line.end == pytest.approx(15.0 * speeds)


def test_interleaving_refuses_micro_batches_that_do_not_fill_the_pipeline():
    with pytest.raises(UsageError, match="change global_batch_rows"):
        order_of(0, 4, 2, 6)
