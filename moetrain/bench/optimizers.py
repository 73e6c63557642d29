"""Muon beside AdamW at equal tokens, and the largest attention logit with and without QK-Clip.

Every run has the same initial weights, tokens and order of tokens; its optimizer, learning rate and threshold differ.
Each optimizer is given a sweep of rates and stands for itself with its best one.
"""

import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from rich.table import Table

from moetrain.bench.step import take_step
from moetrain.data.build import Data
from moetrain.errors import DivergenceError
from moetrain.files import write_json
from moetrain.optim.config import OptimConfig, OptimizerName
from moetrain.report.plots import Line, line_chart, moving_average
from moetrain.report.style import STYLE
from moetrain.train.stages import Sections, engine_of
from moetrain.train.validate import validate

_log = logging.getLogger(__name__)

_WINDOW = 8
"""Steps that a smoothed training loss averages."""
_VALIDATION = "validation/"


@dataclass(kw_only=True)
class OptimizerResult:
    """What a run came to.

    cross_entropy, max_logit, heads_clipped: of every step, fewer when it diverged. validation: nats a character by
    source after the last one; not a number then.
    """

    name: str
    optim: OptimConfig
    cross_entropy: list[float] = field(default_factory=list)
    max_logit: list[float] = field(default_factory=list)
    heads_clipped: list[float] = field(default_factory=list)
    validation: dict[str, float] = field(default_factory=dict)

    @property
    def held_out(self) -> float:
        """Mean over sources of the validation loss; what the best rate is chosen by."""
        return statistics.fmean(self.validation.values())

    def smooth(self) -> list[float]:
        """Return the training loss of each step, averaged with those shortly before it."""
        return [value for _, value in moving_average(list(enumerate(self.cross_entropy)), _WINDOW)]


@dataclass(kw_only=True)
class Comparison:
    """All runs: those of the sweep in order of rates, and the two that show the clip, without and with it."""

    sweep: list[OptimizerResult]
    unclipped: OptimizerResult
    clipped: OptimizerResult

    def best(self, name: OptimizerName) -> OptimizerResult:
        """Return the run of an optimizer with the smallest validation loss; a loss that is not finite is never it."""
        runs = [run for run in self.sweep if run.optim.name is name]
        return min(runs, key=lambda run: run.held_out if math.isfinite(run.held_out) else math.inf)

    def share_of_tokens(self) -> float:
        """Return the share of AdamW's tokens after which Muon's training loss is at AdamW's last; inf if never.

        Both at their best rates, smoothed. Muon's rate has not decayed by then, which counts against it.
        """
        goal = self.best(OptimizerName.adamw).smooth()[-1]
        ours = self.best(OptimizerName.muon).smooth()
        reached = (step for step, loss in enumerate(ours, start=1) if step >= _WINDOW and loss <= goal)
        return next(reached, math.inf) / len(ours)


def bench_optimizers(
    sections: Sections,
    rates: Mapping[OptimizerName, Sequence[float]],
    *,
    clip_rate: float,
    threshold: float,
    data: Data,
    on_step: Callable[[str], None],
) -> Comparison:
    """Train a model for each rate of each optimizer, and two with Muon at `clip_rate`, and return what each came to.

    A collective. One model is in memory at a time. on_step: called after each step with a word on it.
    """
    sweep = [
        replace(sections.optim, name=name, lr=rate, qk_clip=math.inf)
        for name, of_name in rates.items()
        for rate in of_name
    ]
    high = replace(sections.optim, name=OptimizerName.muon, lr=clip_rate)
    runs = [*sweep, replace(high, qk_clip=math.inf), replace(high, qk_clip=threshold)]
    results = [_train(replace(sections, optim=optim), data=data, on_step=on_step) for optim in runs]
    *of_sweep, unclipped, clipped = results
    return Comparison(sweep=of_sweep, unclipped=unclipped, clipped=clipped)


def _train(sections: Sections, *, data: Data, on_step: Callable[[str], None]) -> OptimizerResult:
    optim, train = sections.optim, sections.train
    clip = f", clip {optim.qk_clip:g}" if optim.qk_clip is not None and math.isfinite(optim.qk_clip) else ""
    result = OptimizerResult(name=f"{optim.name} {optim.lr:g}{clip}", optim=optim)
    engine = engine_of(sections)
    for step in range(train.steps):
        try:
            values = take_step(sections, engine=engine, data=data, step=step)
        except DivergenceError as error:  # a rate that is too high is a finding, not the end of the sweep
            _log.warning("%s: %s", result.name, error)
            result.validation = dict.fromkeys(data.validation, math.nan)
            return result
        result.cross_entropy.append(values["cross_entropy"])
        result.max_logit.append(values["max_logit"])
        result.heads_clipped.append(values["heads_clipped"])
        on_step(f"{result.name}: loss {values['cross_entropy']:.2f}")
    figures = validate(engine, data.validation, rows_per_micro_batch=train.rows_per_micro_batch)
    result.validation = {name.removeprefix(_VALIDATION): value for name, value in figures.items()}
    return result


def render(comparison: Comparison) -> Table:
    """Return the table for the terminal: a line a run, the best of each optimizer marked."""
    sources = list(comparison.unclipped.validation)
    best = [comparison.best(name) for name in dict.fromkeys(run.optim.name for run in comparison.sweep)]
    table = Table(
        "run",
        "train CE",
        *sources,
        "mean",
        "max logit",
        "clipped",
        "",
        title="optimizers: losses and attention logits at equal tokens",
    )
    for run in [*comparison.sweep, comparison.unclipped, comparison.clipped]:
        figures = [f"{run.validation[source]:.4f}" for source in sources]
        table.add_row(
            run.name,
            f"{run.smooth()[-1]:.4f}" if run.cross_entropy else "-",
            *figures,
            f"{run.held_out:.4f}",
            f"{max(run.max_logit, default=math.nan):.4g}",
            f"{sum(run.heads_clipped):.0f}",
            "best" if run in best else "",
        )
    return table


def sentence(comparison: Comparison) -> str:
    """Return what the comparison at equal tokens comes to, in words."""
    muon, adamw = comparison.best(OptimizerName.muon), comparison.best(OptimizerName.adamw)
    share = comparison.share_of_tokens()
    reached = f"after {100 * share:.0f} % of the tokens" if math.isfinite(share) else "nowhere in the run"
    return (
        f"best of each, mean of sources: {muon.name} {muon.held_out:.4f}, {adamw.name} {adamw.held_out:.4f} nats a "
        f"character; Muon's training loss is at AdamW's last one {reached}"
    )


def write_results(path: Path, comparison: Comparison, *, context: Mapping[str, float]) -> None:
    """Write all of it as JSON, the losses and logits of every step included; null for what is not a finite number."""
    runs = [*comparison.sweep, comparison.unclipped, comparison.clipped]
    rows = [{**asdict(run), "held_out": run.held_out} for run in runs]
    content = {**context, "share_of_tokens": comparison.share_of_tokens(), "runs": rows}
    write_json(path, content)


def picture(comparison: Comparison) -> str:
    """Return a page with three charts: the sweep, the losses of the best runs, the logits with and without the clip."""
    names = list(dict.fromkeys(run.optim.name for run in comparison.sweep))
    by_rate, losses = [], []
    for color, name in enumerate(names):
        runs = [run for run in comparison.sweep if run.optim.name is name and math.isfinite(run.held_out)]
        points = sorted((math.log10(run.optim.lr), run.held_out) for run in runs)
        by_rate.append(Line(name=name.value, points=points, color=color))
        best = comparison.best(name)
        losses.append(Line(name=best.name, points=_over_steps(best.smooth()), color=color))
    clipped, unclipped = comparison.clipped, comparison.unclipped
    logits = [
        Line(name=unclipped.name, points=_over_steps(unclipped.max_logit), color=0),
        Line(name=clipped.name, points=_over_steps(clipped.max_logit), color=1, level=clipped.optim.qk_clip),
    ]
    charts = [
        line_chart("Validation loss by rate", by_rate, x_name="log10 of the rate", y_name="nats a character"),
        line_chart("Training loss at the best rates", losses, x_name="step", y_name="nats a token"),
        line_chart(
            "Largest attention logit", logits, x_name="step", y_name="softmax input; dashed: threshold", from_zero=True
        ),
    ]
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>Optimizers</title>'
        f'<style>{STYLE}</style><main><h1>Optimizers</h1><div class="charts">{"".join(charts)}</div></main></html>\n'
    )


def _over_steps(values: Sequence[float]) -> list[tuple[float, float]]:
    return [(float(step), value) for step, value in enumerate(values, start=1)]
