"""The tokenizer of a training stage: the one that its weights were trained with, the one named, or a new one.

Weights mean nothing with another tokenizer than theirs, so that is refused unless the user asks for it.
"""

import logging
from collections.abc import Iterable
from pathlib import Path

from moetrain.checkpoint.origin import TOKENIZER, Origin
from moetrain.data.build import prepare_tokenizer
from moetrain.data.config import DataConfig, TokenizerConfig
from moetrain.data.tokenizer import TOKENIZER_FILE, Tokenizer
from moetrain.errors import ConfigError

_log = logging.getLogger(__name__)

_RETRAIN = "data.tokenizer.retrain=true"


def stage_tokenizer(
    config: DataConfig, folder: Path, *, num_rows: int, origin: Origin | None, dialogue_texts: Iterable[str] = ()
) -> Tokenizer:
    """Return the tokenizer of a stage: the one named, else that of the weights, else one trained on the data.

    It is kept in `folder/tokenizer`, so that later stages need this stage's folder alone. num_rows: rows of the model's
    embedding. Raises ConfigError when it is another one than that of the weights (`check_tokenizer`).
    """
    own = folder / TOKENIZER
    keeps_theirs = origin is not None and not config.tokenizer.retrain
    if origin is not None:
        check_tokenizer(config.tokenizer, origin)
    if keeps_theirs and config.tokenizer.path is None and not (own / TOKENIZER_FILE).is_file():
        assert origin is not None and origin.tokenizer is not None  # check_tokenizer
        Tokenizer.load(origin.tokenizer).save(own)
    tokenizer = prepare_tokenizer(config, folder=own, num_rows=num_rows, dialogue_texts=dialogue_texts)
    if keeps_theirs:
        assert origin is not None
        theirs = _digest_of_theirs(origin)
        if theirs is None:
            _log.info("%s is taken as the tokenizer of the weights %s", config.tokenizer.path, origin.path)
        elif tokenizer.digest != theirs:
            raise ConfigError(
                f"{own} holds another tokenizer than that of the weights {origin.path}: give another run.stage or "
                f"run.name, or {_RETRAIN} to train on with it"
            )
    if not (own / TOKENIZER_FILE).is_file():
        tokenizer.save(own)
    return tokenizer


def check_tokenizer(config: TokenizerConfig, origin: Origin) -> None:
    """Raise ConfigError when training on from `origin` would change the tokenizer and the user did not ask for it."""
    if config.retrain:
        return
    if config.path is None:
        if origin.tokenizer is None:
            raise ConfigError(
                f"{origin.path} has no tokenizer beside its weights: copy theirs there, name it as "
                f"data.tokenizer.path, or give {_RETRAIN} to train on with a new one, whose tokens they do not know"
            )
        return
    theirs = _digest_of_theirs(origin)
    if theirs is not None and Tokenizer.load(Path(config.path).expanduser()).digest != theirs:
        raise ConfigError(
            f"data.tokenizer.path is {config.path}: that is another tokenizer than that of the weights {origin.path}; "
            f"leave data.tokenizer.path out, or give {_RETRAIN} to train on with a tokenizer that they do not know"
        )


def _digest_of_theirs(origin: Origin) -> str | None:
    """Return the digest of the tokenizer that the weights were trained with; None when that is not known."""
    return Tokenizer.load(origin.tokenizer).digest if origin.tokenizer is not None else origin.tokenizer_digest
