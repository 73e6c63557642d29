"""`build_engine`, and the names that users of an engine import."""

from functools import partial

import torch

from moetrain.errors import ConfigError
from moetrain.kernels.build import Library
from moetrain.model.config import ModelConfig
from moetrain.model.moe import Dispatcher, LocalDispatcher
from moetrain.model.recompute import set_recompute
from moetrain.model.transformer import Transformer, allocate, initialize, initialize_parameter
from moetrain.optim.config import OptimConfig
from moetrain.parallel.config import PARTITIONING_STAGE, EngineName, ParallelConfig
from moetrain.parallel.dispatch import AllToAllDispatcher
from moetrain.parallel.protocol import Engine, Objective, ObjectiveResult, StepReport, on_device
from moetrain.parallel.topology import Topology, setup
from moetrain.parallel.torch_engine import TorchEngine
from moetrain.quant.apply import apply
from moetrain.quant.config import QuantConfig
from moetrain.quant.fake_quant import Keep

__all__ = ["Engine", "Objective", "ObjectiveResult", "StepReport", "build_engine", "on_device"]


def build_engine(
    model_config: ModelConfig,
    parallel_config: ParallelConfig,
    *,
    optim_config: OptimConfig,
    quant_config: QuantConfig,
    compute_dtype: torch.dtype,
    seed: int,
    library: Library | None = None,
) -> Engine:
    """Return an engine with a new model. The initial weights depend on `seed`, not on the layout.

    library: native kernels; None selects torch's. Raises ConfigError if the layout does not fit the number of processes
    or of experts.
    """
    topology = setup(parallel_config)
    if model_config.num_experts % parallel_config.expert:
        raise ConfigError(
            f"parallel.expert is {parallel_config.expert}: it must divide model.num_experts={model_config.num_experts}"
        )
    model = _build_model(
        model_config,
        topology,
        parallel_config=parallel_config,
        quant_config=quant_config,
        compute_dtype=compute_dtype,
        library=library,
    )
    if parallel_config.zero != PARTITIONING_STAGE or parallel_config.engine == EngineName.torch:
        allocate(model, topology.device)
        initialize(model, seed)
    if parallel_config.engine == EngineName.torch:
        return TorchEngine(model, topology, optim_config=optim_config, compute_dtype=compute_dtype)
    from moetrain.parallel.deepspeed_engine import DeepSpeedEngine  # imports deepspeed, which takes seconds

    return DeepSpeedEngine(
        model,
        topology,
        optim_config=optim_config,
        zero_stage=parallel_config.zero,
        compute_dtype=compute_dtype,
        initialize_parameter=partial(initialize_parameter, model, seed=seed),
    )


def _build_model(
    config: ModelConfig,
    topology: Topology,
    *,
    parallel_config: ParallelConfig,
    quant_config: QuantConfig,
    compute_dtype: torch.dtype,
    library: Library | None = None,
) -> Transformer:
    """Return the model on the meta device, with this rank's share of the experts only."""
    num_local = config.num_experts // topology.expert_size
    first = topology.expert_rank * num_local
    limit = parallel_config.expert_rows
    dispatcher: Dispatcher = LocalDispatcher(expert_rows=limit)
    if topology.expert_size > 1:
        dispatcher = AllToAllDispatcher(topology, num_experts=config.num_experts, expert_rows=limit)
    with torch.device("meta"):
        model = Transformer(
            config,
            compute_dtype=compute_dtype,
            library=library,
            dispatcher=dispatcher,
            expert_slice=slice(first, first + num_local),
        )
    if quant_config.enabled:
        # ZeRO 3 keeps no whole weight between calls; cached quantised copies would undo that.
        keep = Keep.call if parallel_config.zero == PARTITIONING_STAGE else Keep.step
        apply([layer.experts for _, layer in model.moe_layers()], quant_config, keep=keep)
    set_recompute(model, parallel_config.recompute)
    return model
