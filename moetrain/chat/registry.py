"""The chat templates by name. A file in `chat/templates/` adds those in its `TEMPLATES`; a plugin calls `register`."""

import functools
import importlib
import pkgutil
from collections.abc import Collection

from moetrain.chat import templates
from moetrain.chat.template import ChatTemplate
from moetrain.errors import ConfigError

AUTO = "auto"
"""Value of `data.tokenizer.template` that recognises the template of a tokenizer."""
DEFAULT = "kimi_k2"
"""Template of a tokenizer that is trained."""


@functools.cache
def _registered() -> dict[str, ChatTemplate]:
    found: dict[str, ChatTemplate] = {}
    for module in pkgutil.iter_modules(templates.__path__, f"{templates.__name__}."):
        for template in importlib.import_module(module.name).TEMPLATES:
            found[template.name] = template
    return found


def register(template: ChatTemplate) -> None:
    """Add a template of a plugin. Raises ConfigError when its name is taken."""
    if template.name in (AUTO, *_registered()):
        raise ConfigError(f"the chat template {template.name} is registered already: choose another name")
    _registered()[template.name] = template


def template_names() -> list[str]:
    """Return the names of all templates."""
    return sorted(_registered())


def template_named(name: str) -> ChatTemplate:
    """Return a template; `auto` gives the one of a tokenizer that is trained. Raises ConfigError that lists them."""
    name = DEFAULT if name == AUTO else name
    if name not in _registered():
        raise ConfigError(
            f"data.tokenizer.template is {name}: give {AUTO} or one of {', '.join(template_names())}, or register it "
            "in a plugin"
        )
    return _registered()[name]


def recognised(tokens: Collection[str], *, jinja: str = "") -> ChatTemplate | None:
    """Return the template of a tokenizer from its special tokens and its Jinja template; None when it has no known one.

    A Jinja template that is exactly that of a row decides; else the first row whose tokens and forms fit.
    """
    rows = [_registered()[name] for name in template_names()]
    exact = [row for row in rows if row.jinja == jinja]
    return next(iter([*exact, *(row for row in rows if row.fits(tokens, jinja=jinja))]), None)
