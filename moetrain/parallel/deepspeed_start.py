"""What DeepSpeed does when it starts, made quick and quiet, and what its ranks send on one host."""

import importlib
import logging
import warnings
from typing import Any

import torch
from deepspeed.comm.torch import TorchBackend
from deepspeed.runtime import compiler

from moetrain.parallel.host_memory import is_large, memory_of

_NO_NEWS = (
    "untested optimizer",
    "unknown inputs or outputs type",  # of modules without weights of their own: nothing waits for their hooks
)


def quieten() -> None:
    """Let DeepSpeed say what is wrong, but not that our modules are new to it or that torch renames what it calls."""
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    logger.addFilter(_is_news)
    for renamed in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        warnings.filterwarnings("ignore", message=f".*{renamed}.* is deprecated", category=FutureWarning)


def _is_news(record: logging.LogRecord) -> bool:
    return not any(phrase in record.getMessage() for phrase in _NO_NEWS)


def spare_the_compiler() -> None:
    """Import DeepSpeed's own Muon, which its engine looks at and we never call, without its `torch.compile` decorators.

    They bring in torch's compiler: seconds of every start.
    """
    decorators = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = decorators


def share_memory(backend: TorchBackend) -> None:
    """Have DeepSpeed gather weights through memory where the ranks of a group share it.

    What it waits for later (`async_op`), small tensors and all else go the way they went. May be called again.
    """
    if _SHARES in vars(backend):
        return
    all_gather = backend.all_gather_into_tensor

    def _gathered(
        output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any = None, async_op: bool = False
    ) -> Any:
        takes = not async_op and input_tensor.is_contiguous() and output_tensor.is_contiguous()
        if takes and is_large(input_tensor) and (memory := memory_of(group, device=input_tensor.device)):
            return memory.gather(input_tensor, out=output_tensor)
        return all_gather(output_tensor, input_tensor, group, async_op)

    vars(backend).update({"all_gather_into_tensor": _gathered, _SHARES: True})


_SHARES = "shares_memory"
