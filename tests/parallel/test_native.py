"""Two ranks with the native kernels, in bfloat16, against one process with them. One launch serves all tests here."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from moetrain.kernels.build import load
from moetrain.model.config import Recompute
from moetrain.optim.config import OptimizerName
from moetrain.parallel import deepspeed_engine, host_memory
from moetrain.parallel.config import EngineName
from moetrain.parallel.host_memory import HostMemory
from tests.distributed import run_ranks
from tests.parallel.nano import Trace, build, difference, largest_gap, train

ROUNDING = 1e-4  # relative; a row's numbers are those of one process, sums of gradients have another order
WEIGHTS = 2e-4  # absolute, after three steps of 0.02
EPS = 1e-3  # AdamW makes lr / eps of an error in a small gradient, and bfloat16 of a weight may then be the next one
STEPS = range(3)
LAYOUTS: list[dict[str, Any]] = [
    {"zero": 1},
    {"zero": 2, "expert": 2},
    {"zero": 3},
    {"zero": 3, "expert": 2, "recompute": Recompute.blocks},
    {"zero": 1, "expert": 2, "expert_rows": 5},
]
IN_MEMORY = ("sum_", "gather", "exchange")


@dataclass(kw_only=True)
class Trained:
    """What a layout gave, and how often its ranks met in memory, by name."""

    traces: list[Trace]
    state: dict[str, torch.Tensor] | None
    met: Counter[str]


def _trained(engine: EngineName, **layout: Any) -> Trained:
    torch.set_num_threads(1)
    met: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        kind = {"optimizer": OptimizerName.adamw, "eps": EPS, "compute_dtype": torch.bfloat16, "library": load()}
        model = build(engine, **kind, **layout)
        for name in IN_MEMORY:
            patch.setattr(HostMemory, name, _counted(name, met))
        traces = train(model, STEPS)
        return Trained(traces=traces, state=model.gather_state(with_optimizer=False), met=met)


def _counted(name: str, met: Counter[str]) -> Callable[..., None]:
    inner = getattr(HostMemory, name)

    def counted(*values: Any, **named: Any) -> None:
        met[name] += 1
        inner(*values, **named)

    return counted


def _two_ranks() -> list[Trained]:
    host_memory.SMALL_BYTES = 0  # the model is
    deepspeed_engine._LARGEST_BUCKET = 700  # some of its parameters are larger
    return [_trained(EngineName.deepspeed, **layout) for layout in LAYOUTS]


@pytest.fixture(scope="module")
def two_ranks() -> list[list[Trained]]:
    return run_ranks(_two_ranks, 2)


@pytest.mark.parametrize("index", range(len(LAYOUTS)))
def test_two_ranks_give_the_numbers_of_one_process(index: int, two_ranks: list[list[Trained]]) -> None:
    plain, found = _trained(EngineName.torch), two_ranks[0][index]
    assert difference(found.traces, plain.traces) < ROUNDING
    assert found.state is not None and plain.state is not None
    assert largest_gap(found.state, plain.state) < WEIGHTS


@pytest.mark.parametrize("index", range(len(LAYOUTS)))
def test_ranks_of_one_host_meet_in_memory(index: int, two_ranks: list[list[Trained]]) -> None:
    layout, met = LAYOUTS[index], two_ranks[0][index].met
    for name in ("sum_", "gather"):
        assert (met[name] >= len(STEPS)) == (layout["zero"] < 3), name  # ZeRO 3 goes on meanwhile, which is gloo's
    assert (met["exchange"] > 0) == ("expert" in layout)
    assert met == two_ranks[1][index].met
