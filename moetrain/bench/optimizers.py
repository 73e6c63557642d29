"""Compares Muon with AdamW on equal tokens, and the largest attention logit with and without QK-Clip.

All runs have the same initial weights, tokens and order of tokens; optimizer, learning rate and threshold differ. Each
optimizer is trained at several learning rates, and the best one is compared.
"""

import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from rich.table import Table

from moetrain.data.build import Data
from moetrain.errors import DivergenceError
from moetrain.files import write_result
from moetrain.optim.config import OptimConfig, OptimizerName
from moetrain.report.plots import Line, line_chart, moving_average
from moetrain.report.style import STYLE
from moetrain.train.document_stage import take_document_step
from moetrain.train.stages import Sections, document_stage_of, engine_of
from moetrain.train.validate import validate

_log = logging.getLogger(__name__)

_WINDOW = 8
"""Number of steps in the moving average of the training loss."""
_VALIDATION = "validation/"


@dataclass(kw_only=True)
class OptimizerResult:
    """Results of one run.

    cross_entropy, max_logit, heads_clipped: one value per step, up to the step at which the run diverged. validation:
    nats per character by source after the last step; NaN if the run diverged.
    """

    name: str
    optim: OptimConfig
    cross_entropy: list[float] = field(default_factory=list)
    max_logit: list[float] = field(default_factory=list)
    heads_clipped: list[float] = field(default_factory=list)
    validation: dict[str, float] = field(default_factory=dict)

    @property
    def held_out(self) -> float:
        """Mean validation loss over sources, by which the best rate is chosen."""
        return statistics.fmean(self.validation.values())

    def smooth(self) -> list[float]:
        """Return the moving average of the training loss at each step, over the last `_WINDOW` steps."""
        return [value for _, value in moving_average(list(enumerate(self.cross_entropy)), _WINDOW)]


@dataclass(kw_only=True)
class Comparison:
    """All runs: the sweep over rates, and the two high-rate runs without and with QK-Clip."""

    sweep: list[OptimizerResult]
    unclipped: OptimizerResult
    clipped: OptimizerResult

    def best(self, name: OptimizerName) -> OptimizerResult:
        """Return the run of an optimizer with the smallest validation loss; a non-finite loss counts as infinite."""
        runs = [run for run in self.sweep if run.optim.name is name]
        return min(runs, key=lambda run: run.held_out if math.isfinite(run.held_out) else math.inf)

    def share_of_tokens(self) -> float:
        """Return the share of AdamW's tokens after which Muon reaches AdamW's final training loss; inf if never.

        Both losses are smoothed and at the best rates. Muon's rate has not decayed at that point, which puts Muon at a
        disadvantage.
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
    """Train a model for each rate of each optimizer, and two with Muon at `clip_rate`; return all results. Collective.

    Only one model is in memory at a time. threshold: QK-Clip's in the second run at `clip_rate`. on_step: called after
    each step with a short note.
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
    stage = document_stage_of(sections, engine=engine, data=data, peak_flops=math.inf)
    for step in range(train.steps):
        try:
            values = take_document_step(stage, train, step=step)
        except DivergenceError as error:  # divergence at a high rate is a result of the sweep
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
    """Return the table for the terminal, with one line per run. The best run of each optimizer is marked."""
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
    """Return a sentence with the best losses and the share of tokens that Muon needs."""
    muon, adamw = comparison.best(OptimizerName.muon), comparison.best(OptimizerName.adamw)
    share = comparison.share_of_tokens()
    reached = (
        f"reaches AdamW's final one after {100 * share:.0f} % of the tokens"
        if math.isfinite(share)
        else "never reaches AdamW's final one"
    )
    return (
        f"best runs, mean over sources: {muon.name} {muon.held_out:.4f}, {adamw.name} {adamw.held_out:.4f} nats per "
        f"character; Muon's training loss {reached}"
    )


def write_results(path: Path, comparison: Comparison, *, context: Mapping[str, float]) -> None:
    """Write `context` and all results as JSON, including losses and logits of every step; non-finite values as null."""
    runs = [*comparison.sweep, comparison.unclipped, comparison.clipped]
    rows = [{**asdict(run), "held_out": run.held_out} for run in runs]
    content = {**context, "share_of_tokens": comparison.share_of_tokens(), "runs": rows}
    write_result(path, content)


def picture(comparison: Comparison) -> str:
    """Return an HTML page with three charts: validation loss by rate, loss of the best runs, logits with QK-Clip."""
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
        line_chart("Validation loss by rate", by_rate, x_name="log10 of the rate", y_name="nats per character"),
        line_chart("Training loss at the best rates", losses, x_name="step", y_name="nats per token"),
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
