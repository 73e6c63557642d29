"""`moetrain serve`."""

import importlib.util
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from moetrain.commands.stage import check_length
from moetrain.commands.weights import ServeRun
from moetrain.errors import ConfigError, DataError

if TYPE_CHECKING:
    from moetrain.serve.server import Server

_log = logging.getLogger(__name__)
_PACKAGES = ("starlette", "uvicorn", "prometheus_client", "llguidance")


def main(run: ServeRun) -> int:
    """Serve the weights until a signal; return the exit code."""
    run.serve.check_exposure()
    server = server_of(run)
    from moetrain.serve.server import run_until_signal  # loads torch

    return run_until_signal(server)


def server_of(run: ServeRun) -> "Server":
    """Return a server of the weights, which has not started yet. Raises ConfigError when a package is missing."""
    weights = run.require_weights()
    if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"{', '.join(missing)} is not installed: install it with pip install 'moetrain[serve]'")
    # These imports load torch, so they wait until the input has been checked.
    from moetrain.inference.engine import GenerationEngine
    from moetrain.kernels.choice import find_for_generation
    from moetrain.run.weights import generation_model, read_weights, tokenizer_of
    from moetrain.serve.server import Server
    from moetrain.serve.service import Served

    origin = read_weights(weights)
    tokenizer = tokenizer_of(origin)
    try:
        tokenizer.check_chat()
    except DataError as error:
        _log.warning("chat completions are refused, and completions are served: %s", error)
    max_tokens = run.serve.max_tokens or origin.model.max_position_embeddings
    check_length(origin.model, name="serve.max_tokens", length=max_tokens)
    library = find_for_generation(run.serve.kernels)
    model = generation_model(origin, library=library, speculation=run.serve.speculation)
    served = Served(
        name=run.serve.model_name or Path(weights).resolve().name,
        tokenizer=tokenizer,
        vocab_size=origin.model.vocab_size,
        max_tokens=max_tokens,
        digest=origin.digest,
    )
    server = Server(
        served,
        config=run.serve,
        make_generation=lambda: GenerationEngine(
            model,
            num_slots=run.serve.num_slots,
            max_tokens=max_tokens,
            cache_megabytes=run.serve.cache_megabytes,
            speculation=run.serve.speculation,
        ),
    )
    _log.info("%s: %s tokens, key %s", served.name, max_tokens, "required" if run.serve.key else "not required")
    return server
