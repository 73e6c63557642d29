"""Starts `moetrain serve`, loads it with well-behaved and ill-behaved clients, kills it with SIGKILL in the middle and
starts it again, and checks that no request, page or event was lost.

A request may end with an answer or with an error of the API. Its connection may break only while the server is down.
"""

import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from moetrain.commands.verify import ServeFault, VerifyServeRun
from moetrain.errors import RolloutError
from moetrain.runtime import die_with_parent, free_port, python_stream
from moetrain.verify.serve_clients import Client, End, Kind, Request
from moetrain.verify.table import Row

_KINDS = {Kind.plain: 4, Kind.stream: 5, Kind.call: 3, Kind.repeat: 2, Kind.slow: 2, Kind.leave: 4, Kind.half: 1}
_WEIGHTS = _KINDS | {Kind.malformed: 3}
"""How often each kind of request is sent, in shares."""
_START_LIMIT_S = 300.0
_SETTLE_LIMIT_S = 30.0  # for cancelling abandoned requests after the load
_DRAIN_LIMIT_S = 90.0
_PAUSE_S = 0.5  # of a client whose server is down or busy
_GAUGES = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
_SHARES = (50, 95, 99)


@dataclass(kw_only=True)
class _Server:
    """A server process on one port, which can be killed and started again. outages: when it was down."""

    words: Sequence[str]
    port: int
    log: Path
    outages: list[tuple[float, float]] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process, and wait until it answers. Raises RolloutError with its last words when it ends."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "moetrain.cli", *self.words],
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        end = time.monotonic() + _START_LIMIT_S
        while True:
            try:
                self.get("/health")
                return
            except OSError:
                if self.process.poll() is not None or time.monotonic() > end:
                    last = self.log.read_text(errors="replace").strip().splitlines()[-1:]
                    raise RolloutError(f"the server did not start; its log {self.log} ends with {last}") from None
            time.sleep(0.05)

    def kill_and_restart(self) -> None:
        """Send SIGKILL, and start again on the same port."""
        assert self.process is not None
        down = time.monotonic()
        self.process.kill()
        self.process.wait()
        self.start()
        self.outages.append((down, time.monotonic()))

    def drain(self) -> int:
        """Send SIGTERM, and return the exit code; that of SIGKILL when it does not end in time."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(_DRAIN_LIMIT_S)
        except subprocess.TimeoutExpired:
            return self.end()

    def end(self) -> int:
        """Kill the process if it runs; return its exit code."""
        assert self.process is not None
        self.process.kill()
        return self.process.wait()

    def get(self, path: str) -> str:
        """Return the content of a path. Raises OSError."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as response:
            return str(response.read().decode())

    def gauges(self) -> dict[str, float]:
        """Return the gauges of sequences and pages."""
        lines = [line.rsplit(" ", 1) for line in self.get("/metrics").splitlines() if line.startswith("vllm:")]
        found = {name.split("{")[0]: float(value) for name, value in lines}
        return {name: found[name] for name in _GAUGES}


def verify_serve(run: VerifyServeRun, *, folder: Path, same_bits: bool) -> tuple[list[Row], dict[str, Any]]:
    """Return the rows, and what the clients saw.

    folder: for the server's log. same_bits: whether the tokens of a seed may not depend on the load.
    """
    port = free_port()
    words = ["serve", f"init_from={run.init_from}", f"serve.port={port}", f"serve.num_slots={max(run.clients // 2, 1)}"]
    words += [
        f"serve.max_waiting={run.clients // 4 + 1}",
        "serve.max_choices=2",
        "serve.model_name=model",
        *run.overrides,
    ]
    server = _Server(words=words, port=port, log=folder / "server.log")
    server.start()
    try:
        requests = _load(run, server)
        left = _settled(server)
        code = server.drain()
    finally:
        server.end()
    report = _report(requests, outages=server.outages)
    return _rows(requests, outages=server.outages, left=left, code=code, same_bits=same_bits), report


def _load(run: VerifyServeRun, server: _Server) -> list[Request]:
    """Return the requests of all clients, until the time is over; in the middle the server is killed."""
    client = Client(
        port=server.port,
        model="model",
        key=os.environ.get("MOETRAIN_API_KEY"),
        prompt_words=run.prompt_words,
        max_tokens=run.max_tokens,
        limit_s=run.limit_s,
        drops_ends=run.fault is ServeFault.lost_end,
    )
    start = time.monotonic()
    middle, over = threading.Event(), threading.Event()
    found: list[list[Request]] = [[] for _ in range(run.clients)]

    def use(number: int) -> None:
        while not over.is_set():
            stream = python_stream(run.run.seed, "verify serve", number, len(found[number]))
            (kind,) = stream.choices(list(_WEIGHTS), weights=list(_WEIGHTS.values()))
            found[number].append(client.use(kind, stream))
            if found[number][-1].end in (End.broken, End.refused) and kind is not Kind.malformed:
                over.wait(_PAUSE_S)

    threads = [threading.Thread(target=use, args=(number,), daemon=True) for number in range(run.clients)]
    for thread in threads:
        thread.start()
    seconds = 60 * run.minutes
    try:
        middle.wait(seconds / 2)
        server.kill_and_restart()
        middle.wait(max(seconds - (time.monotonic() - start), seconds / 2))
    finally:
        over.set()
    for thread in threads:
        thread.join()
    return [request for part in found for request in part]


def _settled(server: _Server) -> dict[str, float]:
    """Return the gauges once they are 0, or after the time that this may take."""
    end = time.monotonic() + _SETTLE_LIMIT_S
    while any((left := server.gauges()).values()) and time.monotonic() < end:
        time.sleep(0.05)
    return left


def _is_excused(request: Request, outages: Sequence[tuple[float, float]]) -> bool:
    return any(request.began < up and request.ended > down for down, up in outages)


def _rows(
    requests: Sequence[Request],
    *,
    outages: Sequence[tuple[float, float]],
    left: Mapping[str, float],
    code: int,
    same_bits: bool,
) -> list[Row]:
    broken = [each for each in requests if each.end is End.broken and not _is_excused(each, outages)]
    wrong = [each for each in requests if each.end is End.wrong]
    lost = [each for each in requests if each.end is End.lost]
    repeated = Counter(str(each.content) for each in requests if each.kind is Kind.repeat and each.end is End.answered)
    never = [kind for kind in (*_KINDS, Kind.malformed) if not any(each.kind is kind for each in requests)]
    answered = sum(each.end is End.answered for each in requests)
    rows = [
        Row(name="requests without an end", value=len(lost), bound=0, note=_first(lost)),
        Row(name="responses against the API", value=len(wrong), bound=0, note=_first(wrong)),
        Row(name="connections that broke while the server ran", value=len(broken), bound=0, note=_first(broken)),
        Row(name="sequences left in the engine", value=left[_GAUGES[0]] + left[_GAUGES[1]], bound=0),
        Row(name="share of pages left in use", value=left[_GAUGES[2]], bound=0),
        Row(name="exit code after SIGTERM", value=abs(code), bound=0),
        Row(name="kinds of requests never sent", value=len(never), bound=0, note=", ".join(never)),
        Row(name="no answer at all", value=answered == 0, bound=0, note=f"{answered} of {len(requests)} answered"),
    ]
    if same_bits:
        number = f"{repeated.total()} answers to the same request"
        rows.append(Row(name="other answers to the same seed", value=max(len(repeated) - 1, 0), bound=0, note=number))
    return rows


def _first(requests: Sequence[Request]) -> str:
    return f"first: {requests[0].kind}: {requests[0].detail}" if requests else ""


def _report(requests: Sequence[Request], *, outages: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Return the counts by kind and end, and the latencies of streams that were read at full speed, in seconds."""
    counts: dict[str, dict[str, int]] = {}
    for kind in Kind:
        counts[kind.value] = dict(Counter(each.end.value for each in requests if each.kind is kind))
    streams = [each for each in requests if each.end is End.answered and each.kind in (Kind.stream, Kind.call)]
    seen = {
        "first token": [each.token_times[0] - each.began for each in streams if each.token_times],
        "between tokens": [late - early for each in streams for early, late in pairwise(each.token_times)],
        "whole": [each.ended - each.began for each in streams],
    }
    latencies = {
        name: {f"p{share}": float(np.percentile(values, share)) for share in _SHARES}
        for name, values in seen.items()
        if values
    }
    return {"counts": counts, "latencies_s": latencies, "down_s": [up - down for down, up in outages]}
