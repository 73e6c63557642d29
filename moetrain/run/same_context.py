"""Compares the context policy that weights were trained with and that of their use. Does not import torch."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moetrain.chat.context import ContextPolicy, described
from moetrain.checkpoint.identity import differences
from moetrain.errors import ConfigError


def check_same_context(
    policy: ContextPolicy, trained: Mapping[str, Any], *, weights: Path, otherwise: str = ""
) -> None:
    """Raise ConfigError if `policy` has another effect than that of the fields `trained`.

    otherwise: another cure than the same policy, for the message.
    """
    changed = differences(described(trained), described(asdict(policy)))
    if changed:
        raise ConfigError(
            f"task.context is not the one that {weights} was trained with ({'; '.join(changed)}): give the "
            f"same{otherwise}"
        )
