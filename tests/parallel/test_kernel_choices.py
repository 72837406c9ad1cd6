"""Kernel choices that ranks share: what expert ranks send, gradients in shared buffers, a split vocabulary."""

from __future__ import annotations

from pathlib import Path

from ranks import run_ranks


def test_choices_of_kernels_change_what_ranks_compute_by_their_rounding_alone(tmp_path):
    run_ranks(
        Path(__file__).with_name("kernel_worker.py"),
        [str(tmp_path / "checkpoints")],
        num_ranks=2,
        deadline_s=900,
        folder=tmp_path,
    )
