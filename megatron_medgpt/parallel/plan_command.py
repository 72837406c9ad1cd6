"""``medgpt plan``: the layouts that fit a number of GPUs, as a table, JSON, a plot, or a run to start from."""

from __future__ import annotations

import json as json_format
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.config.load import apply_overrides, build, read_yaml, to_yaml
from megatron_medgpt.config.presets import LANGUAGE, VISION
from megatron_medgpt.config.schema import MODULES, BlendConfig, KernelConfig, ModelConfig, RunConfig, StageConfig
from megatron_medgpt.parallel.cost import FP8_GAIN, untimed
from megatron_medgpt.parallel.flops import training_flops
from megatron_medgpt.parallel.hardware import accelerator
from megatron_medgpt.parallel.memory import model_parameters
from megatron_medgpt.parallel.planner import Candidate, Plan, Request, make_plan, stage_parameters
from megatron_medgpt.parallel.published import EFFICIENCY
from megatron_medgpt.parallel.simulate import Disturbance, simulate_step

GIB = 2**30
ENCODER = "clip-l-14-336"
"""Preset of the encoder where none is named."""
FP8_ASSUMED = f"products of experts in FP8 are taken to be {FP8_GAIN:.2f} times as fast as in BF16: not measured"


def run_plan(
    model: str, overrides: Sequence[str] = (), *, gpus: int, gpu: str = "h200", vision: str | None = None,
    sequence_length: int = 4096, global_batch_rows: int = 256, images_per_row: float = 4.0, target_share: float = 1.0,
    frozen: Sequence[str] = (), skew: float = 1.0, mxfp4_frozen: bool = False, efficiency: float | None = None,
    keep: int = 5, json: bool = False, out: Path | None = None, plot: Path | None = None,
) -> str:  # fmt: skip
    """Plan a training stage and say what was found.

    Args:
        model: a preset of ``config.presets.LANGUAGE``, or a YAML file with a ``model:`` section (a run.yaml will do);
            its ``kernels:`` section counts too.
        overrides: ``kernels.field=value``, as ``medgpt train`` takes them.
        gpus: how many, all of the kind ``gpu`` (``parallel.hardware.ACCELERATORS``).
        vision: preset of the encoder, for a language preset (``clip-l-14-336`` when not given); a YAML names its own.
        target_share: positions that are targets of the loss; only they pay for the head.
        frozen: modules that do not learn in this stage.
        skew: rows of the busiest expert rank over the mean.
        mxfp4_frozen: frozen experts stay packed in MXFP4 (``stages.NAME.experts: packed``).
        efficiency: share of the sustained rate that matrix products reach; the calibrated one when not given.
        out: write the recommended run here.
        plot: draw memory and time of every stage of the best layout here (PNG).

    Returns:
        The table, or JSON.

    Raises:
        UsageError: unknown names, or nothing fits; the message says what would have come nearest.
    """
    config, chip = _model(model, vision), accelerator(gpu)
    kernels = _kernels(model, overrides)
    _check_numbers(gpus=gpus, sequence_length=sequence_length, global_batch_rows=global_batch_rows, keep=keep)
    _check_ratios(target_share=(target_share, 0, 1), images_per_row=(images_per_row, 0, None), skew=(skew, 1, None))
    _check_ratios(efficiency=(1.0 if efficiency is None else efficiency, 1e-6, 1))
    _check_files(out, plot)
    for name in frozen:
        if name not in MODULES:
            raise UsageError(f"--frozen names {name!r}; allowed: {', '.join(MODULES)}")
    if mxfp4_frozen and "experts" not in frozen:
        raise UsageError("--mxfp4-frozen packs experts that do not learn; add --frozen experts")
    _check_sequence(config, sequence_length)
    request = Request(
        model=config, num_gpus=gpus, gpu=chip, sequence_length=sequence_length, global_batch_rows=global_batch_rows,
        images_per_row=images_per_row, target_share=target_share, frozen=tuple(frozen), skew=skew,
        mxfp4_frozen=mxfp4_frozen, efficiency=efficiency or EFFICIENCY[chip.generation], kernels=kernels,
    )  # fmt: skip
    plan = make_plan(request, keep=keep)
    if not plan.best:
        raise UsageError(
            f"{model} does not fit {gpus} x {gpu} ({chip.memory_bytes / GIB:.0f} GiB each); nearest: {plan.nearest}. "
            "Take more GPUs, freeze modules (--frozen experts), or a shorter --sequence-length"
        )
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(to_yaml(recommended_run(plan)), encoding="utf-8")
    if plot is not None:
        from megatron_medgpt.parallel.plan_plot import draw_plan  # matplotlib takes a second to import

        draw_plan(plan, plot)
    return json_format.dumps(as_tree(plan), indent=1) if json else as_table(plan, title=model)


def _model(name: str, vision: str | None) -> ModelConfig:
    if name in LANGUAGE:
        vision = vision or ENCODER
        if vision not in VISION:
            raise UsageError(f"--vision {vision}: not known; allowed: {', '.join(VISION)}")
        return ModelConfig(language=LANGUAGE[name], vision=VISION[vision])
    if name.endswith((".yaml", ".yml")):
        if vision is not None:
            raise UsageError(f"--vision {vision}: {name} names its own encoder (model.vision); leave the option out")
        tree = read_yaml(Path(name))
        if "model" not in tree:
            raise UsageError(f"{name}: no section 'model:'")
        return build(ModelConfig, tree["model"], where="model")
    raise UsageError(f"--model {name}: neither a preset ({', '.join(LANGUAGE)}) nor a YAML file")


def _kernels(model: str, overrides: Sequence[str]) -> KernelConfig:
    for text in overrides:
        if not text.startswith("kernels."):
            raise UsageError(f"override {text!r}: a plan takes kernels.field=value alone; see --help")
    given = read_yaml(Path(model)).get("kernels") or {} if model.endswith((".yaml", ".yml")) else {}
    return build(KernelConfig, apply_overrides({"kernels": given}, overrides)["kernels"], where="kernels")


def _check_numbers(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value}: must be at least 1")


def _check_ratios(**ratios: tuple[float, float, float | None]) -> None:
    """Value, least and most (None: no limit)."""
    for name, (value, least, most) in ratios.items():
        if not least <= value <= (math.inf if most is None else most):  # false for NaN too
            bounds = f"at least {least:g}" if most is None else f"between {least:g} and {most:g}"
            raise UsageError(f"--{name.replace('_', '-')} {value:g}: must be {bounds}")


def _check_sequence(model: ModelConfig, length: int) -> None:
    """Refuse rows that no run of the model could have."""
    if length > model.language.max_length:
        raise UsageError(f"--sequence-length {length}: exceeds model.language.max_length={model.language.max_length}")
    if length <= model.tokens_per_image:
        raise UsageError(f"--sequence-length {length}: cannot hold one image of {model.tokens_per_image} tokens")


def _check_files(out: Path | None, plot: Path | None) -> None:
    """Refuse, before planning, what could not be written after it."""
    for option, path in (("--out", out), ("--plot", plot)):
        if path is None:
            continue
        if path.is_dir():
            raise UsageError(f"{option} {path} is a folder; name a file in it")
        there = next(folder for folder in path.absolute().parents if folder.exists())
        if not there.is_dir():
            raise UsageError(f"{option} {path}: {there} is a file; name a folder")
    if plot is not None and plot.suffix not in ("", ".png"):
        raise UsageError(f"--plot {plot}: a PNG is drawn; end it in .png")


def recommended_run(plan: Plan) -> RunConfig:
    """The best layout as a run of one stage; data, tokenizer and output folder are to be filled in."""
    best, request = plan.best[0], plan.request
    stage = StageConfig(
        name="train", data=(BlendConfig(path="data/train"),), num_steps=1000, sequence_length=request.sequence_length,
        micro_batch_rows=best.micro_batch_rows, global_batch_rows=request.global_batch_rows, frozen=request.frozen,
        experts="packed" if request.packed else "plain",
    )  # fmt: skip
    return RunConfig(
        name="planned", out="runs/planned", tokenizer="tokenizer", stages=(stage,), model=request.model,
        parallel=best.parallel, recompute=best.recompute, kernels=request.kernels,
    )  # fmt: skip


def as_tree(plan: Plan) -> dict[str, Any]:
    """Everything of a plan that JSON can hold."""
    request = plan.request
    return {
        "gpus": request.num_gpus,
        "gpu": request.gpu.name,
        "efficiency": request.efficiency,
        "kernels": asdict(request.kernels),
        "kernels_not_in_time": untimed(request.kernels),
        "parameters": asdict(model_parameters(request.model)),
        "step_flops": _step_flops(request),
        "fitting": plan.num_fitting,
        "refused": plan.refused,
        "layouts": [_candidate_tree(candidate, request) for candidate in plan.best],
    }


def _candidate_tree(candidate: Candidate, request: Request) -> dict[str, Any]:
    step = asdict(candidate.step)
    stages = step.pop("stages")
    parameters = stage_parameters(candidate, request.model)
    return {
        "layout": candidate.describe(),
        "parallel": asdict(candidate.parallel),
        "micro_batch_rows": candidate.micro_batch_rows,
        "recompute": candidate.recompute,
        "peak_bytes": candidate.peak_bytes,
        "mfu": candidate.step.model_flops_per_s_per_gpu / request.gpu.peak_flops,
        "step": step,
        "stages": [
            {"parameters": count, "seconds": seconds, "memory": {**asdict(memory), "total": memory.total}}
            for count, seconds, memory in zip(parameters, stages, candidate.memory)
        ],
    }


def _step_flops(request: Request) -> float:
    return training_flops(
        request.model, num_tokens=request.global_batch_rows * request.sequence_length,
        num_images=request.global_batch_rows * request.images_per_row, document_length=request.sequence_length,
        frozen=request.frozen, target_share=request.target_share,
    )  # fmt: skip


def as_table(plan: Plan, title: str) -> str:
    """For people: the best layouts, the best one's stages, where its time goes, and why the others were refused."""
    request, best = plan.request, plan.best[0]
    count = model_parameters(request.model)
    lines = [
        f"{title}: {count.total / 1e9:.2f} B parameters on {request.num_gpus} x {request.gpu.name.upper()}, "
        f"{request.global_batch_rows} rows of {request.sequence_length} a step, {request.images_per_row:g} images a row"
        + (f", frozen: {', '.join(request.frozen)}" if request.frozen else "")
        + "".join(f", kernels.{name}={choice}" for name, choice in _chosen(request.kernels).items()),
        "",
        f"{'layout':<44}{'rows':>5}{'recompute':>11}{'GiB/GPU':>9}{'step s':>8}{'tok/s/GPU':>11}{'MFU':>6}",
    ]
    lines += [_row(candidate, request) for candidate in plan.best]
    lines += ["", *_stage_rows(best, request), "", *_time_lines(best, request), "", *_refused_lines(plan)]
    return "\n".join(lines)


def _chosen(kernels: KernelConfig) -> dict[str, str]:
    """The choices that differ from a run's defaults."""
    return {name: choice for name, choice in asdict(kernels).items() if choice != getattr(KernelConfig(), name)}


def _row(candidate: Candidate, request: Request) -> str:
    step = candidate.step
    return (
        f"{candidate.describe():<44}{candidate.micro_batch_rows:>5}{candidate.recompute:>11}"
        f"{candidate.peak_bytes / GIB:>9.1f}{step.total:>8.2f}{step.tokens_per_s_per_gpu:>11,.0f}"
        f"{step.model_flops_per_s_per_gpu / request.gpu.peak_flops:>6.0%}"
    )


def _stage_rows(best: Candidate, request: Request) -> list[str]:
    columns = ("weights", "gradients", "optimizer", "activations", "workspace", "total")
    lines = [
        f"stages of {best.describe()}, GiB a GPU:",
        f"{'stage':>5}{'parameters':>16}" + "".join(f"{name:>13}" for name in columns) + f"{'ms/micro-batch':>16}",
    ]
    parameters = stage_parameters(best, request.model)
    for rank, (memory, seconds) in enumerate(zip(best.memory, best.step.stages)):
        cells = "".join(f"{getattr(memory, name) / GIB:>13.1f}" for name in columns)
        lines.append(f"{rank:>5}{parameters[rank]:>16,}{cells}{1000 * (seconds.forward + seconds.backward):>16.1f}")
    return lines


def _time_lines(best: Candidate, request: Request) -> list[str]:
    step = best.step
    parts = [
        ("computing", step.compute), ("exchanging", step.exchange), ("pipeline bubble", step.bubble),
        ("data parallel", step.data_parallel), ("optimizer", step.optimizer),
    ]  # fmt: skip
    uneven = simulate_step(
        request.model, best.layout, request.gpu, request.work(best.micro_batch_rows, best.recompute),
        efficiency=request.efficiency, disturbance=Disturbance(),
    )  # fmt: skip
    return [
        f"a step of {step.total:.2f} s: " + ", ".join(f"{name} {s / step.total:.0%}" for name, s in parts),
        f"data to read: {step.images_per_s:,.0f} images/s; {_step_flops(request) / 1e15:,.1f} PFLOP a step",
        f"with uneven routing, stragglers and jitter (simulated): {uneven.tokens_per_s_per_gpu:,.0f} tok/s/GPU",
        f"efficiency {request.efficiency:.0%} of the sustained {request.gpu.sustained_flops / 1e12:.0f} TFLOP/s: "
        + (
            "calibrated on published runs of other stacks; measure yours and pass --efficiency"
            if request.efficiency == EFFICIENCY[request.gpu.generation]
            else "as given"
        ),
        *([] if request.kernels.experts != "fp8" else [FP8_ASSUMED]),
        *_untimed_lines(request),
    ]


def _untimed_lines(request: Request) -> list[str]:
    names = ", ".join(f"kernels.{name}={choice}" for name, choice in untimed(request.kernels).items())
    if not names:
        return []
    return [f"the time that {names} may save is not predicted: measure a step and pass --efficiency"]


def _refused_lines(plan: Plan) -> list[str]:
    total = plan.num_fitting + sum(plan.refused.values())
    lines = [f"{plan.num_fitting} of {total} combinations fit"]
    lines += [f"  {count:>5} refused: {reason}" for reason, count in sorted(plan.refused.items(), key=lambda i: -i[1])]
    return lines
