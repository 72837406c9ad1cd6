"""Charts as inline SVG. Colours are classes of the page's style sheet, so that they follow light, dark and print."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from megatron_medgpt.observe.report.curves import Series, Span

WIDTH, HEIGHT = 480, 250
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 26, 34
STAGE_COLOURS = 6
"""Classes ``c0`` ... of the style sheet."""


@dataclass(frozen=True, slots=True)
class Line:
    """One curve of a chart. ``points`` draws marks joined by a thin line (rare measurements)."""

    name: str
    series: Series
    points: bool = False


def line_chart(
    title: str, unit: str, lines: Sequence[Line], stages: Sequence[Span], *, scale: str = "linear"
) -> Markup:
    """A chart over the steps of a run; the first line takes the colours of the stages, further ones are dark marks.

    ``scale`` of the y axis: ``linear``; ``log``, where all values are above 0; ``share``, all of 0 to 100 %, so that a
    gain of one point looks like one.
    """
    values = [y for line in lines for y in (*line.series.ys, *line.series.lows, *line.series.highs)]
    log = scale == "log" and min(values) > 0
    # Every chart spans the whole run, so that charts can be compared at a glance.
    steps = [x for line in lines for x in line.series.xs]
    steps += [end for stage in stages for end in (stage.first, stage.last)]
    scale_x = _Scale(*_bounds(steps), LEFT, WIDTH - RIGHT)
    low, high = (0.0, 1.0) if scale == "share" else _padded(values, log)
    scale_y = _Scale(low, high, HEIGHT - BOTTOM, TOP, log=log)
    parts = [_stage_bands(stages, scale_x), _grid_y(scale_y, scale), _axis_x(scale_x)]
    for place, line in enumerate(lines):
        parts += _marks(line, scale_x, scale_y, scale) if line.points else _curve(line, place, stages, scale_x, scale_y)
    said = "; ".join(
        f"{line.name} from {axis_number(line.series.ys[0], scale)} to {axis_number(line.series.last, scale)}"
        for line in lines
    )  # fmt: skip
    return _svg(f"{title}{f' ({unit})' if unit else ''}", f"{said} over {scale_x.high:.0f} steps", parts, HEIGHT)


def interval_chart(rows: Sequence[tuple[str, float, Sequence[float] | None, str]], chance: float | None) -> Markup:
    """Accuracies with their intervals on one axis from 0 to 1. Rows are (name, accuracy, interval, colour class)."""
    height = TOP + 30 * len(rows) + 30
    left = 132
    scale = _Scale(0, 1, left, WIDTH - 70)
    parts = []
    for tick in (0, 0.25, 0.5, 0.75, 1.0):
        x = scale(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 8}" y2="{height - 26}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{height - 10}" text-anchor="middle">{tick:.0%}</text>')
    if chance:
        x = scale(chance)
        parts.append(f'<line class="chance" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 8}" y2="{height - 26}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{TOP - 12}" text-anchor="middle">guessing {chance:.0%}</text>')
    for place, (name, value, interval, colour) in enumerate(rows):
        y = TOP + 16 + 30 * place
        parts.append(
            f'<text class="label" x="{left - 10}" y="{y + 4}" text-anchor="end"><title>{escape(name)}</title>'
            f"{escape(_fitting(name, left - 10, letter_px=8.5))}</text>"  # as wide as they are on a telephone
        )
        parts.append(
            f'<rect class="bar {colour}" x="{left}" y="{y - 8}" width="{scale(value) - left:.1f}" height="16"/>'
        )
        if interval:
            a, b = scale(interval[0]), scale(interval[1])
            parts.append(f'<path class="whisker" d="M{a:.1f} {y - 4}v8m0-4H{b:.1f}m0-4v8"/>')
        edge = scale(max(value, interval[1] if interval else 0))
        parts.append(f'<text class="value" x="{edge + 6:.1f}" y="{y + 4}">{value:.1%}</text>')
    said = "; ".join(f"{name} {value:.1%}" for name, value, _, _ in rows)
    return _svg("Accuracy and controls", said, parts, height)


def heat_map(rows: Sequence[tuple[str, Sequence[float]]]) -> Markup:
    """Share of each expert (columns) by modality (rows), coloured by its ratio to an even share."""
    num_columns = max(len(values) for _, values in rows)
    left, size_y, top = 20 + 8 * max(len(name) for name, _ in rows), 22, 8
    size_x = (WIDTH - left - 8) / num_columns
    height = top + size_y * len(rows) + 30
    parts = []
    for r, (name, values) in enumerate(rows):
        y = top + r * size_y
        parts.append(f'<text class="label" x="{left - 8}" y="{y + 15}" text-anchor="end">{escape(name)}</text>')
        for c, value in enumerate(values):
            strength = min(1.0, value * num_columns / 3)
            parts.append(
                f'<rect class="heat" x="{left + c * size_x:.2f}" y="{y}" width="{max(size_x - 1, 0.5):.2f}" '
                f'height="{size_y - 2}" style="opacity:{0.06 + 0.94 * strength:.3f}">'
                f"<title>{escape(name)}, expert {c}: {value:.1%}</title></rect>"
            )
    for c in range(0, num_columns, max(1, math.ceil(num_columns / 16))):
        x = left + (c + 0.5) * size_x
        parts.append(f'<text class="tick" x="{x:.1f}" y="{height - 10}" text-anchor="middle">{c}</text>')
    said = "; ".join(f"{name}: largest share {max(values):.1%}" for name, values in rows)
    return _svg("Share of routed tokens by expert (columns) and modality (rows)", said, parts, height)


def axis_number(value: float, scale: str) -> str:
    return f"{value:.1%}".replace(".0%", "%") if scale == "share" else short_number(value)


def short_number(value: float) -> str:
    """A figure short enough for an axis: 1.2M, 35k, 0.034, 2e-5."""
    size = abs(value)
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            scaled = value / {"G": 1e9, "M": 1e6, "k": 1e3}[letter]
            return f"{scaled:.3g}{letter}"
    if size == 0:
        return "0"
    if size < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.4g}"


class _Scale:
    """Data to pixels, linear or logarithmic."""

    def __init__(self, low: float, high: float, start: float, end: float, *, log: bool = False) -> None:
        self.low, self.high, self.start, self.end, self.log = low, high, start, end, log

    def __call__(self, value: float) -> float:
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        value = math.log10(value) if self.log else value
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, wanted: int) -> list[float]:
        if self.log and self.high / self.low >= 10:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            every = max(1, math.ceil((last - first + 1) / wanted))
            decades = [10.0**k for k in range(first, last + 1, every)]
            if len(decades) > 1:
                return decades
        span = (self.high - self.low) / wanted
        power = 10 ** math.floor(math.log10(span))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= span)
        first = math.ceil(self.low / step - 1e-9)
        return [k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _svg(title: str, said: str, parts: Sequence[str], height: int) -> Markup:
    return Markup(
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}: {escape(said)}">'
        f"{''.join(parts)}</svg>"
    )


def _stage_bands(stages: Sequence[Span], scale: _Scale) -> str:
    if len(stages) < 2:
        return ""
    parts = []
    for place, stage in enumerate(stages):
        a = scale(stage.first) if place else LEFT
        b = scale(stages[place + 1].first) if place + 1 < len(stages) else WIDTH - RIGHT
        parts.append(
            f'<rect class="band c{place % STAGE_COLOURS}" x="{a:.1f}" y="{TOP}" width="{max(b - a, 0):.1f}" '
            f'height="{HEIGHT - BOTTOM - TOP}"/>'
            f'<text class="stage c{place % STAGE_COLOURS}" x="{a + 4:.1f}" y="{TOP - 8}">'
            f"{escape(_fitting(stage.name, b - a))}</text>"
        )
    return "".join(parts)


def _fitting(name: str, width: float, letter_px: float = 6.6) -> str:
    room = int(width / letter_px)
    return name if len(name) <= room else (name[: room - 1] + "…" if room > 3 else "")


def _grid_y(scale: _Scale, kind: str) -> str:
    parts = []
    for tick in scale.ticks(5):
        y = scale(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{axis_number(tick, kind)}</text>'
        )
    return "".join(parts)


def _axis_x(scale: _Scale) -> str:
    ticks = [tick for tick in scale.ticks(5) if tick == int(tick)]
    y = HEIGHT - BOTTOM
    texts = "".join(
        f'<text class="tick" x="{scale(tick):.1f}" y="{y + 16}" '
        f'text-anchor="{"end" if scale(tick) > WIDTH - RIGHT - 12 else "middle"}">{short_number(tick)}</text>'
        for tick in ticks
    )
    return (
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>{texts}'
        f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">step</text>'
    )


def _curve(line: Line, place: int, stages: Sequence[Span], scale_x: _Scale, scale_y: _Scale) -> list[str]:
    """The curve cut at the beginnings of stages, each part in its stage's colour."""
    parts = []
    for number_, stage in enumerate(stages):
        end = stages[number_ + 1].first if number_ + 1 < len(stages) else math.inf
        inside = [i for i, x in enumerate(line.series.xs) if stage.first <= x < end]
        if not inside:
            continue
        colour = f"c{(number_ if place == 0 else place + len(stages)) % STAGE_COLOURS}"
        xs = [scale_x(line.series.xs[i]) for i in inside]
        if line.series.lows:
            upper = [f"{x:.1f} {scale_y(line.series.highs[i]):.1f}" for x, i in zip(xs, inside)]
            lower = [f"{x:.1f} {scale_y(line.series.lows[i]):.1f}" for x, i in zip(xs, inside)]
            parts.append(f'<path class="spread {colour}" d="M{" L".join(upper + lower[::-1])}Z"/>')
        path = " L".join(f"{x:.1f} {scale_y(line.series.ys[i]):.1f}" for x, i in zip(xs, inside))
        parts.append(f'<path class="curve {colour}" d="M{path}"/>')
    return parts


def _marks(line: Line, scale_x: _Scale, scale_y: _Scale, kind: str) -> list[str]:
    places = [(scale_x(x), scale_y(y), y) for x, y in zip(line.series.xs, line.series.ys)]
    path = " L".join(f"{x:.1f} {y:.1f}" for x, y, _ in places)
    marks = "".join(
        f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="3">'
        f"<title>{escape(line.name)} {axis_number(value, kind)}</title></circle>"
        for x, y, value in places
    )
    return [f'<path class="thin" d="M{path}"/>{marks}']


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 1, high + 1)


def _padded(values: Sequence[float], log: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        return low / 1.15, high * 1.15
    if high == low:
        return low - abs(low) * 0.1 - 1e-12, high + abs(high) * 0.1 + 1e-12
    padding = 0.06 * (high - low)
    return (max(0.0, low - padding) if low >= 0 else low - padding), high + padding
