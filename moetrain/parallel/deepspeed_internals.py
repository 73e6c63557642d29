"""Every function of DeepSpeed that moetrain replaces, and the signatures that it relies on.

`check_contract` compares them with the installed DeepSpeed before an engine is built. Other modules read fields of
DeepSpeed's optimizers (`parallel.zero`, `parallel.gradients`) and its expert groups (`parallel.expert`).
"""

import importlib
import inspect
import logging
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import deepspeed
import torch
from deepspeed.comm.torch import TorchBackend
from deepspeed.runtime import compiler
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups

from moetrain.errors import ConfigError
from moetrain.parallel.host_memory import is_large, shared_memory_of

WRITTEN_AGAINST = "0.19.8"
"""The version of DeepSpeed that the signatures are taken from."""
SIGNATURES: dict[tuple[Any, str], str] = {
    (compiler, "compile"): "()",
    (TorchBackend, "all_gather_into_tensor"): "(self, *args, **kwargs)",
    (DeepSpeedZeroOptimizer, "average_tensor"): "(self, tensor: torch.Tensor, communication_data_type: torch.dtype)",
    (DeepSpeedZeroOptimizer, "scaled_global_norm"): "(self, norm_type=2)",
    (DeepSpeedZeroOptimizer, "_use_compact_grad_partition_buffer"): "(self, group_idx)",
    (DeepSpeedZeroOptimizer, "_build_compact_grad_partition_buffer"): "(self, group_idx)",
    (DeepSpeedZeroOptimizer, "_link_all_hp_params"): "(self)",
    (
        groups,
        "_create_expert_and_data_parallel",
    ): "(expert_parallel_size_, mp_size=None, pp_size=None, mp_mode='tp', "
    "use_data_before_expert_parallel_=False, folding_spec=None)",
    (groups, "_get_expert_parallel_group"): "(group_name)",
    (groups, "_get_expert_data_parallel_group"): "(group_name)",
    (groups, "_get_expert_parallel_group_dict"): "()",
}
"""Expected signature of each internal that is replaced or called, by owner and name."""

_IRRELEVANT_MESSAGES = (
    "untested optimizer",
    "unknown inputs or outputs type",  # concerns modules without weights, which need no hooks
)


def check_contract() -> None:
    """Raise `ConfigError` if an internal of the installed DeepSpeed is missing or has another signature."""
    for (owner, name), expected in SIGNATURES.items():
        internal = vars(owner).get(name)
        found = "missing" if internal is None else str(inspect.signature(internal))
        if found != expected:
            raise ConfigError(
                f"DeepSpeed {deepspeed.__version__}: {owner.__name__}.{name} is {found}, expected {expected}: "
                f"install deepspeed=={WRITTEN_AGAINST}"
            )


def replace_methods(zero: Any, methods: Mapping[str, Callable[..., Any]]) -> None:
    """Replace methods of one ZeRO 1 or 2 optimizer; each must be in `SIGNATURES`."""
    assert all((DeepSpeedZeroOptimizer, name) in SIGNATURES for name in methods)
    vars(zero).update(methods)


def skip_operator_builds() -> None:
    """Disable DeepSpeed's compiled operators, which are for inference only; building them takes minutes."""
    deepspeed.ops.__compatible_ops__ = {}  # set before DeepSpeed fills it by running the compiler


def filter_log_messages() -> None:
    """Log DeepSpeed's warnings and errors, except those about unknown modules and torch's deprecated names."""
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    logger.addFilter(_is_relevant)
    for renamed in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        warnings.filterwarnings("ignore", message=f".*{renamed}.* is deprecated", category=FutureWarning)


def _is_relevant(record: logging.LogRecord) -> bool:
    return not any(phrase in record.getMessage() for phrase in _IRRELEVANT_MESSAGES)


def skip_compiler_import() -> None:
    """Import DeepSpeed's Muon without its `torch.compile` decorators.

    DeepSpeed's engine imports that module, but moetrain never calls it. The decorators would import torch's compiler,
    which takes seconds at each start.
    """
    decorators = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = decorators


def use_host_memory(backend: TorchBackend) -> None:
    """Make DeepSpeed gather weights through shared memory if the ranks of a group have it.

    Asynchronous calls (`async_op`) and small tensors are not changed. Calling this twice has no further effect.
    """
    if _USES_HOST_MEMORY in vars(backend):
        return
    all_gather = backend.all_gather_into_tensor

    def _all_gather(
        output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any = None, async_op: bool = False
    ) -> Any:
        is_contiguous = input_tensor.is_contiguous() and output_tensor.is_contiguous()
        can_use_memory = is_contiguous and not async_op and is_large(input_tensor)
        if can_use_memory and (memory := shared_memory_of(group, device=input_tensor.device)):
            return memory.gather(input_tensor, out=output_tensor)
        return all_gather(output_tensor, input_tensor, group, async_op)

    vars(backend).update({"all_gather_into_tensor": _all_gather, _USES_HOST_MEMORY: True})


_USES_HOST_MEMORY = "shares_memory"
