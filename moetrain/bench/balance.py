"""Ways to balance experts side by side: the same weights, tokens and order of tokens, another `model.balance` each.

The methods take their steps in turn, so that what else the machine does falls on all of them. L layers with experts, E
experts.
"""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from rich.table import Table

from moetrain.bench.step import take_step
from moetrain.data.build import Data
from moetrain.files import write_json
from moetrain.log import TIME_PREFIX
from moetrain.model.config import BalanceConfig
from moetrain.parallel.protocol import Engine
from moetrain.train.expert_load import count_loads, violations
from moetrain.train.rows import rank_rows, split_rows
from moetrain.train.stages import Sections, engine_of
from moetrain.train.validate import validate

LOADS = ("maxvio", "maxvio_micro", "load_variation", "dead_experts", "router_entropy", "bias_range")
"""Metrics of a step whose mean over the last steps is shown, with `cross_entropy`."""


@dataclass(kw_only=True)
class MethodResult:
    """What a method came to.

    figures: means over the last steps of `LOADS` and of `cross_entropy`; `maxvio_held_out` and `validation/<source>`
    after the last one. maxvio: of every step. seconds: of every step.
    """

    name: str
    balance: BalanceConfig
    figures: dict[str, float] = field(default_factory=dict)
    maxvio: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def time_ratios(self, first: "MethodResult") -> tuple[float, float, float]:
        """Return the median ratio of a step's time to that of `first`, and the quartiles around it."""
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
    """Train one model a method for `sections.train.steps` steps, and return what each came to. A collective.

    on_step: called after each step of all methods with a word on it.
    """
    train = sections.train
    runs = {
        name: replace(sections, model=replace(sections.model, balance=balance)) for name, balance in methods.items()
    }
    engines = {name: engine_of(run) for name, run in runs.items()}
    results = {name: MethodResult(name=name, balance=balance) for name, balance in methods.items()}
    history: dict[str, list[dict[str, float]]] = {name: [] for name in methods}
    for step in range(train.steps):
        for name, engine in engines.items():
            values = take_step(runs[name], engine=engine, data=data, step=step)
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
    """Return the layers' mean MaxVio of the load over all validation rows, whose tokens never moved the bias."""
    topology = engine.topology
    loads_LE = torch.zeros((), dtype=torch.int64)
    for source in data.validation.values():
        rows = rank_rows(source.batch, rank=topology.rank, world_size=topology.world_size)
        loads_LE = loads_LE + count_loads(engine, split_rows(rows, rows=sections.train.rows_per_micro_batch)).cpu()
    return float(violations(loads_LE).mean())


def render(results: list[MethodResult]) -> Table:
    """Return the table for the terminal: a line a method; time is relative to the first one."""
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
    table = Table("method", *columns, "time of a step", title="balance: loads and losses at equal tokens")
    for result in results:
        median, low, high = result.time_ratios(results[0])
        figures = [f"{result.figures[key]:.3f}" for key in columns.values()]
        table.add_row(result.name, *figures, f"{median:.2f} [{low:.2f}-{high:.2f}]")
    return table


def write_results(path: Path, results: list[MethodResult], *, context: Mapping[str, float]) -> None:
    """Write all of it as JSON, the MaxVio of every step included."""
    rows = [{**asdict(result), "time_ratio": result.time_ratios(results[0])} for result in results]
    write_json(path, {**context, "methods": rows})
