"""Reads the files of a tokenizer's folder: names of special tokens, the chat template, and settings."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as HFTokenizer

from moetrain.chat.pieces import BOS, EOS, PAD, UNK
from moetrain.errors import DataError

TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
CONFIG_KEYS = {BOS: "bos_token", EOS: "eos_token", PAD: "pad_token", UNK: "unk_token"}
"""Key of `tokenizer_config.json` for each role; its value is the name of the token that has the role."""

_log = logging.getLogger(__name__)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises DataError that names the path and line."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 at byte {error.start}: copy the tokenizer there again") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path} line {error.lineno} is not JSON: {error.msg}; copy the file again") from error
    except RecursionError as error:
        raise DataError(f"{path} is nested too deeply: copy the file again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds {type(content).__name__} where an object is expected; copy the file again")
    return content


def _end_in(folder: Path, there: Mapping[Any, Any]) -> str | None:
    """Return the end of a document that the config of a model names by its id. there: added tokens by id."""
    for name in ("config.json", "generation_config.json"):
        stated = read_json(folder / name).get("eos_token_id") if (folder / name).is_file() else None
        first = stated[0] if isinstance(stated, list) and stated else stated
        if isinstance(first, int) and isinstance(there.get(first), str):
            return str(there[first])
    return None


def names_in(path: Path, content: Mapping[str, Any]) -> dict[str, str]:
    """Return this tokenizer's names of `[BOS]` and other special tokens, for those that it names otherwise."""
    config = read_json(path) if path.is_file() else {}
    added = content.get("added_tokens")
    tokens = [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    there = {token.get("content") for token in tokens}
    names = {}
    for name, key in CONFIG_KEYS.items():
        entry = config.get(key)
        own_name = entry.get("content") if isinstance(entry, dict) else entry
        if name not in there and isinstance(own_name, str):
            names[name] = own_name
    if EOS not in there and EOS not in names:
        end = _end_in(path.parent, {token.get("id"): token.get("content") for token in tokens})
        names |= {EOS: end} if end else {}
    return names


def jinja_in(folder: Path) -> str:
    """Return the Jinja chat template beside a tokenizer, or "" when there is none.

    Of several templates with names it is the one named default, as in transformers, or the only one.
    """
    path = folder / CHAT_TEMPLATE_FILE
    if path.is_file():
        return path.read_text(encoding="utf-8", errors="replace")
    config = folder / TOKENIZER_CONFIG_FILE
    jinja = read_json(config).get("chat_template") if config.is_file() else None
    if isinstance(jinja, list):  # of {"name": ..., "template": ...}
        named = {item.get("name"): item.get("template") for item in jinja if isinstance(item, dict)}
        jinja = named.get("default") or (next(iter(named.values())) if len(named) == 1 else None)
        if len(named) > 1:
            used = "default" if jinja else "none of them"
            _log.warning("%s has chat templates named %s: %s is used", config, ", ".join(map(str, named)), used)
    return jinja if isinstance(jinja, str) else ""


def check_ids(inner: HFTokenizer, content: Mapping[str, Any]) -> None:
    """Raise DataError when the library gives an added token another id than the file, as it does after a gap."""
    for token in content.get("added_tokens") or []:
        read = inner.token_to_id(token["content"])
        if read != token["id"]:
            raise DataError(
                f"the file gives {token['content']} the id {token['id']} and the library reads {read}: the ids of "
                "added tokens must follow the vocabulary without a gap"
            )


def switch_off(content: dict[str, Any]) -> list[str]:
    """Remove truncation, padding and dropout from a tokenizer's content; return the names of those it had."""
    switched_off = [key for key in ("truncation", "padding") if content.get(key)]
    content |= dict.fromkeys(switched_off)
    model = content.get("model")
    if isinstance(model, dict) and model.get("dropout"):
        model["dropout"] = None
        switched_off.append("dropout")
    return switched_off
