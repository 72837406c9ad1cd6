"""Kernel choices that ranks share: FP8 between expert ranks, chunked loss over a split vocabulary."""

from __future__ import annotations

from pathlib import Path

from ranks import run_ranks


def test_fp8_between_expert_ranks_is_rounding_and_a_chunked_loss_is_the_loss(tmp_path):
    run_ranks(Path(__file__).with_name("kernel_worker.py"), [], num_ranks=2, deadline_s=240, folder=tmp_path)
