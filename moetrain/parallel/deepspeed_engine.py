"""The default engine: DeepSpeed's ZeRO 1, 2 or 3 over any number of processes, including one.

DeepSpeed runs in float32: the parameters are the masters, and the model casts them for its matrix products. Its JSON
config is built here from checked values. Gradient accumulation is done here, not by DeepSpeed, so that the number of
micro-batches may differ from step to step.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import deepspeed
import torch
from torch import nn

from moetrain.data.batch import TokenBatch
from moetrain.model.transformer import Transformer
from moetrain.optim.config import OptimConfig, OptimizerName
from moetrain.optim.muon import parameter_rule
from moetrain.parallel.config import PARTITIONING_STAGE
from moetrain.parallel.deepspeed_internals import (
    check_contract,
    filter_log_messages,
    skip_compiler_import,
    use_host_memory,
)
from moetrain.parallel.expert import ExpertAdapter, group_name
from moetrain.parallel.optimizer import PartitionedOptimizer
from moetrain.parallel.partition import Slot, slots_of
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
    expert_parameter_names,
    gather_pieces,
    global_shapes,
    optimizer_key,
    persistent_buffers,
    read_into,
)
from moetrain.parallel.topology import Topology
from moetrain.parallel.zero import (
    ParameterInitializer,
    ParameterShards,
    Shards,
    VectorShards,
    allocate_placeholders,
    initialize_and_partition,
    mark_gather_units,
    stage_3_config,
)

T = TypeVar("T")

_LARGEST_BUCKET = 1 << 20
"""Bucket size of ZeRO 1 and 2 in elements: small gradients are summed together, larger ones in place."""
_LARGEST_BUCKET_OF_STAGE_3 = 1 << 26  # 256 MB in float32


class _ObjectiveModule(nn.Module):
    """The module that DeepSpeed wraps. All uses of the model go through its forward, so that DeepSpeed's hooks run."""

    def __init__(self, model: Transformer, *, adapter: ExpertAdapter | None) -> None:
        super().__init__()
        self.model = model
        self.adapter = adapter

    def forward(
        self, function: Callable[[Transformer, TokenBatch], tuple[Any, ...]], batch: TokenBatch
    ) -> tuple[Any, ...]:
        """Return `function(model, batch)`."""
        return function(self.model, batch)


class DeepSpeedEngine:
    """Implements `Engine` on DeepSpeed."""

    def __init__(
        self,
        model: Transformer,
        topology: Topology,
        *,
        optim_config: OptimConfig,
        zero_stage: int,
        compute_dtype: torch.dtype,
        initialize_parameter: ParameterInitializer,
    ) -> None:
        """Wrap a model. Under ZeRO 3 it must be on the meta device; `initialize_parameter` sets its parameters."""
        if zero_stage == PARTITIONING_STAGE:
            allocate_placeholders(model, device=topology.device)
        self.model = model
        self.topology = topology
        self.config = optim_config
        self.experts = expert_parameter_names(model) if topology.expert_size > 1 else set()
        self.parameters = {name: tuple(param.shape) for name, param in model.named_parameters()}
        check_contract()
        filter_log_messages()
        skip_compiler_import()
        use_host_memory(deepspeed.comm.comm.cdb)
        if zero_stage == PARTITIONING_STAGE:
            mark_gather_units(model)
        self.optimizer = PartitionedOptimizer(
            self._groups(), config=optim_config, dtype=compute_dtype, library=model.library
        )
        module = _ObjectiveModule(model, adapter=self._adapter())
        config = self._deepspeed_config(zero_stage)
        if zero_stage == PARTITIONING_STAGE:
            initialize_and_partition(model, initialize_parameter, device=topology.device, config=config)
        self.engine, _, _, _ = deepspeed.initialize(
            model=module,
            optimizer=self.optimizer,
            config=config,
            dist_init_required=False,
        )
        kind: type[ParameterShards] | type[VectorShards]
        kind = ParameterShards if zero_stage == PARTITIONING_STAGE else VectorShards
        self.shards: Shards = kind(self.engine.optimizer, model, optimizer=self.optimizer)
        self.loss_factor = self.shards.loss_factor
        self.optimizer.bind(self.shards.vectors(), self.shards.partitions())

    def _adapter(self) -> ExpertAdapter | None:
        if not self.experts:
            return None
        return ExpertAdapter(
            [layer.experts for _, layer in self.model.moe_layers()],
            num_experts=self.model.config.num_experts,
            expert_size=self.topology.expert_size,
            expert_rank=self.topology.expert_rank,
        )

    def _groups(self) -> list[dict[str, Any]]:
        """Return the parameter groups: one per combination of update rule and kind (expert-parallel or not)."""
        members: dict[tuple[bool, OptimizerName], list[tuple[str, nn.Parameter]]] = {}
        for name, param in self.model.named_parameters():
            rule = parameter_rule(name, param.shape, hidden_rule=self.config.name)
            members.setdefault((name in self.experts, rule), []).append((name, param))
        groups = []
        for (is_expert, rule), named in members.items():
            group = {"params": [param for _, param in named], "slots": slots_of(named), "rule": rule}
            if is_expert:
                group |= {"moe": True, "name": group_name(self.topology.expert_size)}
            groups.append(group)
        return groups

    def _deepspeed_config(self, zero_stage: int) -> dict[str, Any]:
        num_elements = sum(param.numel() for param in self.model.parameters())
        bucket = _LARGEST_BUCKET_OF_STAGE_3 if zero_stage == PARTITIONING_STAGE else _LARGEST_BUCKET
        return {
            "train_micro_batch_size_per_gpu": 1,  # DeepSpeed uses it for its counters only
            "gradient_accumulation_steps": 1,
            "gradient_clipping": self.config.clip_norm,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {
                "stage": zero_stage,
                "contiguous_gradients": True,
                "overlap_comm": False,
                "reduce_scatter": True,
                "round_robin_gradients": False,
                "reduce_bucket_size": min(num_elements, bucket),
                **(stage_3_config(self.model) if zero_stage == PARTITIONING_STAGE else {}),
            },
            "steps_per_print": None,
        }

    def accumulate(self, objective: Objective, batch: TokenBatch, *, is_last: bool) -> ObjectiveResult:
        """Add the gradient of one micro-batch; return its detached result."""
        self.engine.set_gradient_accumulation_boundary(is_last)

        def differentiated(model: Transformer, batch: TokenBatch) -> tuple[torch.Tensor, ObjectiveResult]:
            """Return the loss, scaled so that DeepSpeed sums the gradients of the ranks, and the result."""
            result = objective(model, batch)
            return result.loss * self.loss_factor, result.detached()

        loss, result = self.engine(differentiated, on_device(batch, self.topology.device))
        self.engine.backward(loss)
        assert isinstance(result, ObjectiveResult)
        return result

    @torch.no_grad()
    def inspect(self, function: Callable[[Transformer, TokenBatch], T], batch: TokenBatch) -> T:
        """Return `function(model, batch)`, computed without gradients."""
        (output,) = self.engine.module(
            lambda *arguments: (function(*arguments),), on_device(batch, self.topology.device)
        )
        result: T = output
        return result

    def step(self, learning_rate: float) -> StepReport:
        """Clip the accumulated gradient, update the parameters and clear the gradient."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()
        invalidate_quantized(self.model)
        grad_norm = float(self.engine.get_global_grad_norm())
        return step_report(grad_norm, clip_norm=self.config.clip_norm)

    @torch.no_grad()
    def multiply_rows(self, factors: Mapping[str, torch.Tensor]) -> None:
        """Multiply rows of parameters; see `Engine.multiply_rows`."""
        self.shards.multiply_rows(factors)
        invalidate_quantized(self.model)

    @torch.no_grad()
    def discard(self) -> None:
        """Drop the accumulated gradient; parameters and optimizer state do not change.

        Sets the gradient to infinity, so that DeepSpeed's overflow check skips the step and clears its buffers.
        """
        for pieces in self.engine.optimizer.averaged_gradients.values():
            for gradient in pieces:
                gradient.fill_(math.inf)
        self.engine.step()
        self.shards.clear_discarded()

    def pieces(self, *, with_optimizer: bool) -> Iterator[Piece]:
        """Yield this rank's part of each parameter and its state; the main rank yields buffers. See `Engine.pieces`."""
        if self.topology.is_main:
            yield from self._replicated_pieces(with_optimizer=with_optimizer)
        for group, slot in self._slots():
            start, _ = group["partition"].piece(slot.whole, group["partition"].index)
            start += self._first_element(slot)
            shape = self._global_shape(slot)
            owned = {slot.name: self.optimizer.weight_piece(group, slot)}
            if with_optimizer:
                for state in STATE_NAMES[group["rule"]]:
                    owned[optimizer_key(slot.name, state)] = self.optimizer.state_piece(group, slot, name=state)
            for name, values_P in owned.items():
                if values_P.numel():
                    yield Piece(name=name, shape=shape, start=start, values_P=values_P.detach())

    def _replicated_pieces(self, *, with_optimizer: bool) -> Iterator[Piece]:
        for name, buffer in persistent_buffers(self.model).items():
            yield Piece(name=name, shape=tuple(buffer.shape), start=0, values_P=buffer.detach().reshape(-1))
        if with_optimizer:
            step = torch.tensor([self.optimizer.param_groups[0]["step"]], device=self.topology.device)
            yield Piece(name=STEP, shape=(), start=0, values_P=step)

    def _slots(self) -> Iterator[tuple[dict[str, Any], Slot]]:
        for group in self.optimizer.param_groups:
            for slot in group["slots"]:
                yield group, slot

    def _global_shape(self, slot: Slot) -> tuple[int, ...]:
        if slot.name not in self.experts:
            return tuple(slot.shape)
        return (slot.shape[0] * self.topology.expert_size, *slot.shape[1:])

    def _first_element(self, slot: Slot) -> int:
        """Return the index in the flattened global tensor at which this rank's (expert) parameter starts."""
        return self.topology.expert_rank * slot.shape.numel() if slot.name in self.experts else 0

    def gather_state(self, *, with_optimizer: bool) -> dict[str, torch.Tensor] | None:
        """Return the whole state on the CPU of the main rank; None on other ranks."""
        return gather_pieces(self.pieces(with_optimizer=with_optimizer), self.topology)

    @torch.no_grad()
    def load_state(self, reader: StateReader, *, with_optimizer: bool) -> None:
        """Load a state: this rank reads its experts, all other weights, and its part of the optimizer state."""
        shapes = global_shapes(
            self.model,
            self.parameters,
            num_ranks=self.topology.expert_size,
            hidden_rule=self.config.name,
            with_optimizer=with_optimizer,
        )
        check(reader.shapes(), shapes)
        for name, buffer in persistent_buffers(self.model).items():
            read_into(buffer, reader, name=name)
        for group, slot in self._slots():
            self.shards.read(slot, reader, group=group, first=self._first_element(slot))
        self.shards.after_load()
        if with_optimizer:
            for group, slot in self._slots():
                first, _ = group["partition"].piece(slot.whole, group["partition"].index)
                for state in STATE_NAMES[group["rule"]]:
                    piece = self.optimizer.state_piece(group, slot, name=state)
                    key = optimizer_key(slot.name, state)
                    read_into(piece, reader, name=key, first=self._first_element(slot) + first)
            for group in self.optimizer.param_groups:
                group["step"] = int(reader.read(STEP, first=0, last=1))
        invalidate_quantized(self.model)
