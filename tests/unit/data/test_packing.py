"""Order and packing: pure functions that lose nothing, split nothing, and stay what they are."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_medgpt.data.mix import Member, draw_epoch, order_keys, permutation
from megatron_medgpt.data.pack import best_fit_decreasing, plan_epoch, quantiles_of


def naive_best_fit_decreasing(lengths, capacity):
    """The textbook's version: one item at a time into the fullest row that takes it."""
    left = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, free in enumerate(left) if free >= length]
        if fitting:
            left[min(fitting, key=lambda i: left[i])] -= length
        else:
            left.append(capacity - length)
    return sorted(left)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 24), max_size=60), st.integers(24, 40))
def test_groups_of_rows_are_what_the_textbook_packs_one_by_one(lengths, capacity):
    groups = best_fit_decreasing(np.bincount(lengths, minlength=capacity + 1), capacity)
    left = [capacity - sum(n * k for n, k in pattern) for pattern, rows in groups for _ in range(rows)]
    assert sorted(left) == naive_best_fit_decreasing(lengths, capacity)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=80), st.integers(0, 5), st.integers(0, 5))
def test_a_plan_holds_every_sample_once_and_no_row_is_too_long(lengths, seed, epoch):
    lengths = np.asarray(lengths, np.int32)
    plan = plan_epoch(np.arange(lengths.size), lengths, 20, seed, epoch)
    assert sorted(plan.samples.tolist()) == list(range(lengths.size))
    assert all(0 < lengths[plan.row(r)].sum() <= 20 for r in range(plan.num_rows))


def test_another_epoch_or_seed_is_another_order_of_the_same_number_of_rows():
    lengths = np.random.default_rng(0).integers(5, 50, 500).astype(np.int32)
    plans = [plan_epoch(np.arange(500), lengths, 128, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert len({plan.num_rows for plan in plans}) == 1
    assert len({plan.samples.tobytes() for plan in plans}) == 3


def test_the_order_is_pinned_for_ever():
    # A resumed run must see the order it began with, under any numpy: these numbers must never change.
    assert permutation(8, "pass", 1234, 0, "abc", 0).tolist() == [1, 5, 4, 3, 6, 7, 0, 2]
    assert order_keys(2, "rows", 7).tolist() == [8861359564614558287, 8585648369046677285]


def members(*weights, sizes=(10, 4)):
    return [Member(fingerprint=f"f{i}", num_samples=n, weight=w) for i, (n, w) in enumerate(zip(sizes, weights))]


def test_weights_are_passes_per_epoch():
    drawn = draw_epoch(members(2.0, 1.0), 0, 0)
    assert np.bincount(drawn, minlength=14).tolist() == [2] * 10 + [1] * 4


@pytest.mark.parametrize("weight", [0.25, 0.3, 1.5, 0.05])
def test_fractions_of_a_pass_show_every_sample_equally_often_in_the_long_run(weight):
    epochs = 40
    drawn = np.concatenate([draw_epoch(members(weight, 1.0), 0, e) for e in range(epochs)])
    counts = np.bincount(drawn, minlength=14)[:10]
    assert counts.sum() == round(10 * weight * epochs)
    assert counts.max() - counts.min() <= 1


def test_every_pass_has_its_own_order():
    first, second = (draw_epoch(members(1.0, sizes=(50,)), 0, e).tolist() for e in (0, 1))
    assert first != second
    assert sorted(first) == sorted(second)


def test_quantiles_are_lengths_of_samples_and_99_percent_do_not_exceed_the_third():
    assert quantiles_of(np.array([30, 33, 33, 38])) == {"least": 30, "median": 33, "p99": 38, "most": 38}
    assert quantiles_of(np.arange(1, 201))["p99"] == 199
