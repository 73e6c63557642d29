"""Compares load-balancing methods: same initial weights, tokens and order of tokens, a different `model.balance` each.

The methods take their steps in turn, so that other load on the machine affects all of them alike. Shape letters: L
layers with experts, E experts.
"""

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from rich.table import Table

from moetrain.data.build import Data
from moetrain.files import write_result
from moetrain.log import TIME_PREFIX
from moetrain.model.config import BalanceConfig
from moetrain.parallel.protocol import Engine
from moetrain.train.document_stage import take_document_step
from moetrain.train.expert_load import count_loads, violations
from moetrain.train.rows import rank_rows, split_rows
from moetrain.train.stages import Sections, document_stage_of, engine_of
from moetrain.train.validate import validate

LOADS = ("maxvio", "maxvio_micro", "load_variation", "dead_experts", "router_entropy", "bias_range")
"""Step metrics whose mean over the last steps is shown, together with `cross_entropy`."""


@dataclass(kw_only=True)
class MethodResult:
    """Results of one method.

    figures: means over the last steps of `LOADS` and `cross_entropy`; `maxvio_held_out` and `validation/<source>` after
    the last step. maxvio: value at every step. seconds: duration of every step.
    """

    name: str
    balance: BalanceConfig
    figures: dict[str, float] = field(default_factory=dict)
    maxvio: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def time_ratios(self, first: "MethodResult") -> tuple[float, float, float]:
        """Return (median, lower quartile, upper quartile) of the ratio of step times to those of `first`."""
        ratios = [mine / other for mine, other in zip(self.seconds, first.seconds, strict=True)]
        if len(ratios) < 2:
            return ratios[0], ratios[0], ratios[0]
        low, median, high = statistics.quantiles(ratios, n=4)
        return median, low, high


def bench_balance(
    sections: Sections,
    methods: Mapping[str, BalanceConfig],
    *,
    data: Data,
    tail_share: float,
    on_step: Callable[[str], None],
) -> list[MethodResult]:
    """Train one model per method for `sections.train.steps` steps; return the results per method. Collective.

    on_step: called with a short note after all methods have taken a step.
    """
    train = sections.train
    runs = {
        name: replace(sections, model=replace(sections.model, balance=balance)) for name, balance in methods.items()
    }
    engines = {name: engine_of(run) for name, run in runs.items()}
    stages_by_name = {
        name: document_stage_of(runs[name], engine=engine, data=data, peak_flops=math.inf)
        for name, engine in engines.items()
    }
    results = {name: MethodResult(name=name, balance=balance) for name, balance in methods.items()}
    history: dict[str, list[dict[str, float]]] = {name: [] for name in methods}
    for step in range(train.steps):
        for name, stage in stages_by_name.items():
            values = take_document_step(stage, train, step=step)
            history[name].append(values)
            results[name].maxvio.append(values["maxvio"])
            results[name].seconds.append(values[TIME_PREFIX + "seconds"])
        on_step(", ".join(f"{name} {result.maxvio[-1]:.2f}" for name, result in list(results.items())[:4]))
    num_last = max(1, round(tail_share * train.steps))
    for name, engine in engines.items():
        for key in (*LOADS, "cross_entropy"):
            results[name].figures[key] = statistics.fmean(values[key] for values in history[name][-num_last:])
        results[name].figures["maxvio_held_out"] = _held_out_violation(sections, engine=engine, data=data)
        results[name].figures |= validate(engine, data.validation, rows_per_micro_batch=train.rows_per_micro_batch)
    return list(results.values())


def _held_out_violation(sections: Sections, *, engine: Engine, data: Data) -> float:
    """Return MaxVio, averaged over layers, of the load over all validation rows, which never updated the bias."""
    topology = engine.topology
    loads_LE = torch.zeros((), dtype=torch.int64)
    for source in data.validation.values():
        rows = rank_rows(source.batch, rank=topology.rank, world_size=topology.world_size)
        loads_LE = loads_LE + count_loads(engine, split_rows(rows, rows=sections.train.rows_per_micro_batch)).cpu()
    return float(violations(loads_LE).mean())


def render(results: list[MethodResult]) -> Table:
    """Return the table for the terminal, with one line per method. Times are relative to the first method."""
    sources = [key for key in results[0].figures if key.startswith("validation/")]
    columns = {
        "MaxVio": "maxvio",
        "micro-batch": "maxvio_micro",
        "held out": "maxvio_held_out",
        "variation": "load_variation",
        "dead": "dead_experts",
        "entropy": "router_entropy",
        "bias range": "bias_range",
        "train CE": "cross_entropy",
        **{key.removeprefix("validation/"): key for key in sources},
    }
    table = Table("method", *columns, "time per step", title="balance: loads and losses at equal tokens")
    for result in results:
        median, low, high = result.time_ratios(results[0])
        figures = [f"{result.figures[key]:.3f}" for key in columns.values()]
        table.add_row(result.name, *figures, f"{median:.2f} [{low:.2f}-{high:.2f}]")
    return table


def write_results(path: Path, results: list[MethodResult], *, context: Mapping[str, float]) -> None:
    """Write `context` and all results as JSON, including the MaxVio of every step."""
    rows = [{**asdict(result), "time_ratio": result.time_ratios(results[0])} for result in results]
    write_result(path, {**context, "methods": rows})
