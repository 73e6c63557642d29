"""`moetrain verify endpoint`."""

import os

from rich.console import Console

from moetrain.commands.verify import VerifyEndpointRun
from moetrain.errors import ConfigError
from moetrain.files import user_path
from moetrain.run.stage import stage_folder
from moetrain.stage_files import VERIFICATION


def main(run: VerifyEndpointRun) -> int:
    """Compare two endpoints and print the table; return 0, or raise `BoundError` for a missed bound."""
    if not run.url or not run.other:
        raise ConfigError("give url=http://HOST:PORT/v1 other=http://HOST:PORT/v1, the endpoints to compare")
    # These imports load torch, so they wait until the input has been checked.
    from moetrain.serve.config import KEY_VARIABLE
    from moetrain.serve.endpoint import Endpoint
    from moetrain.tasks import registry
    from moetrain.verify.endpoint import compare, requests_of, task_requests
    from moetrain.verify.table import check_rows, render, write_rows

    if run.requests is not None:
        requests = requests_of(user_path(run.requests))[: run.num_requests]
    else:
        requests = task_requests(registry.build(run.task, run.run.seed), number=run.num_requests)
    endpoint = Endpoint(run.url, key=os.environ.get(KEY_VARIABLE))
    other = Endpoint(run.other, key=os.environ.get(f"{KEY_VARIABLE}_OTHER"))
    with stage_folder(run) as folder:
        rows, counted = compare(endpoint, other, requests=requests, run=run)
        write_rows(folder / VERIFICATION, rows=rows, context={"of": run.url, "other": run.other, **counted})
        Console().print(render(f"{run.url} against {run.other}", rows=rows))
        for name, reasons in counted["finish_reasons"].items():
            Console().print(f"{name}: {', '.join(f'{number} {reason}' for reason, number in reasons.items())}")
    check_rows(rows)
    return 0
