"""Compares training in every layout (ranks, EP, ZeRO, accumulation, recomputation) with a plain torch loop.

The effect of only reordering the rows in one process is measured too, as the noise level.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from moetrain.commands.verify import LayoutFault, VerifyLayoutsRun
from moetrain.compose import save_config
from moetrain.files import to_json, write_text
from moetrain.log import progress
from moetrain.parallel.config import EngineName
from moetrain.runtime import free_port
from moetrain.verify.layout_cases import (
    Layout,
    Order,
    Trace,
    layouts_of,
    make_engine,
    take_steps,
)
from moetrain.verify.layout_margins import Margins, largest_score_gap
from moetrain.verify.layout_worker import weight_gap
from moetrain.verify.table import Row

CONFIG = "layouts_config.yaml"
"""Config file that the worker processes read. `config.yaml` may still be the one of an earlier run in this folder."""

STEP_BOUND = 1e-6
"""Bound on the relative difference of loss, gradient norm and clip factor per step. Biases and loads are compared
relative to their largest value."""
WEIGHT_BOUND = 1e-5
"""Bound on the difference of weights after the last step, relative to the largest element of the tensor."""
_COIN_FLIP = 4.0
"""A choice of experts whose margin is below this multiple of the largest score change under reordering counts as a coin
flip. Each of two scores may move by that change (factor 2), and a layout may reorder more than the measured reordering
does (factor 2)."""
_MOST_DRAWS = 8
"""Maximum number of token draws to find a reference without a coin flip. At the default size about 1 draw in 50 has
one."""
_FIGURES = ("loss", "grad_norm", "clip_factor", "bias", "loads", "weights")


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Plain run of an optimizer and scenario.

    noise: change of each figure when the rows are reordered. moved: minimum over parameters of the largest change by
    training, relative to the parameter's largest element. margin: smallest margin of a chosen expert. coin_flip:
    margins below this value are decided by rounding. draw: index of the token draw; all earlier draws had a coin flip.
    """

    trace: Trace
    noise: dict[str, float]
    moved: float
    margin: float
    coin_flip: float
    draw: int = 0

    @property
    def is_decided(self) -> bool:
        """Whether no choice of an expert depends on rounding."""
        return self.margin > self.coin_flip

    @property
    def num_coin_flips(self) -> int:
        """Number of token draws that were discarded because of a coin flip."""
        return self.draw + (not self.is_decided)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Results of the command.

    gaps: largest differences per compared layout and figure. left_out: layouts that were not compared because of a coin
    flip, once per discarded draw.
    """

    references: dict[str, Reference]
    gaps: dict[Layout, dict[str, float]]
    left_out: list[Layout]


def verify_layouts(run: VerifyLayoutsRun, *, folder: Path) -> Outcome:
    """Train all layouts of `run` and compare them with the plain loop. Starts and ends its own processes."""
    torch.set_num_threads(1)
    save_config(run, folder / CONFIG)
    layouts = layouts_of(run)
    references: dict[str, Reference] = {}
    for layout in layouts:
        if layout.reference not in references:
            references[layout.reference] = _reference(run, layout, folder=folder)
    decided = {name: reference for name, reference in references.items() if reference.is_decided}
    compared = [replace(one, draw=decided[one.reference].draw) for one in layouts if one.reference in decided]
    gaps: dict[Layout, dict[str, float]] = {}
    with progress(len(compared), "verify layouts") as advance:
        for world_size in sorted({layout.world_size for layout in compared}):
            of_size = [layout for layout in compared if layout.world_size == world_size]
            results = _results_of(of_size, world_size=world_size, folder=folder)
            for layout, answer in zip(of_size, results, strict=True):
                gap = answer.pop("weights")
                gaps[layout] = {**differences(Trace(**answer), references[layout.reference].trace), "weights": gap}
                advance(f"{layout.name}: {max(gaps[layout].values()):.1e}")
    left_out = [
        replace(layout, draw=draw) for layout in layouts for draw in range(references[layout.reference].num_coin_flips)
    ]
    return Outcome(references=references, gaps=gaps, left_out=left_out)


def differences(found: Trace, expected: Trace) -> dict[str, float]:
    """Return the largest relative difference of each figure over all steps."""
    gaps = {}
    for figure in ("loss", "grad_norm", "clip_factor"):
        pairs = zip(getattr(found, figure), getattr(expected, figure), strict=True)
        gaps[figure] = max(abs(ours - theirs) / abs(theirs) for ours, theirs in pairs)
    for figure in ("bias", "loads"):
        ours, theirs = (torch.tensor(getattr(trace, figure), dtype=torch.float64) for trace in (found, expected))
        scale = float(theirs.abs().max()) if theirs.numel() else 0.0
        gaps[figure] = float((ours - theirs).abs().max()) / (scale or 1.0) if theirs.numel() else 0.0
    return {figure: gap if math.isfinite(gap) else math.inf for figure, gap in gaps.items()}


def _reference(run: VerifyLayoutsRun, layout: Layout, *, folder: Path) -> Reference:
    """Return the plain run for the first token draw without a coin flip, or for the last draw tried."""
    for draw in range(_MOST_DRAWS):
        reference = _plain_run(run, replace(layout, draw=draw), folder=folder)
        if reference.is_decided:
            break
    return reference


def _plain_run(run: VerifyLayoutsRun, layout: Layout, *, folder: Path) -> Reference:
    """Train the plain loop twice, the second time row by row in reverse; write the weights of the first run to disk."""
    layout = replace(layout, world_size=1, accumulation=1)
    traces, states, margins, moved = [], [], [], []
    for order in Order:
        engine = make_engine(run, layout, engine=EngineName.torch)
        first = {name: param.detach().clone() for name, param in engine.model.named_parameters()}
        margins.append(Margins(engine))
        traces.append(take_steps(run, engine, layout=layout, order=order, fault=LayoutFault.none))
        state = engine.gather_state(with_optimizer=False)
        assert state is not None
        states.append(state)
        moved.append(min(weight_gap({name: state[name]}, {name: value}) for name, value in first.items()))
    save_file(states[0], folder / f"{layout.reference}.safetensors")
    num_layers = run.model.num_moe_layers + run.model.num_mtp_layers
    gap = largest_score_gap(margins[0].scores, margins[1].scores, num_layers=num_layers) if num_layers else 0.0
    return Reference(
        trace=traces[0],
        noise={**differences(traces[1], traces[0]), "weights": weight_gap(states[1], states[0])},
        moved=moved[0],
        margin=margins[0].smallest,
        coin_flip=_COIN_FLIP * gap,
        draw=layout.draw,
    )


def _results_of(layouts: Sequence[Layout], *, world_size: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield rank 0's results for each layout. The processes are started once for all layouts."""
    layouts_file = folder / f"layouts_{world_size}.json"
    write_text(layouts_file, to_json([asdict(layout) for layout in layouts]))
    shared = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "moetrain.verify.layout_worker", str(folder / CONFIG), str(layouts_file)]
    with ExitStack() as stack:
        log = stack.enter_context((folder / f"ranks_{world_size}.log").open("w"))
        ranks = []
        for rank in range(world_size):
            environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(
                [*command, str(folder)], env=environment, stdout=subprocess.PIPE, stderr=log, text=True
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            ranks.append(process)
        assert ranks[0].stdout is not None
        for layout in layouts:
            line = ranks[0].stdout.readline()
            if not line:
                raise RuntimeError(f"{layout.name}: the ranks ended without a result; see {log.name}")
            answer: dict[str, Any] = json.loads(line)
            yield answer


def rows_of(outcome: Outcome) -> list[Row]:
    """Return one row per figure, with the largest difference over layouts, and two rows that check the comparison.

    Bounds are also missed if no layout was compared, if a reference has no compared layout, or if a step of a plain run
    did not clip the gradient.
    """
    undecided = [name for name, reference in outcome.references.items() if not reference.is_decided]
    factors = [factor for reference in outcome.references.values() for factor in reference.trace.clip_factor]
    rows = [
        Row(
            name="references without a layout",
            value=len(undecided),
            bound=0,
            note=f"of {len(outcome.references)}; left out, because rounding decides: {', '.join(undecided) or 'none'}",
        ),
        Row(
            name="steps that did not clip",
            value=sum(factor >= 1 for factor in factors),
            bound=0,
            note=f"of {len(factors)} steps of the plain loop",
        ),
    ]
    for figure in _FIGURES:
        bound = WEIGHT_BOUND if figure == "weights" else STEP_BOUND
        noise = max(reference.noise[figure] for reference in outcome.references.values())
        worst = max(outcome.gaps, key=lambda layout: outcome.gaps[layout][figure], default=None)
        value = outcome.gaps[worst][figure] if worst else math.nan
        note = f"reordering in one process: {noise:.1e}; {worst.name if worst else 'nothing was compared'}"
        if figure == "weights":
            least = min(reference.moved for reference in outcome.references.values())
            note += f"; training moved each parameter by at least {least:.1e}"
        rows.append(Row(name=figure, value=value, bound=bound, note=note))
    return rows
