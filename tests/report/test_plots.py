import itertools
import math
import random
import xml.etree.ElementTree as ElementTree

import pytest

from moetrain.report.plots import (
    MAX_POINTS,
    PER_1000_CALLS,
    Line,
    Rates,
    grid_chart,
    line_chart,
    moving_average,
    rate_chart,
    ticks,
)


def parsed(figure: str) -> ElementTree.Element:
    return ElementTree.fromstring(figure)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (3.1, 6.9), (-2, 1e-3), (0, 0), (5, 5), (1e-9, 3e-9), (0, 123456)])
def test_ticks_are_few_even_and_cover_the_range(low: float, high: float) -> None:
    found = ticks(low, high)
    widths = [after - before for before, after in itertools.pairwise(found)]
    assert all(math.isclose(width, widths[0], rel_tol=1e-6) for width in widths)
    assert found[0] <= low and found[-1] >= high
    assert 4 <= len(found) <= 11


def test_a_moving_average_is_the_mean_of_what_came_before() -> None:
    rng = random.Random(0)
    points = [(float(step), rng.random()) for step in range(20)]
    for end, (step, value) in enumerate(moving_average(points, 5)):
        window = [y for x, y in points if end - 5 < x <= end]
        assert step == end and math.isclose(value, sum(window) / len(window))


def test_charts_without_numbers_are_empty() -> None:
    nothing = Line(name="a", points=[(1.0, math.nan)], color=0)
    assert line_chart("t", [nothing], x_name="step", y_name="y") == ""
    assert rate_chart("t", [Rates(name="a", rates={}, color=0)], x_name="calls") == ""
    assert grid_chart("t", [("a", [(1.0, math.inf)])], low=0, high=1, unit="") == ""


def test_a_line_stays_inside_the_canvas_and_leaves_out_what_is_not_finite() -> None:
    points = [(float(step), math.sin(step) if step % 7 else math.nan) for step in range(2000)]
    figure = parsed(line_chart("t", [Line(name="a", points=points, color=0, level=3.0)], x_name="step", y_name="y"))
    path = next(e for e in figure.iter("path") if e.get("class") == "s0" and e.get("d", "").count("L") > 1)
    places = [tuple(map(float, pair.split())) for pair in path.attrib["d"][1:].split("L")]
    assert len(places) <= MAX_POINTS
    assert all(0 <= x <= 440 and 0 <= y <= 256 for x, y in places)


def test_an_interval_is_drawn_from_its_low_to_its_high_end() -> None:
    figure = parsed(rate_chart("t", [Rates(name="a", rates={"2": (0.5, 0.25, 1.0)}, color=1)], x_name="calls"))
    bar = next(element for element in figure.iter("path") if "bar" in element.get("class", ""))
    low, high = (float(text) for text in bar.attrib["d"].split(" ")[1].split("V"))
    rules = [float(e.attrib["d"].split(" ")[1].split("H")[0]) for e in figure.iter("path") if e.get("class") == "rule"]
    assert high == rules[-1]  # 100 %
    assert math.isclose((rules[0] - low) / (rules[0] - rules[-1]), 0.25, abs_tol=1e-3)


def test_small_rates_have_an_axis_of_their_own() -> None:
    rates = Rates(name="a", rates={"0-10": (0.0004, 0.0001, 0.0012)}, color=0)
    figure = parsed(rate_chart("t", [rates], x_name="call", unit=PER_1000_CALLS))
    labels = [element.text for element in figure.iter("text")]
    assert labels[0] == "0" and float(str(labels[labels.index("0-10") - 1])) >= 1.2
    dot = next(figure.iter("circle"))
    assert "0.4 per 1,000 [0.1, 1.2]" in "".join(dot.itertext())
    bar = next(element for element in figure.iter("path") if "bar" in element.get("class", ""))
    low, high = (float(text) for text in bar.attrib["d"].split(" ")[1].split("V"))
    assert 10 <= high < float(dot.attrib["cy"]) < low


def test_names_cannot_leave_their_place() -> None:
    name = '"><script>&'
    line = Line(name=name, points=[(0.0, 1.0), (1.0, 2.0)], color=0)
    rates = Rates(name=name, rates={name: (0.5, 0.4, 0.6)}, color=0)
    for figure in (
        line_chart(name, [line, line], x_name=name, y_name=name),
        rate_chart(name, [rates, rates], x_name=name),
        grid_chart(name, [(name, [(0.0, 1.0)])], low=0, high=1, unit=name),
    ):
        assert "<script" not in figure
        assert all(element.tag != "script" for element in parsed(figure).iter())


def test_a_grid_has_a_cell_for_each_mean_and_none_where_nothing_was_measured() -> None:
    figure = parsed(grid_chart("t", [("a", [(0.0, 0.0), (1.0, 1.0)]), ("b", [(1.0, 0.5)])], low=0, high=1, unit=""))
    opacities = [float(cell.attrib["fill-opacity"]) for cell in figure.iter("rect")]
    assert opacities == [0.06, 1.0, 0.53]
