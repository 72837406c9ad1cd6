"""Published training speeds of GPT-oss, and the efficiency that makes this package's arithmetic agree with them.

All points: BF16, sequences of 4,096, routing forced to balance, no images. Two stacks:

* NeMo AutoModel ``docs/performance-summary.mdx`` (2025-10-02). Its balanced gate gives token t the experts 4 t to
  4 t + 3 (``FakeBalancedGate``), which lie on one rank (20B, EP8) or one node (120B, EP64): its exchange carries a
  third of what real routing would.
* Megatron-Bridge ``docs/performance-summary.md`` and its archive (26.02 to 26.04.01), layouts from
  ``scripts/performance/configs/gpt_oss``. Random balanced routing, one copy per expert. 36 layers on four stages are 9
  each there, so that the last stage, with the head, is the slowest by a third.

One efficiency per GPU generation is calibrated: the geometric mean of those that make each point exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_medgpt.config.presets import GPT_OSS_20B, GPT_OSS_120B
from megatron_medgpt.config.schema import LanguageConfig, ModelConfig, ParallelConfig
from megatron_medgpt.parallel.cost import Work, step_seconds
from megatron_medgpt.parallel.hardware import accelerator
from megatron_medgpt.parallel.plan import make_layout


@dataclass(frozen=True, kw_only=True)
class Published:
    name: str
    stack: str
    language: LanguageConfig
    gpu: str
    num_gpus: int
    parallel: ParallelConfig
    micro_batch_rows: int
    global_batch_rows: int
    tokens_per_s_per_gpu: float
    dispatch: str
    routing: str = "uniform"

    def predict(self, efficiency: float) -> float:
        """Tokens per second and GPU at an efficiency."""
        model = ModelConfig(language=self.language)
        work = Work(
            sequence_length=4096, micro_batch_rows=self.micro_batch_rows, global_batch_rows=self.global_batch_rows,
            dispatch=self.dispatch, routing=self.routing,
        )  # fmt: skip
        layout = make_layout(self.parallel, model, self.num_gpus)
        step = step_seconds(model, layout, accelerator(self.gpu), work, efficiency=efficiency)
        return step.tokens_per_s_per_gpu


def _bridge(gpu: str, tokens_per_s: float, *, expert: int, pipeline: int = 1, micro_batch_rows: int = 4) -> Published:
    return Published(
        name=f"120b on 64 {gpu.upper()}", stack="Megatron-Bridge", language=GPT_OSS_120B, gpu=gpu, num_gpus=64,
        parallel=ParallelConfig(pipeline=pipeline, expert=expert), micro_batch_rows=micro_batch_rows,
        global_batch_rows=1280, tokens_per_s_per_gpu=tokens_per_s, dispatch="copies",
    )  # fmt: skip


POINTS = (
    Published(
        name="20b on 8 H100", stack="AutoModel", language=GPT_OSS_20B, gpu="h100", num_gpus=8,
        parallel=ParallelConfig(expert=8), micro_batch_rows=2, global_batch_rows=256, tokens_per_s_per_gpu=13_058,
        dispatch="once", routing="consecutive",
    ),
    Published(
        name="120b on 64 H100", stack="AutoModel", language=GPT_OSS_120B, gpu="h100", num_gpus=64,
        parallel=ParallelConfig(expert=64), micro_batch_rows=2, global_batch_rows=512, tokens_per_s_per_gpu=7_626,
        dispatch="once", routing="consecutive",
    ),
    _bridge("h100", 5_993, expert=8, pipeline=4, micro_batch_rows=1),
    _bridge("b200", 13_568, expert=8),
    _bridge("gb200", 16_640, expert=64),
    _bridge("gb300", 19_200, expert=64),
)  # fmt: skip

HELD_OUT = _bridge("b300", 15_232, expert=8)
"""Never calibrated on (26.04.01)."""

EFFICIENCY = {"hopper": 0.3687, "blackwell": 0.2825}
"""Share of the accelerator's sustained rate, from ``calibrate(POINTS)``; a test recomputes them."""


def generation_of(point: Published) -> str:
    return accelerator(point.gpu).generation


def calibrate(points: tuple[Published, ...]) -> dict[str, float]:
    """Efficiency of each GPU generation among the points."""
    generations = sorted({generation_of(point) for point in points})
    return {g: _mean([exact_efficiency(p) for p in points if generation_of(p) == g]) for g in generations}


def exact_efficiency(point: Published) -> float:
    """The efficiency at which a point is predicted exactly (by bisection; faster is always faster)."""
    low, high = 0.01, 2.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if point.predict(middle) < point.tokens_per_s_per_gpu else (low, middle)
    return (low + high) / 2


def leave_one_out() -> dict[str, tuple[float, float]]:
    """For every point, calibrated on the others of its generation: predicted tokens/s/GPU, and the error."""
    results = {}
    for left_out in POINTS:
        others = tuple(p for p in POINTS if p is not left_out and generation_of(p) == generation_of(left_out))
        predicted = left_out.predict(calibrate(others)[generation_of(left_out)])
        results[f"{left_out.stack}, {left_out.name}"] = (predicted, predicted / left_out.tokens_per_s_per_gpu - 1)
    return results


def _mean(values: list[float]) -> float:
    return math.prod(values) ** (1 / len(values))
