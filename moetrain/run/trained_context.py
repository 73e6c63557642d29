"""The context policy that weights on disk were trained with, and its comparison with that of their use."""

from collections.abc import Mapping
from typing import Any

from moetrain.chat.context import ContextKind, ContextPolicy
from moetrain.checkpoint.origin import Origin
from moetrain.compose import read_yaml
from moetrain.export.folder import stated_record
from moetrain.export.read import is_export
from moetrain.export.write import CONTEXT
from moetrain.run.same_context import check_same_context
from moetrain.stage_files import CONFIG


def trained_context(origin: Origin) -> Mapping[str, Any] | None:
    """Return the context policy of the stage that trained the weights; None if it is unknown."""
    found: Any = None
    if is_export(origin.path):
        found = stated_record(origin.path).get(CONTEXT)
    elif origin.checkpoint is not None:
        task = read_yaml(origin.path.resolve().parent.parent / CONFIG).get("task")
        found = task.get("context") if isinstance(task, Mapping) else None
    is_known = isinstance(found, Mapping) and found.get("kind") in set(ContextKind)
    return found if is_known else None


def check_context(policy: ContextPolicy, origin: Origin, *, otherwise: str = "") -> None:
    """Raise ConfigError if the weights were trained with another context policy than `policy`.

    otherwise: another cure than the same policy, for the message.
    """
    trained = trained_context(origin)
    if trained is not None:
        check_same_context(policy, trained, weights=origin.path, otherwise=otherwise)
