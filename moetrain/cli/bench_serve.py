"""`moetrain bench serve`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console

from moetrain.commands.bench import BenchServeRun
from moetrain.errors import ConfigError
from moetrain.files import write_result
from moetrain.run.stage import stage_folder

if TYPE_CHECKING:
    from moetrain.serve.endpoint import Endpoint

_WIDTH = 130  # of the table in characters, also when the output is not a terminal


def main(run: BenchServeRun) -> int:
    """Measure an endpoint, print the table and write bench.json. Checks no bound; returns 0."""
    if (run.url is None) == (run.init_from is None):
        raise ConfigError(f"url is {run.url} and init_from is {run.init_from}: give one of the two")
    from moetrain.bench.serve import bench_serve, render

    with stage_folder(run) as folder, _endpoint(run) as endpoint:
        rows = bench_serve(run, endpoint=endpoint)
        write_result(folder / "bench.json", {"of": run.url or run.init_from, "rows": rows})
        title = f"{run.url or run.init_from}; times in ms: p50 / p95 / p99"
        Console(width=_WIDTH).print(render(rows, title=title))
        for row in rows:
            if row["first_failure"]:
                Console(width=_WIDTH).print(f"{row['clients']} clients, first failure: {row['first_failure']}")
    return 0


@contextmanager
def _endpoint(run: BenchServeRun) -> Iterator["Endpoint"]:
    """Yield the endpoint of `url`, or a server of `init_from` that runs as long as the context."""
    from moetrain.cli.serve import server_of
    from moetrain.commands.weights import ServeRun
    from moetrain.serve.config import KEY_VARIABLE, ServeConfig
    from moetrain.serve.endpoint import Endpoint

    if run.url is not None:
        yield Endpoint(run.url, key=os.environ.get(KEY_VARIABLE))
        return
    most = max(run.clients)
    config = ServeConfig(port=0, num_slots=most, max_waiting=most, max_choices=1)
    server = server_of(ServeRun(init_from=run.init_from, serve=config))
    server.start()
    try:
        yield Endpoint(f"{server.url}/v1", key=config.key)
    finally:
        server.stop()
        server.wait()
