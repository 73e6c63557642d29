"""The charts of a run: learning, RL, expert load, success by number of calls. A chart without data is empty."""

from collections.abc import Sequence
from typing import Any

from moetrain.report.numbers import LONGER, VOTED, main_modes, mode_title
from moetrain.report.plots import (
    NUM_COLORS,
    PER_1000_CALLS,
    Line,
    Rates,
    grid_chart,
    line_chart,
    moving_average,
    rate_chart,
)
from moetrain.report.stages import Run, Stage

_WINDOW = 8
"""Number of steps in the moving average of a noisy metric."""
_VALIDATION = "validation/"
_MAXVIO = "maxvio/"
_CALLS = "success/calls_"
_ERROR = "error"
"""Category of tasks in which a tool failed without a fault of the model."""


def learning_charts(stage: Stage) -> str:
    """Return the charts of a stage that reads documents: loss, and validation by source beside the bigram model."""
    loss = "cross_entropy" if stage.values("cross_entropy") else "loss"
    bigram = {
        source: row.get("bigram_nats_per_character") for source, row in stage.summary.get("validation", {}).items()
    }
    lines = [
        Line(
            name=name.removeprefix(_VALIDATION),
            points=stage.values(name),
            color=number % NUM_COLORS,
            level=bigram.get(name.removeprefix(_VALIDATION)),
        )
        for number, name in enumerate(stage.metric_names(_VALIDATION))
    ]
    return line_chart(
        f"{stage.name}: training loss", _smooth(stage, loss, color=0), x_name="step", y_name="nats per token"
    ) + line_chart(
        f"{stage.name}: validation, by source", lines, x_name="step", y_name="nats per character; dashed: bigram"
    )


def optimizer_charts(stage: Stage) -> str:
    """Return the charts of gradient norm, learning rate, and the largest attention logit if it was measured."""
    norm = line_chart(
        f"{stage.name}: gradient norm", _smooth(stage, "grad_norm", color=3), x_name="step", y_name="before clipping"
    )
    rate = [Line(name="learning rate", points=stage.values("lr"), color=5)]
    logit = [Line(name="largest attention logit", points=stage.values("max_logit"), color=4)]
    return "".join(
        [
            norm,
            line_chart(f"{stage.name}: learning rate", rate, x_name="step", y_name="", from_zero=True),
            line_chart(f"{stage.name}: largest attention logit", logit, x_name="step", y_name="softmax input"),
        ]
    )


def rl_charts(stage: Stage) -> str:
    """Return the charts of an RL stage: reward, success, endings, groups with a signal, entropy and logprob gap."""
    names = [name for name in stage.metric_names(_CALLS) if name.removeprefix(_CALLS).isdecimal()]
    by_calls = sorted(names, key=lambda name: int(name.removeprefix(_CALLS)))
    after_error = _smooth(stage, "success/after_tool_error", color=1)
    endings = [
        Line(name=name.removeprefix("ending/").replace("_", " "), points=_averaged(stage, name), color=0)
        for name in stage.metric_names("ending/")
        if any(value for _, value in stage.values(name))
    ]
    for number, line in enumerate(endings):
        line.color = number % NUM_COLORS
    averaging_note = f"bold: mean of the last {_WINDOW} steps"
    return "".join(
        [
            line_chart(
                f"{stage.name}: reward",
                _smooth(stage, "reward", color=1),
                x_name="step",
                y_name=f"share right, sampled on training tasks; {averaging_note}",
                from_zero=True,
            ),
            grid_chart(
                f"{stage.name}: success by tool calls needed",
                [(f"{name.removeprefix(_CALLS)} calls", stage.values(name)) for name in by_calls],
                low=0.0,
                high=1.0,
                unit="",
            ),
            line_chart(
                f"{stage.name}: success after a tool error",
                after_error,
                x_name="step",
                y_name=averaging_note,
                from_zero=True,
            ),
            line_chart(f"{stage.name}: how trajectories end", endings, x_name="step", y_name="share", from_zero=True),
            line_chart(
                f"{stage.name}: groups with a signal",
                _smooth(stage, "groups_with_signal", color=2),
                x_name="step",
                y_name="share of groups neither all right nor all wrong",
                from_zero=True,
            ),
            line_chart(
                f"{stage.name}: entropy of the policy",
                _smooth(stage, "entropy", color=3),
                x_name="step",
                y_name="nats per token",
            ),
            line_chart(
                f"{stage.name}: rollout against training",
                _smooth(stage, "logprob_gap", color=4),
                x_name="step",
                y_name="mean gap of logprobs, nats",
            ),
        ]
    )


def load_charts(stage: Stage) -> str:
    """Return the charts of expert load, range of the balance bias, idle experts and router entropy."""
    names = stage.metric_names(_MAXVIO)
    rows = [(_layer(name), stage.values(name)) for name in names]
    highest = max((value for _, points in rows for _, value in points), default=1.0)
    return "".join(
        [
            line_chart(
                f"{stage.name}: MaxVio, mean of layers",
                [*_smooth(stage, "maxvio", color=0), *_smooth(stage, "maxvio_micro", color=1)],
                x_name="step",
                y_name="largest load over mean load, minus 1",
                from_zero=True,
            ),
            grid_chart(f"{stage.name}: MaxVio by layer", rows, low=0.0, high=round(highest, 2), unit=""),
            line_chart(
                f"{stage.name}: load variation, mean of layers",
                _smooth(stage, "load_variation", color=3),
                x_name="step",
                y_name="standard deviation over mean",
                from_zero=True,
            ),
            line_chart(
                f"{stage.name}: range of the balance bias, mean of layers",
                [Line(name="bias range", points=stage.values("bias_range"), color=5)],
                x_name="step",
                y_name="largest minus smallest",
                from_zero=True,
            ),
            line_chart(
                f"{stage.name}: idle experts",
                [Line(name="idle experts", points=stage.values("dead_experts"), color=4)],
                x_name="step",
                y_name="in all layers",
                from_zero=True,
            ),
            line_chart(
                f"{stage.name}: router entropy",
                _smooth(stage, "router_entropy", color=2),
                x_name="step",
                y_name="nats",
            ),
        ]
    )


def success_charts(run: Run) -> str:
    """Return one chart per mode: success by number of calls, for all evaluations."""
    modes = list(dict.fromkeys(mode for stage in run.evaluations for mode in [*main_modes(stage), LONGER, VOTED]))
    charts = []
    for mode in modes:
        series = [
            Rates(name=f"after {stage.weights}", rates=_rates(stage.evaluation["modes"].get(mode)), color=number)
            for number, stage in enumerate(run.evaluations)
        ]
        has_errors = any(_ERROR in one.rates for one in series)
        x_name = "tool calls needed" + ("; error: tasks in which a tool failed" if has_errors else "")
        charts.append(rate_chart(f"Held-out success, {mode_title(mode)}", series, x_name=x_name))
    return "".join(charts)


def hazard_chart(run: Run) -> str:
    """Return one chart per mode: first errors per call by range of calls, of evaluations that measure progress."""
    charts = []
    for mode in dict.fromkeys(mode for stage in run.evaluations for mode in stage.evaluation["modes"]):
        series = [
            Rates(name=f"after {stage.weights}", rates=_hazards(stage.evaluation["modes"].get(mode)), color=number)
            for number, stage in enumerate(run.evaluations)
        ]
        charts.append(rate_chart(f"First errors, {mode_title(mode)}", series, x_name="call", unit=PER_1000_CALLS))
    return "".join(charts)


def _hazards(summary: dict[str, Any] | None) -> dict[str, tuple[float, float, float]]:
    rows = [] if summary is None else [row for row in summary.get("hazard", []) if row["to"] is not None]
    return {f"{row['from']}-{row['to']}": (row["value"], row["low"], row["high"]) for row in rows}


def _rates(summary: dict[str, Any] | None) -> dict[str, tuple[float, float, float]]:
    if summary is None:
        return {}
    rows = sorted(summary["by_calls"].items(), key=lambda row: int(row[0]))
    rows += [(_ERROR, summary["after_tool_error"])] if "after_tool_error" in summary else []
    return {calls: (rate["value"], rate["low"], rate["high"]) for calls, rate in rows if rate["count"]}


def _smooth(stage: Stage, name: str, *, color: int) -> Sequence[Line]:
    """Return two lines: the metric of each step, drawn faint, and its moving average."""
    points = stage.values(name)
    smooth = Line(name=name.replace("_", " "), points=_averaged(stage, name), color=color)
    return [Line(name=f"{name}, each step", points=points, color=color, is_faint=True), smooth]


def _averaged(stage: Stage, name: str) -> list[tuple[float, float]]:
    return moving_average(stage.values(name), _WINDOW)


def _layer(name: str) -> str:
    """Return the label of a layer, from the name of its module."""
    numbers = [part for part in name.split(".") if part.isdigit()]
    return f"layer {numbers[0]}" if numbers else name.removeprefix(_MAXVIO)
