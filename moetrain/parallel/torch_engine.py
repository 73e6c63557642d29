"""The plain engine: one process, whole parameters, torch's clipping. It is the reference for all layouts."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch

from moetrain.data.batch import TokenBatch
from moetrain.model.transformer import Transformer
from moetrain.optim.adamw import adamw_update
from moetrain.optim.config import OptimConfig, OptimizerName
from moetrain.optim.muon import (
    apply_update,
    dtype_of_products,
    logical_matrices,
    nesterov,
    orthogonal_update,
    parameter_rule,
)
from moetrain.parallel.protocol import (
    Objective,
    ObjectiveResult,
    Piece,
    StateReader,
    StepReport,
    invalidate_quantized,
    on_device,
    step_report,
)
from moetrain.parallel.state import (
    STATE_NAMES,
    STEP,
    check,
    gather_pieces,
    global_shapes,
    optimizer_key,
    persistent_buffers,
    read_into,
)
from moetrain.parallel.topology import Topology

T = TypeVar("T")


class TorchEngine:
    """Implements `Engine` with a loop over parameters."""

    def __init__(
        self, model: Transformer, topology: Topology, *, optim_config: OptimConfig, compute_dtype: torch.dtype
    ) -> None:
        self.model = model
        self.topology = topology
        self.config = optim_config
        self.muon_dtype = dtype_of_products(compute_dtype, library=model.library)
        self.loss_factor = 1
        self.num_steps = 0
        self.rules = {
            name: parameter_rule(name, param.shape, hidden_rule=optim_config.name)
            for name, param in model.named_parameters()
        }
        self.state = {
            name: {state: torch.zeros_like(param) for state in STATE_NAMES[self.rules[name]]}
            for name, param in model.named_parameters()
        }

    def accumulate(self, objective: Objective, batch: TokenBatch, *, is_last: bool) -> ObjectiveResult:
        """Add the gradient of one micro-batch; return its detached result."""
        del is_last  # one process has nothing to reduce
        result = objective(self.model, on_device(batch, self.topology.device))
        result.loss.backward()  # type: ignore[no-untyped-call]
        return result.detached()

    @torch.no_grad()
    def inspect(self, function: Callable[[Transformer, TokenBatch], T], batch: TokenBatch) -> T:
        """Return `function(model, batch)`, computed without gradients."""
        return function(self.model, on_device(batch, self.topology.device))

    @torch.no_grad()
    def step(self, learning_rate: float) -> StepReport:
        """Clip the accumulated gradient, update the parameters and clear the gradient."""
        params = list(self.model.parameters())
        grad_norm = torch.nn.utils.clip_grad_norm_(params, self.config.clip_norm).item()
        if math.isfinite(grad_norm):
            self.num_steps += 1
            for name, param in self.model.named_parameters():
                if param.grad is None:
                    param.grad = torch.zeros_like(param)  # weight decay and momentum still apply, as under ZeRO
                self._update(name, param, learning_rate=learning_rate)
        for param in params:
            param.grad = None
        invalidate_quantized(self.model)
        return step_report(grad_norm, clip_norm=self.config.clip_norm)

    def discard(self) -> None:
        """Drop the accumulated gradient; parameters and optimizer state do not change."""
        for param in self.model.parameters():
            param.grad = None

    def _update(self, name: str, param: torch.nn.Parameter, *, learning_rate: float) -> None:
        grad, state, config = param.grad, self.state[name], self.config
        assert grad is not None
        if self.rules[name] == OptimizerName.adamw:
            adamw_update(
                param,
                grad,
                **state,
                step=self.num_steps,
                learning_rate=learning_rate,
                betas=config.betas,
                eps=config.eps,
                weight_decay=config.weight_decay,
                library=self.model.library,
            )
            return
        direction_BMN = logical_matrices(name, nesterov(grad, state["momentum"], decay=config.momentum))
        update_BMN = orthogonal_update(direction_BMN, schedule=config.newton_schulz, dtype=self.muon_dtype)
        apply_update(
            param, update_BMN.reshape(param.shape), learning_rate=learning_rate, weight_decay=config.weight_decay
        )

    @torch.no_grad()
    def multiply_rows(self, factors: Mapping[str, torch.Tensor]) -> None:
        """Multiply rows of parameters; see `Engine.multiply_rows`."""
        for name, factor_M in factors.items():
            param = self.model.get_parameter(name)
            param.mul_(factor_M.to(param.device)[:, None])
        invalidate_quantized(self.model)

    def pieces(self, *, with_optimizer: bool) -> Iterator[Piece]:
        """Yield every tensor whole; see `Engine.pieces`."""
        for name, tensor in self._tensors(with_optimizer=with_optimizer).items():
            yield Piece(name=name, shape=tuple(tensor.shape), start=0, values_P=tensor.detach().reshape(-1))

    def _tensors(self, *, with_optimizer: bool) -> dict[str, torch.Tensor]:
        tensors = {**persistent_buffers(self.model), **dict(self.model.named_parameters())}
        if with_optimizer:
            for name, states in self.state.items():
                tensors |= {optimizer_key(name, state): tensor for state, tensor in states.items()}
            tensors[STEP] = torch.tensor(self.num_steps)
        return tensors

    def gather_state(self, *, with_optimizer: bool) -> dict[str, torch.Tensor] | None:
        """Return copies of the whole state on the CPU."""
        return gather_pieces(self.pieces(with_optimizer=with_optimizer), self.topology)

    @torch.no_grad()
    def load_state(self, reader: StateReader, *, with_optimizer: bool) -> None:
        """Load a whole state; see `Engine.load_state`."""
        shapes = global_shapes(
            self.model,
            {name: tuple(param.shape) for name, param in self.model.named_parameters()},
            num_ranks=1,
            hidden_rule=self.config.name,
            with_optimizer=with_optimizer,
        )
        check(reader.shapes(), shapes)
        targets = self._tensors(with_optimizer=with_optimizer)
        for name, target in targets.items():
            read_into(target, reader, name=name)
        if with_optimizer:
            self.num_steps = int(targets[STEP])
        invalidate_quantized(self.model)
