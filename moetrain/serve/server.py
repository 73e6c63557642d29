"""Runs the application: a listening socket, the event loop in a thread of its own, and the end on signals.

The main thread only waits for signals. After the first one, new requests get 503 and running ones finish; the second
one ends at once.
"""

import asyncio
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable

import uvicorn

from moetrain.errors import ConfigError
from moetrain.inference.protocol import Generation
from moetrain.serve.app import build_app
from moetrain.serve.config import ServeConfig
from moetrain.serve.engine_thread import EngineThread
from moetrain.serve.metrics import ServeMetrics
from moetrain.serve.service import Served, Service

_log = logging.getLogger(__name__)
_BACKLOG = 1024
_KEEP_ALIVE_S = 30
_POLL_S = 0.5
_DRAIN_POLL_S = 0.02
_CLOSING_S = 2
"""Seconds that the responses of the last requests have to reach their clients."""
_FORCED_S = 2.0


class Server:
    """A server on a bound socket, at the address `url`. `start` returns when it answers requests."""

    def __init__(self, served: Served, *, config: ServeConfig, make_generation: Callable[[], Generation]) -> None:
        """Bind the socket, and prepare the engine. Raises ConfigError when the address cannot be used."""
        self._socket = _bound(config)
        host, port = self._socket.getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        metrics = ServeMetrics(model_name=served.name)
        self._engine = EngineThread(make_generation, metrics=metrics)
        self._service = Service(served, config=config, engine=self._engine, metrics=metrics)
        settings = uvicorn.Config(
            build_app(self._service, config),
            http="h11",
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            log_level=logging.ERROR,  # what clients get wrong is counted, and is no line of the log
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=_CLOSING_S,
        )
        self._max_drain_s = config.max_drain_s
        self._server = uvicorn.Server(settings)
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True, name="server")

    @property
    def is_running(self) -> bool:
        """Whether the server still answers or finishes requests."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the threads, and wait until requests are accepted."""
        self._thread.start()
        self._started.wait()

    def drain(self) -> None:
        """Refuse new requests with 503; when the running ones have finished, close the socket and end."""
        self._service.is_draining = True

    def stop(self) -> None:
        """End at once, with running requests unanswered."""
        self.drain()
        self._server.should_exit = self._server.force_exit = True

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until the server has ended."""
        self._thread.join(timeout_s)

    async def _main(self) -> None:
        self._engine.start()
        try:
            serving = asyncio.ensure_future(self._server.serve(sockets=[self._socket]))
            while not self._server.started and not serving.done():
                await asyncio.sleep(0.005)
            self._started.set()
            await self._drained(serving)
            self._server.should_exit = True
            await serving
        finally:
            self._started.set()
            self._service.close()
            self._engine.stop()

    async def _drained(self, serving: "asyncio.Future[None]") -> None:
        """Wait until the server was told to drain and no request runs, or `max_drain_s` later; or until it ended."""
        while not (self._service.is_draining or serving.done()):
            await asyncio.sleep(_DRAIN_POLL_S)
        end = time.monotonic() + self._max_drain_s
        while self._service.num_jobs and time.monotonic() < end and not serving.done():
            await asyncio.sleep(_DRAIN_POLL_S)
        self._service.abort()


def run_until_signal(server: Server) -> int:
    """Start the server, and return the exit code when a signal has ended it: 0 after a drain."""
    signals: list[int] = []

    def on_signal(number: int, _: object) -> None:
        signals.append(number)
        if len(signals) == 1:
            _log.info("stopping: running requests may finish; another signal stops at once")
            server.drain()
        else:
            server.stop()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.start()
        _log.info("listening on %s/v1", server.url)
        while server.is_running:
            server.wait(_FORCED_S if len(signals) > 1 else _POLL_S)
            if len(signals) > 1:
                break
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 + signals[-1] if len(signals) > 1 else 0


def _bound(config: ServeConfig) -> socket.socket:
    try:
        family = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family[0], socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(family[4])
        bound.listen(_BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"serve.host is {config.host} and serve.port {config.port}: {error.strerror or error}; give another port "
            "(0 takes a free one) or an address of this machine"
        ) from None
    return bound
