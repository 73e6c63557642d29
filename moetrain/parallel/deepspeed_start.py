"""What DeepSpeed does when it starts, made quick and quiet."""

import importlib
import logging
import warnings

from deepspeed.runtime import compiler

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
