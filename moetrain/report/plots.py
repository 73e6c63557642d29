"""Charts as inline SVG without scripts or files, coloured by the page's style sheet so that they follow dark mode.

There are three kinds: lines over steps, rates with intervals by category, and grids with one row per series (a layer,
or a number of calls). All strings are escaped.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 440, 256
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 10, 42
MAX_POINTS = 240
"""Largest number of points of a line; neighbours are averaged to reach it."""
NUM_COLORS = 6
"""Number of line colours in the style sheet, `--c0` and up."""
_MIN_TICKS = 4


@dataclass(kw_only=True)
class Line:
    """A line of a chart. points: (x, y), ascending in x. color: index into the palette. level: y of a dashed line."""

    name: str
    points: list[tuple[float, float]]
    color: int
    level: float | None = None
    is_faint: bool = False


@dataclass(kw_only=True)
class Rates:
    """Rates by category, as (value, low, high) between 0 and 1."""

    name: str
    rates: dict[str, tuple[float, float, float]]
    color: int


@dataclass(frozen=True, kw_only=True)
class _Scale:
    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """Return the coordinate of a value on the canvas."""
        return self.start + (value - self.low) / ((self.high - self.low) or 1.0) * (self.end - self.start)


def line_chart(title: str, lines: Sequence[Line], *, x_name: str, y_name: str, from_zero: bool = False) -> str:
    """Return lines over steps, without values that are not finite; empty when there is no finite point."""
    shown = [(line, _thinned([point for point in line.points if math.isfinite(point[1])])) for line in lines]
    shown = [(line, points) for line, points in shown if points]
    if not shown:
        return ""
    values = [value for _, points in shown for _, value in points]
    values += [line.level for line, _ in shown if line.level is not None] + ([0.0] if from_zero else [])
    steps = [step for _, points in shown for step, _ in points]
    x = _Scale(low=min(steps), high=max(steps), start=_LEFT, end=WIDTH - _RIGHT)
    y_ticks = ticks(min(values), max(values) or 1.0 if from_zero else max(values))
    y = _Scale(low=y_ticks[0], high=y_ticks[-1], start=HEIGHT - _BOTTOM, end=_TOP)
    parts = [*_y_axis(y, y_ticks), *_x_axis(x, [tick for tick in ticks(x.low, x.high) if x.low <= tick <= x.high])]
    for line, points in shown:
        if line.level is not None:
            place = y.at(line.level)
            parts.append(f'<path class="s{line.color} level" d="M{_LEFT} {place:.1f}H{WIDTH - _RIGHT}"/>')
        path = "L".join(f"{x.at(step):.1f} {y.at(value):.1f}" for step, value in points)
        look = f"s{line.color}" + (" faint" if line.is_faint else "")
        if len(points) == 1:
            parts.append(_dot(x.at(points[0][0]), y.at(points[0][1]), color=line.color, tooltip=line.name))
        parts.append(f'<path class="{look}" d="M{path}"><title>{escape(line.name)}</title></path>')
    keys = [(line.color, line.name) for line, _ in shown if not line.is_faint]
    return _figure(title, parts, keys=keys, x_name=x_name, y_name=y_name)


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What a chart of rates counts. factor: of a rate of 1. top: the end of the axis; None chooses it by the values."""

    name: str
    short: str
    factor: float
    top: float | None = None


PERCENT = Unit(name="% right", short="%", factor=100, top=100)
PER_1000_CALLS = Unit(name="errors per 1,000 calls", short="per 1,000", factor=1000)


def rate_chart(title: str, series: Sequence[Rates], *, x_name: str, unit: Unit = PERCENT) -> str:
    """Return rates with their intervals, side by side in each category; empty when there are none."""
    categories = list(dict.fromkeys(name for one in series for name in one.rates))
    if not categories:
        return ""
    most = unit.top or unit.factor * max(high for one in series for _, _, high in one.rates.values())
    marks = ticks(0.0, most)
    y = _Scale(low=0.0, high=marks[-1], start=HEIGHT - _BOTTOM, end=_TOP)
    slot = (WIDTH - _LEFT - _RIGHT) / len(categories)
    apart = min(14.0, slot * 0.7 / max(len(series), 1))
    parts = _y_axis(y, marks)
    for place, category in enumerate(categories):
        centre = _LEFT + (place + 0.5) * slot
        parts.append(_text(centre, HEIGHT - _BOTTOM + 16, category, anchor="middle"))
        for number, one in enumerate(series):
            if category not in one.rates:
                continue
            value, low, high = (unit.factor * share for share in one.rates[category])
            at = centre + (number - (len(series) - 1) / 2) * apart
            tooltip = f"{one.name}, {category}: {value:.3g} {unit.short} [{low:.3g}, {high:.3g}]"
            parts.append(f'<path class="s{one.color} bar" d="M{at:.1f} {y.at(low):.1f}V{y.at(high):.1f}"/>')
            parts.append(_dot(at, y.at(value), color=one.color, tooltip=tooltip))
    keys = [(one.color, one.name) for one in series if one.rates]
    return _figure(title, parts, keys=keys, x_name=x_name, y_name=unit.name)


def grid_chart(
    title: str, rows: Sequence[tuple[str, list[tuple[float, float]]]], *, low: float, high: float, unit: str
) -> str:
    """Return a grid with a row per series and a column per range of steps.

    The opacity of a cell shows the mean of its values, from `low` (faint) to `high` (full). Empty when there are none.
    """
    shown = [(name, [point for point in points if math.isfinite(point[1])]) for name, points in rows]
    shown = [(name, points) for name, points in shown if points]
    if not shown:
        return ""
    steps = [step for _, points in shown for step, _ in points]
    first, last = min(steps), max(steps)
    columns = max(1, min(24, len(set(steps))))
    left = 12 + 6.6 * max(len(name) for name, _ in shown)
    cell = max(6.0, min(22.0, 190 / len(shown)))
    x = _Scale(low=first, high=last, start=left, end=WIDTH - _RIGHT)
    width, parts = (WIDTH - _RIGHT - left) / columns, []
    for number, (name, points) in enumerate(shown):
        top = _TOP + number * cell
        if cell >= 11 or number % 4 == 0:
            parts.append(_text(left - 6, top + cell / 2 + 4, name, anchor="end"))
        bins: dict[int, list[float]] = {}
        for step, value in points:
            column = min(columns - 1, int((step - first) / ((last - first) or 1.0) * columns))
            bins.setdefault(column, []).append(value)
        for column, values in sorted(bins.items()):
            mean = sum(values) / len(values)
            depth = min(1.0, max(0.0, (mean - low) / ((high - low) or 1.0)))
            tooltip = f"{name}, about step {first + (column + 0.5) * (last - first) / columns:.0f}: {mean:.3g}{unit}"
            parts.append(
                f'<rect class="cell" x="{left + column * width:.1f}" y="{top:.1f}" width="{max(width - 1, 1):.1f}" '
                f'height="{cell - 1:.1f}" fill-opacity="{0.06 + 0.94 * depth:.2f}">'
                f"<title>{escape(tooltip)}</title></rect>"
            )
    bottom = _TOP + len(shown) * cell
    parts += [
        _text(x.at(tick), bottom + 14, _number_text(tick), anchor="middle")
        for tick in ticks(first, last)
        if first <= tick <= last
    ]
    note = f"faint {_number_text(low)}{unit}, full {_number_text(high)}{unit}"
    return _figure(title, parts, keys=[], x_name="step", y_name=note, height=bottom + 38)


def moving_average(points: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """Return the mean of each point and up to `window - 1` points before it."""
    return [
        (step, sum(value for _, value in points[max(0, end - window + 1) : end + 1]) / min(window, end + 1))
        for end, (step, _) in enumerate(points)
    ]


def ticks(low: float, high: float) -> list[float]:
    """Return 4 to 9 round numbers in even steps, from at most `low` to at least `high`."""
    if high - low < 1e-12 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / _MIN_TICKS
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (5.0, 2.5, 2.0, 1.0) if factor * power <= raw * (1 + 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most `MAX_POINTS` points, each the mean of the same number of neighbours."""
    size = -(-len(points) // MAX_POINTS)
    if size <= 1:
        return points
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]


def _figure(
    title: str,
    parts: Sequence[str],
    *,
    keys: Sequence[tuple[int, str]],
    x_name: str,
    y_name: str,
    height: float = HEIGHT,
) -> str:
    legend = "".join(
        '<li><svg class="key" viewBox="0 0 18 8" aria-hidden="true">'
        f'<path class="s{color}" d="M0 4H18"/></svg>{escape(name)}</li>'
        for color, name in keys
    )
    axis = _text((_LEFT + WIDTH - _RIGHT) / 2, height - 6, x_name, anchor="middle")
    return (
        f'<figure><figcaption><b>{escape(title)}</b> <span class="dim">{escape(y_name)}</span></figcaption>'
        + (f'<ul class="legend">{legend}</ul>' if len(keys) > 1 else "")
        + f'<svg class="chart" role="img" aria-label="{escape(title)}" viewBox="0 0 {WIDTH} {height:.0f}">'
        + "".join(parts)
        + axis
        + "</svg></figure>\n"
    )


def _y_axis(scale: _Scale, marks: Sequence[float]) -> list[str]:
    parts = []
    for mark in marks:
        parts.append(f'<path class="rule" d="M{_LEFT} {scale.at(mark):.1f}H{WIDTH - _RIGHT}"/>')
        parts.append(_text(_LEFT - 6, scale.at(mark) + 4, _number_text(mark), anchor="end"))
    return parts


def _x_axis(scale: _Scale, marks: Sequence[float]) -> Iterator[str]:
    for mark in marks:
        yield _text(scale.at(mark), HEIGHT - _BOTTOM + 16, _number_text(mark), anchor="middle")


def _dot(x: float, y: float, *, color: int, tooltip: str) -> str:
    return f'<circle class="d{color}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{escape(tooltip)}</title></circle>'


def _text(x: float, y: float, text: str, *, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _number_text(value: float) -> str:
    """Return the label of a number on an axis, such as `20k` for 20000."""
    if abs(value) >= 10_000 and value % 1000 == 0:
        return f"{value / 1000:g}k"
    return f"{value:.6g}"
