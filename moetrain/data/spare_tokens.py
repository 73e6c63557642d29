"""Adds special tokens to a tokenizer that was read, in rows of the vocabulary that no text uses.

Released vocabularies have such rows: reserved tokens, such as `<|reserved_token_163700|>`, which take the new names,
and padding rows of the embedding after the last token. All other ids are unchanged.
"""

import json
import logging
import re
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer as HFTokenizer

from moetrain.errors import ConfigError

_log = logging.getLogger(__name__)
_RESERVED = re.compile(r"[<\[].*(reserved|unused|place.?holder|extra_\d).*[>\]]", re.IGNORECASE)


def with_tokens(inner: HFTokenizer, names: Sequence[str], *, num_rows: int | None) -> HFTokenizer:
    """Return `inner` with the special tokens `names`, in reserved tokens first and then in rows after the last id.

    num_rows: rows of the embedding; None is any number. Raises ConfigError when there are too few.
    """
    content: dict[str, Any] = json.loads(inner.to_str())
    added = content["added_tokens"]
    reserved = [token for token in added if _RESERVED.fullmatch(token["content"])]
    num_tokens = max(inner.get_vocab(with_added_tokens=True).values()) + 1
    num_more = max(len(names) - len(reserved), 0)
    if num_rows is not None and num_tokens + num_more > num_rows:
        raise ConfigError(
            f"the tokenizer lacks {len(names)} tokens of the chat template ({', '.join(names)}), it has "
            f"{len(reserved)} reserved tokens, and model.vocab_size leaves {num_rows - num_tokens} rows: name another "
            f"data.tokenizer.template, or, for new weights, set model.vocab_size to {num_tokens + num_more} or more"
        )
    for name, token in zip(names, reserved, strict=False):
        _log.info("special token %s takes the id %d of %s", name, token["id"], token["content"])
        vocabulary = content["model"].get("vocab")
        if isinstance(vocabulary, dict) and token["content"] in vocabulary:
            vocabulary[name] = vocabulary.pop(token["content"])
        token |= {"content": name, "special": True, "normalized": False}
    for place, name in enumerate(names[len(reserved) :]):
        _log.info("special token %s takes the unused row %d", name, num_tokens + place)
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added.append({"id": num_tokens + place, "content": name, "special": True, **flags})
    return HFTokenizer.from_str(json.dumps(content))
