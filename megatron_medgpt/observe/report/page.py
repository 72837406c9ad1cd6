"""Gather a run folder and write ``report.html``."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import jinja2
import yaml

from megatron_medgpt.config.errors import UsageError, WorkError
from megatron_medgpt.observe.marker import RunState, read_state
from megatron_medgpt.observe.report import charts, evaluation, gallery, leakage
from megatron_medgpt.observe.report.curves import Metrics, read_metrics
from megatron_medgpt.observe.report.datasets import datasets
from megatron_medgpt.observe.report.events import write_events
from megatron_medgpt.observe.report.files import read_json
from megatron_medgpt.observe.whole import write_whole

HERE = Path(__file__).parent
CURVES = (
    # key in metrics.jsonl, title, unit, key of rare measurements drawn over it and their name, scale of the y axis
    ("loss", "Training loss", "nats per token", ("validation_loss", "validation"), "linear"),
    ("option_accuracy", "Held-out accuracy while training", "", None, "share"),
    ("lr", "Learning rate", "", None, "linear"),
    ("grad_norm", "Gradient norm", "before clipping", None, "log"),
    ("tokens_per_s", "Throughput", "tokens per second", None, "linear"),
    ("mem_gb", "Peak memory per rank", "GB", None, "linear"),
)


def write_report(run_dir: Path | str) -> Path:
    """Write ``run_dir/report.html`` from what the run left there, and return its path.

    Read, each if present: ``run.yaml``, ``state.json``, ``metrics.jsonl``, ``eval/*.json`` with their galleries,
    ``summary.json``, ``leakage/leakage.json``. Evaluations and pictures also go into ``tensorboard/report`` where the
    run has TensorBoard.

    Raises:
        UsageError: not a folder, or none of these files is in it.
        WorkError: one of them cannot be read; names it.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UsageError(f"{run_dir}: no such run folder")
    wanted = ("run.yaml", "metrics.jsonl", "eval", "summary.json")
    if not any((run_dir / name).exists() for name in wanted):
        raise UsageError(f"{run_dir} holds none of {', '.join(wanted)}; give the out folder of a run")
    config = _read_yaml(run_dir / "run.yaml")
    summary = read_json(run_dir / "summary.json", {})
    metrics = read_metrics(run_dir / "metrics.jsonl")
    results = evaluation.read_results(run_dir / "eval")
    galleries = gallery.galleries(run_dir / "eval", results)
    page = (
        _environment()
        .get_template("page.html")
        .render(
            name=config.get("name") or run_dir.name,
            state=_state(read_state(run_dir)),
            tiles=_tiles(metrics, results, summary),
            stages=_stages(config, metrics),
            curves=_curves(metrics),
            expert_load=_expert_load(metrics),
            time_shares=_time_shares(metrics),
            datasets=datasets(config, run_dir),
            headline=evaluation.headline(results),
            results=evaluation.views(results),
            side_by_side=evaluation.side_by_side(results),
            galleries=galleries,
            leakage=leakage.view(run_dir, results),
            provenance=_provenance(config, summary, metrics),
            config_rows=list(flattened(config)),
        )
    )
    out = run_dir / "report.html"
    write_whole(out, page)
    last_step = int(metrics.rows[-1]["step"]) if metrics.rows else 0
    write_events(run_dir, results, galleries[0]["cards"] if galleries else [], last_step)
    return out


def flattened(section: Any, prefix: str = "") -> list[tuple[str, str]]:
    """A nested configuration as (dotted name, value) rows."""
    if isinstance(section, Mapping):
        return [
            row for key, value in section.items() for row in flattened(value, f"{prefix}.{key}" if prefix else str(key))
        ]
    if isinstance(section, list) and any(isinstance(value, (Mapping, list)) for value in section):
        return [row for place, value in enumerate(section) for row in flattened(value, f"{prefix}[{place}]")]
    if isinstance(section, list):
        return [(prefix, ", ".join(map(str, section)))]
    return [(prefix, "" if section is None else str(section))]


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters["percent"] = lambda value, places=1: "–" if value is None else f"{value:.{places}%}"
    environment.filters["thousands"] = lambda value: f"{value:,}"
    return environment


def _state(state: RunState | None) -> dict[str, Any] | None:
    """How a run stands that has not come to its end; ``trouble`` where somebody has to look."""
    if state is None or state.status == "done":
        return None
    trouble = state.cut_off or state.status in ("failed", "crashed")
    goes_on = state.status in ("running", "starting") and not state.cut_off
    subject = "When this page was written this run was" if goes_on else "This run"
    return {"subject": subject, "said": state.describe(), "trouble": trouble}


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise WorkError(f"{path} is not YAML ({error})") from None
    return loaded if isinstance(loaded, dict) else {}


def _tiles(metrics: Metrics, results: list[dict[str, Any]], summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """The figures on top of the page, under the headline."""
    tiles = []
    if not results and "accuracy" in summary:
        tiles.append(_tile("Held-out accuracy", f"{summary['accuracy']:.1%}", "from summary.json"))
    if (loss := metrics.series("loss", thin=False)) is not None:
        tiles.append(_tile("Training loss", f"{loss.last:.3f}", f"{loss.ys[0]:.3f} at the first step"))
    if (validation := metrics.series("validation_loss", thin=False)) is not None:
        tiles.append(_tile("Validation loss", f"{validation.last:.3f}", f"best {min(validation.ys):.3f}"))
    if tokens := metrics.total("tokens"):
        tiles.append(_tile("Tokens seen", charts.short_number(tokens), f"{len(metrics.rows):,} steps"))
    if seconds := summary.get("seconds") or metrics.total("step_s"):
        note = "whole run" if "seconds" in summary else "in training steps"
        tiles.append(_tile("Time", str(timedelta(seconds=round(seconds))), note))
    return tiles


def _tile(name: str, value: str, note: str) -> dict[str, str]:
    return {"name": name, "value": value, "note": note}


def _stages(config: Mapping[str, Any], metrics: Metrics) -> list[dict[str, Any]]:
    """One row per stage: what was planned, and how far it came."""
    seen = {span.name: span for span in metrics.stages}
    planned = [stage for stage in config.get("stages") or [] if isinstance(stage, Mapping)]
    names = [str(stage.get("name")) for stage in planned] or list(seen)
    rows = []
    for place, name in enumerate(names):
        plan = planned[place] if place < len(planned) else {}
        own = [row for row in metrics.rows if str(row.get("stage", "training")) == name]
        losses = [row["loss"] for row in own if isinstance(row.get("loss"), (int, float))]
        rows.append(
            {
                "name": name,
                "colour": f"c{place % charts.STAGE_COLOURS}",
                "layout": _layout(plan.get("parallel") or config.get("parallel") or {}),
                "learns": _learns(plan.get("frozen")),
                "data": [Path(str(entry.get("path", ""))).name for entry in plan.get("data") or []],
                "steps": len(own),
                "planned": plan.get("num_steps"),
                "losses": (losses[0], losses[-1]) if losses else None,
            }
        )
    return rows


def _layout(parallel: Mapping[str, Any]) -> str:
    parts = [("TP", "tensor"), ("PP", "pipeline"), ("EP", "expert")]
    return " · ".join(f"{short}{parallel.get(key, 1)}" for short, key in parts)


def _learns(frozen: Any) -> str:
    return f"all but {', '.join(frozen)}" if frozen else "everything"


def _curves(metrics: Metrics) -> list[Any]:
    drawn = []
    for key, title, unit, extra, scale in CURVES:
        series = metrics.series(key)
        if series is None:
            continue
        rare = sum(key in row for row in metrics.rows) * 4 < len(metrics.rows)
        lines = [charts.Line(title, series, points=rare)]
        if extra is not None and (over := metrics.series(extra[0])) is not None:
            lines.append(charts.Line(extra[1], over, points=True))
        if scale == "log" and not (min(series.ys) > 0 and max(series.ys) / min(series.ys) > 20):
            scale = "linear"
        drawn.append(
            {
                "title": title,
                "unit": unit,
                "note": f"Points: {extra[1]}." if len(lines) > 1 else "",
                "svg": charts.line_chart(title, unit, lines, metrics.stages, scale=scale),
                "last": charts.axis_number(series.last, scale),
            }
        )
    return drawn


def _expert_load(metrics: Metrics) -> dict[str, Any] | None:
    """The newest ``expert_load/NAME`` (share of routed tokens per expert) with ``expert_entropy/NAME`` (0 to 1)."""
    load = metrics.latest("expert_load")
    if not load:
        return None
    rows = [(name, [float(share) for share in shares]) for name, shares in sorted(load.items())]
    entropy = metrics.latest("expert_entropy")
    return {
        "svg": charts.heat_map(rows),
        "rows": [
            {
                "name": name, "largest": max(shares), "expert": shares.index(max(shares)), "smallest": min(shares),
                "entropy": entropy.get(name),
            }
            for name, shares in rows
        ],
        "even": 1 / max(len(shares) for _, shares in rows),
    }  # fmt: skip


def _time_shares(metrics: Metrics) -> list[dict[str, Any]]:
    """What the steps' time went into (``time/NAME_s``), with shares of their sum."""
    totals = metrics.totals("time")
    whole = sum(totals.values())
    return [
        {"name": name.removesuffix("_s").replace("_", " "), "seconds": seconds, "share": seconds / whole}
        for name, seconds in totals.items()
        if whole > 0
    ]


def _provenance(config: Mapping[str, Any], summary: Mapping[str, Any], metrics: Metrics) -> list[tuple[str, str]]:
    rows = [(key, config[key]) for key in ("name", "seed", "precision", "recompute", "tokenizer") if key in config]
    if metrics.skipped:
        rows.append(("metrics.jsonl", f"{metrics.skipped} unreadable lines skipped"))
    # Shown where they belong: tiles and evaluation.
    skipped = ("accuracy", "controls", "seconds", "n", "ci95", "by_modality", "by_question_type", "protocols")
    rows += flattened({key: value for key, value in summary.items() if key not in skipped})
    return [(key, str(value)) for key, value in rows]
