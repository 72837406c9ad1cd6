"""Draw tools/slurm/figures/scaling.png: simulated speed from 8 to 4,096 H100, and where a step goes.

python tools/slurm/draw_scaling.py [OUT.png]
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_medgpt.config.presets import GPT_OSS_20B, GPT_OSS_120B
from megatron_medgpt.config.schema import LanguageConfig, ModelConfig, ParallelConfig
from megatron_medgpt.parallel.cost import Work
from megatron_medgpt.parallel.hardware import accelerator
from megatron_medgpt.parallel.plan_plot import draw_scaling
from megatron_medgpt.parallel.published import EFFICIENCY
from megatron_medgpt.parallel.simulate import ScalePoint, scaling

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
BATCH_ROWS = 1024
"""Of 4,096 positions: 4.2 M tokens a step."""
ROWS_PER_GPU = 4


def curve(
    language: LanguageConfig, parallel: ParallelConfig, first: int, rows_per_gpu: float | None
) -> list[ScalePoint]:
    work = Work(sequence_length=4096, micro_batch_rows=1, global_batch_rows=BATCH_ROWS)
    return scaling(
        ModelConfig(language=language), parallel, accelerator("h100"), work, gpus=GPUS[first:],
        efficiency=EFFICIENCY["hopper"], rows_per_gpu=rows_per_gpu,
    )  # fmt: skip


def main() -> int:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "figures" / "scaling.png"
    small, large = (
        (GPT_OSS_20B, ParallelConfig(expert=8), 0),
        (GPT_OSS_120B, ParallelConfig(pipeline=4, expert=8, layers_per_stage=(10, 10, 10, 6)), 2),
    )
    fixed = f"batch of {BATCH_ROWS:,} rows"
    curves = {
        f"20B, EP8, {fixed}": curve(*small, None),
        f"20B, EP8, {ROWS_PER_GPU} rows a GPU": curve(*small, ROWS_PER_GPU),
        f"120B, PP4 EP8, {fixed}": curve(*large, None),
        f"120B, PP4 EP8, {ROWS_PER_GPU} rows a GPU": curve(*large, ROWS_PER_GPU),
    }
    for name, points in curves.items():
        print(name)
        for p in points:
            shares = ", ".join(f"{part} {share:.0%}" for part, share in p.shares.items())
            print(f"  {p.num_gpus:>5} GPUs, {p.num_micro_batches:>3} micro-batches: {p.tokens_per_s_per_gpu:>7,.0f} "
                  f"tok/s/GPU ({shares})")  # fmt: skip
    draw_scaling(curves, f"120B, PP4 EP8, {fixed}", out)
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
