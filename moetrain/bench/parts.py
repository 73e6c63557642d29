"""Measures the time of a training step per part of the model, forward and backward pass together.

Hooks mark the modules while torch's profiler runs. An operation is attributed to the innermost mark around it. The
backward pass of an operation is attributed to the part of its forward pass, found by autograd's sequence number.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from moetrain.model.attention import Attention
from moetrain.model.layers import FeedForward, Linear, RMSNorm
from moetrain.model.moe import Experts, MoE
from moetrain.model.transformer import Embedding
from moetrain.parallel.protocol import Engine, StepReport

_MARK = "part:"
_PARTS: dict[type[nn.Module], str] = {
    Attention: "attention",
    Experts: "experts",
    MoE: "router and dispatch",
    FeedForward: "dense and projections",
    Linear: "dense and projections",
    RMSNorm: "norms",
    Embedding: "embedding",
}
_BY_NAME = {
    "_ChunkedLogprobs": "head and loss",
    "AccumulateGrad": "gradient bookkeeping",
    "Optimizer.step": "optimizer",
}
_OPTIMIZER = "optimizer"
_OTHER = "other"


def profile_parts(engine: Engine, work: Callable[[], Any], *, num_steps: int) -> dict[str, float]:
    """Return the seconds per step by part, profiled while `work` takes `num_steps` steps of `engine`."""
    with _marked(engine), profile(activities=[ProfilerActivity.CPU]) as profiler, record_function(_MARK + _OTHER):
        work()
    return _seconds(list(profiler.events()), num_steps=num_steps)


@contextmanager
def _marked(engine: Engine) -> Iterator[None]:
    """Mark the optimizer step and every module in `_PARTS` for the profiler, until the context ends."""
    open_marks: list[ExitStack] = []

    def _enter(module: nn.Module, args: Any) -> None:
        open_marks.append(ExitStack())
        open_marks[-1].enter_context(record_function(_MARK + _PARTS[type(module)]))

    def _leave(module: nn.Module, args: Any, output: Any) -> None:
        open_marks.pop().close()

    step = engine.step

    def marked_step(learning_rate: float) -> StepReport:
        with record_function(_MARK + _OPTIMIZER):
            return step(learning_rate)

    with ExitStack() as hooks:
        for module in engine.model.modules():
            if type(module) in _PARTS:
                hooks.callback(module.register_forward_pre_hook(_enter).remove)
                hooks.callback(module.register_forward_hook(_leave).remove)
        vars(engine)["step"] = marked_step
        hooks.callback(vars(engine).pop, "step")
        yield


def _seconds(events: list[FunctionEvent], *, num_steps: int) -> dict[str, float]:
    """Return the seconds per step by part: the sum of the self CPU time of the events of that part."""
    forward: dict[int, str] = {}
    for event in sorted(events, key=lambda event: event.time_range.start):
        if event.sequence_nr >= 0:
            forward.setdefault(event.sequence_nr, _part_of(event, forward={}))
    seconds: dict[str, float] = defaultdict(float)
    for event in events:
        seconds[_part_of(event, forward=forward)] += event.self_cpu_time_total / 1e6 / num_steps
    return dict(seconds)


def _is_backward(event: FunctionEvent) -> bool:
    return event.name.startswith("autograd::engine::evaluate_function")


def _part_of(event: FunctionEvent, *, forward: dict[int, str]) -> str:
    """Return the part of an event, by name, mark or forward pass of the innermost enclosing event that has one."""
    place: FunctionEvent | None = event
    while place is not None:
        for name, part in _BY_NAME.items():
            if name in place.name:
                return part
        if place.name.startswith(_MARK):
            return place.name.removeprefix(_MARK)
        if _is_backward(place) and place.sequence_nr in forward:
            return forward[place.sequence_nr]
        place = place.cpu_parent
    return _OTHER
