"""Plots of a plan (memory and time of every stage) and of simulated scaling."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from megatron_medgpt.parallel.planner import Plan
from megatron_medgpt.parallel.simulate import ScalePoint

GIB = 2**30
PARTS = ("weights", "gradients", "optimizer", "activations", "workspace")
SHARES = ("compute", "routing", "bubble", "stragglers", "data parallel")


def draw_plan(plan: Plan, path: Path) -> None:
    """Memory and time per pipeline stage of the best layout, as a PNG."""
    best, gpu = plan.best[0], plan.request.gpu
    stages = range(best.layout.pipeline)
    figure, (memory_axes, time_axes) = plt.subplots(1, 2, figsize=(9, 3.4))
    below = [0.0] * len(stages)
    for part in PARTS:
        values = [getattr(best.memory[s], part) / GIB for s in stages]
        memory_axes.bar(stages, values, bottom=below, label=part)
        below = [a + b for a, b in zip(below, values)]
    memory_axes.axhline(gpu.memory_bytes / GIB, color="black", linestyle="--", linewidth=1)
    memory_axes.set(title="memory of a GPU", xlabel="pipeline stage", ylabel="GiB", xticks=list(stages))
    memory_axes.legend(fontsize=7)
    seconds = best.step.stages
    forward = [1000 * s.forward for s in seconds]
    time_axes.bar(stages, forward, label="forward")
    time_axes.bar(stages, [1000 * s.backward for s in seconds], bottom=forward, label="backward")
    time_axes.set(title="a micro-batch", xlabel="pipeline stage", ylabel="ms", xticks=list(stages))
    time_axes.legend(fontsize=7)
    figure.suptitle(f"{best.describe()} on {plan.request.num_gpus} x {gpu.name.upper()}", fontsize=10)
    _save(figure, path)


def draw_scaling(curves: dict[str, list[ScalePoint]], parts_of: str, path: Path) -> None:
    """Tokens per second and GPU over the number of GPUs, and where the step of one curve goes, as a PNG."""
    figure, (speed_axes, share_axes) = plt.subplots(1, 2, figsize=(10, 3.8))
    for name, points in curves.items():
        counts = [p.num_gpus for p in points]
        speed_axes.plot(counts, [p.tokens_per_s_per_gpu for p in points], marker="o", markersize=3, label=name)
    speed_axes.set(xscale="log", title="simulated speed", xlabel="GPUs", ylabel="tokens/s/GPU", ylim=(0, None))
    speed_axes.legend(fontsize=7)
    points = curves[parts_of]
    share_axes.stackplot(
        [p.num_gpus for p in points], [[p.shares[part] for p in points] for part in SHARES], labels=SHARES
    )
    share_axes.set(xscale="log", title=f"a step of {parts_of}", xlabel="GPUs", ylabel="share", ylim=(0, 1))
    share_axes.legend(fontsize=7, loc="lower left")
    for axes in (speed_axes, share_axes):
        axes.set_xticks([p.num_gpus for p in max(curves.values(), key=len)])
        axes.set_xticklabels([f"{p.num_gpus:,}" for p in max(curves.values(), key=len)], rotation=45, fontsize=7)
        axes.minorticks_off()
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
