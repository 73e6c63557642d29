"""A tokenizer with the chat template that the config names. Does not import torch."""

from pathlib import Path

from moetrain.chat.registry import AUTO, template_named
from moetrain.data.config import TokenizerConfig
from moetrain.data.tokenizer import Tokenizer


def with_named_template(tokenizer: Tokenizer, config: TokenizerConfig, *, num_rows: int | None = None) -> Tokenizer:
    """Return the tokenizer with the chat template `config.template`; `auto` keeps the one that was recognised.

    num_rows: rows of the model's embedding; None is any number. Raises ConfigError when they are too few.
    """
    if config.template == AUTO:
        return tokenizer
    return tokenizer.with_template(template_named(config.template), num_rows=num_rows)


def load_tokenizer(config: TokenizerConfig, folder: Path, *, num_rows: int | None = None) -> Tokenizer:
    """Return the tokenizer in `folder` with the chat template `config.template`. Raises as `Tokenizer.load` does."""
    return with_named_template(Tokenizer.load(folder), config, num_rows=num_rows)
