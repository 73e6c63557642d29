"""The tokenizer of a training stage: the one configured, that of the initial weights, or a new one.

Weights are useless with another tokenizer than their own, so a change is refused unless the user requests it.
"""

import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from moetrain.chat.registry import AUTO
from moetrain.checkpoint.origin import TOKENIZER, Origin
from moetrain.data.build import prepare_tokenizer
from moetrain.data.chat_tokenizer import load_tokenizer
from moetrain.data.config import DataConfig, TokenizerConfig
from moetrain.data.store.index import prepared_folders
from moetrain.data.tokenizer import TOKENIZER_FILE, Tokenizer
from moetrain.errors import ConfigError
from moetrain.files import user_path
from moetrain.model.config import ModelConfig

_log = logging.getLogger(__name__)

_RETRAIN = "data.tokenizer.retrain=true"


def stage_tokenizer(
    config: DataConfig, folder: Path, *, num_rows: int, origin: Origin | None, dialogue_texts: Iterable[str] = ()
) -> Tokenizer:
    """Return the tokenizer of a stage: the one configured, else that of the weights, else one trained on the data.

    It is saved in `folder/tokenizer`, so that later stages need only this stage's folder. num_rows: rows of the model's
    embedding. Raises ConfigError if it differs from the tokenizer of the weights (`check_tokenizer`).
    """
    own_folder = folder / TOKENIZER
    keeps_tokenizer = origin is not None and not config.tokenizer.retrain
    if origin is not None:
        check_tokenizer(config.tokenizer, origin)
    if keeps_tokenizer and config.tokenizer.path is None and not (own_folder / TOKENIZER_FILE).is_file():
        assert origin is not None and origin.tokenizer is not None  # ensured by check_tokenizer
        load_tokenizer(config.tokenizer, origin.tokenizer, num_rows=num_rows).save(own_folder)
    tokenizer = prepare_tokenizer(config, folder=own_folder, num_rows=num_rows, dialogue_texts=dialogue_texts)
    if keeps_tokenizer:
        assert origin is not None
        expected_digest = _expected_digest(origin, config.tokenizer, num_rows=num_rows)
        if expected_digest is None:
            _log.info("assuming that %s is the tokenizer of the weights %s", config.tokenizer.path, origin.path)
        elif tokenizer.digest != expected_digest:
            raise ConfigError(
                f"{own_folder} contains another tokenizer than that of the weights {origin.path}: "
                f"give another run.stage or run.name, or {_RETRAIN} to train the weights with it"
            )
    if not (own_folder / TOKENIZER_FILE).is_file() or _lacks_template(own_folder, tokenizer, config.tokenizer):
        tokenizer.save(own_folder)
    return tokenizer


def fitted_model(model: ModelConfig, data: DataConfig, *, tokenizer: Tokenizer) -> ModelConfig:
    """Return the model, with as many rows as a tokenizer that was trained for it has tokens, if those are fewer.

    The model is returned as it is if `data.tokenizer.shrink_model` is not set, or if the tokenizer is that of a
    prepared source.
    """
    is_own = not prepared_folders(data)
    if not (data.tokenizer.shrink_model and is_own and tokenizer.vocab_size < model.vocab_size):
        return model
    _log.info(
        "the tokenizer has only %d tokens: data.tokenizer.vocab_size and model.vocab_size are reduced from %d",
        *(tokenizer.vocab_size, model.vocab_size),
    )
    return replace(model, vocab_size=tokenizer.vocab_size)


def _lacks_template(folder: Path, tokenizer: Tokenizer, config: TokenizerConfig) -> bool:
    """Return whether the folder has the same tokenizer without the chat template that the config names."""
    return config.template != AUTO and load_tokenizer(config, folder).digest == tokenizer.digest


def _expected_digest(origin: Origin, config: TokenizerConfig, *, num_rows: int) -> str | None:
    """Return the digest of the weights' tokenizer, with the tokens of a named chat template; None if unknown."""
    if origin.tokenizer is not None:
        return load_tokenizer(config, origin.tokenizer, num_rows=num_rows).digest
    return origin.tokenizer_digest if config.template == AUTO else None


def check_tokenizer(config: TokenizerConfig, origin: Origin) -> None:
    """Raise ConfigError if training from `origin` would change the tokenizer and the user did not request it.

    Also if the model is to shrink, because its rows are those of the weights.
    """
    if config.shrink_model:
        raise ConfigError(
            f"data.tokenizer.shrink_model is true, and the weights {origin.path} have {origin.model.vocab_size} rows: "
            "leave it out, because the shape comes from the weights"
        )
    if config.retrain:
        return
    if config.path is None:
        if origin.tokenizer is None:
            raise ConfigError(
                f"{origin.path} has no tokenizer beside its weights: copy their tokenizer there, name it as "
                f"data.tokenizer.path, or give {_RETRAIN} to train them with a new tokenizer, which they do not know"
            )
        return
    expected_digest = _tokenizer_digest(origin)
    if expected_digest is not None and Tokenizer.load(user_path(config.path)).digest != expected_digest:
        raise ConfigError(
            f"data.tokenizer.path is {config.path}, which is not the tokenizer of the weights {origin.path}: "
            f"leave data.tokenizer.path out, or give {_RETRAIN} to train them with a tokenizer that they do not know"
        )


def _tokenizer_digest(origin: Origin) -> str | None:
    """Return the digest of the tokenizer that the weights were trained with, or None if unknown."""
    return Tokenizer.load(origin.tokenizer).digest if origin.tokenizer is not None else origin.tokenizer_digest
