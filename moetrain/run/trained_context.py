"""The context policy that weights were trained with, and its comparison with that of an evaluation."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from moetrain.chat.context import ContextKind, ContextPolicy, described
from moetrain.checkpoint.identity import differences
from moetrain.checkpoint.origin import Origin
from moetrain.compose import read_yaml
from moetrain.errors import ConfigError
from moetrain.export.folder import stated_record
from moetrain.export.read import is_export
from moetrain.export.write import CONTEXT
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
    if trained is None:
        return
    changed = differences(described(trained), described(asdict(policy)))
    if changed:
        raise ConfigError(
            f"task.context is not the one that {origin.path} was trained with ({'; '.join(changed)}): give the "
            f"same{otherwise}"
        )
