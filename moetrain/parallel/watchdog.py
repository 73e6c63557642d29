"""The watchdog: when a collective hangs, it names the step and the ranks that did not arrive. gloo's error does not.

Each rank has a watchdog thread that inspects the main thread at intervals: its step, its line, and whether it waits in
a collective. The thread publishes this status in the rendezvous store (torch's TCPStore). When the main thread has
waited in one collective for `timeout_s`, the watchdog reads the statuses of the other ranks, writes one line that names
the ranks that did not arrive, and ends the process with exit code 1. A launcher then ends the other ranks too, and
restarts all of them if configured to. A rank that no longer publishes is stopped, or its machine is gone.

The watchdog calls no collective. It regards the main thread as waiting if its innermost Python frame is inside a
collective of torch or DeepSpeed and it uses no processor time.

The thread must end before the interpreter does: a thread that returns from torch's C++ code while the interpreter
shuts down aborts the process with SIGABRT.
"""

import atexit
import json
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch.distributed as dist

_COLLECTIVES = ("torch/distributed/", "deepspeed/comm/", "moetrain/parallel/host_memory.py")
# A thread that used more processor time between two observations is computing, not waiting: a share of the time between
# them, but at least this many seconds.
_BUSY_SHARE, _MIN_BUSY_S = 0.05, 0.02
_MAX_INTERVAL_S = 5.0
_MIN_PAUSE_S = 0.01  # first pause of `wait_for_main`, short because the main rank is often done already
_STORE_TIMEOUT = timedelta(seconds=10)
_FINAL_HEARTBEAT = -1  # heartbeat of a rank that arrived, waited until the timeout and is ending its process
EXIT_CODE = 1
"""Exit code of a rank that ends because of a hang."""


@dataclass(frozen=True, kw_only=True)
class RankStatus:
    """What the main thread of a rank is doing.

    step: None before the first step. line: file and line of the code that runs, or of the caller of a collective.
    is_waiting: whether the main thread is in a collective. heartbeat: number of observations so far; it distinguishes
    a rank that is stopped from one that waits.
    """

    step: int | None
    line: str
    is_waiting: bool
    heartbeat: int


class Watchdog:
    """The watchdog of one rank. The training loop sets `step`."""

    def __init__(self, *, rank: int, world_size: int, timeout_s: float) -> None:
        """Start to watch the calling thread, with a separate connection to the rendezvous store."""
        self.step: int | None = None
        self._heartbeat = 0
        self._num_waits = 0
        self._rank, self._world_size, self._timeout_s = rank, world_size, timeout_s
        self._interval_s = min(_MAX_INTERVAL_S, timeout_s / 10)
        self._watched = threading.get_ident()
        self._clock = time.pthread_getcpuclockid(self._watched)
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._store = dist.TCPStore(  # type: ignore[attr-defined]  # torch's stubs leave it out
            address, port, is_master=False, wait_for_workers=False, timeout=_STORE_TIMEOUT
        )
        self._prefix = f"moetrain/{restart_of_shared_store()}"
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        atexit.register(self._close)

    def wait_for_main(self) -> None:
        """Wait until the main rank has called this as many times as this rank, without a timeout.

        Uses the store, not a collective, so the timeout of collectives does not apply. Ends the process with one line
        when the main rank publishes nothing for `timeout_s`, or when the store does not answer.
        """
        self._num_waits += 1
        key = f"{self._prefix}/main/{self._num_waits}"
        if self._rank == 0:
            self._store.set(key, "done")
            return
        last_seen: RankStatus | None = None
        changed_at = time.monotonic()
        pause_s = _MIN_PAUSE_S
        while True:
            timer = self._exit_after_delay(self._main_silent_message(time.monotonic() - changed_at))
            try:
                is_done, status = self._store.check([key]), self._status_of(0)
            except (RuntimeError, OSError) as error:  # torch's errors of a store that does not answer
                self._exit(f"{self._main_silent_message(time.monotonic() - changed_at)}: {error}")
            timer.cancel()
            if is_done:
                return
            if status != last_seen:
                last_seen, changed_at = status, time.monotonic()
            elif time.monotonic() - changed_at > self._timeout_s:
                self._exit(self._main_silent_message(self._timeout_s))
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, self._interval_s)

    def _main_silent_message(self, silent_s: float) -> str:
        return (
            f"rank {self._rank} waits for what rank 0 prepares, and rank 0 has given no sign of life for "
            f"{silent_s:.0f} s (stopped, or the process or the machine is gone)"
        )

    def _close(self) -> None:
        """Stop the thread, and wait for its end for a limited time, because the store may not answer."""
        self._stopped.set()
        self._thread.join(2 * _STORE_TIMEOUT.total_seconds())

    def _watch(self) -> None:
        waiting_since = observed_at = time.monotonic()
        used_s = 0.0
        while not self._stopped.is_set():
            is_busy = self._is_busy(used_s, since=observed_at)
            used_s, observed_at = time.clock_gettime(self._clock), time.monotonic()
            status = self._observe()
            if not status.is_waiting or is_busy:
                waiting_since = observed_at
            try:
                self._publish(status)
                if time.monotonic() - waiting_since > self._timeout_s:
                    timer = self._exit_after_delay(self._store_silent_message(status))
                    others = self._other_statuses()
                    if self._observe().is_waiting and not self._is_busy(used_s, since=observed_at):
                        self._publish(replace(status, heartbeat=_FINAL_HEARTBEAT))
                        self._exit(hang_message(status, others, rank=self._rank, timeout_s=self._timeout_s))
                    timer.cancel()  # the late rank arrived after all
            except (RuntimeError, OSError) as error:  # torch's errors of a store that does not answer
                if time.monotonic() - waiting_since > self._timeout_s:
                    self._exit(self._store_lost_message(status, why=str(error)))
            self._stopped.wait(self._interval_s)

    def _is_busy(self, used_s: float, *, since: float) -> bool:
        """Return whether the watched thread has computed since the time `since`, when it had used `used_s` seconds.

        A thread that waits polls, and wakes take processor time: up to half a millisecond each on virtual machines.
        """
        limit_s = max(_MIN_BUSY_S, _BUSY_SHARE * (time.monotonic() - since))
        return time.clock_gettime(self._clock) - used_s > limit_s

    @property
    def _max_answer_s(self) -> float:
        return 2 * (3 * self._interval_s + 1.0) + _STORE_TIMEOUT.total_seconds()

    def _exit_after_delay(self, message: str) -> threading.Timer:
        """End this process after a delay unless cancelled: calls to a store whose process is stopped do not return."""
        timer = threading.Timer(self._max_answer_s, self._exit, args=[message])
        timer.daemon = True
        timer.start()
        return timer

    def _store_silent_message(self, status: RankStatus) -> str:
        if launcher_keeps_store():
            return self._store_lost_message(status, why=f"no answer within {self._max_answer_s:g} s")
        return hang_message(status, {0: None}, rank=self._rank, timeout_s=self._timeout_s)  # rank 0 hosts the store

    def _store_lost_message(self, status: RankStatus, *, why: str) -> str:
        return (
            f"step {status.step}: rank {self._rank} has waited at {status.line} for {self._timeout_s:g} s, "
            f"and the store at {os.environ['MASTER_ADDR']}, where the ranks met, does not answer: {why}"
        )

    def _publish(self, status: RankStatus) -> None:
        self._store.set(self._key(self._rank), json.dumps(asdict(status)))

    def _observe(self) -> RankStatus:
        frame = sys._current_frames().get(self._watched)
        caller = frame
        while caller is not None and _is_collective(caller):
            caller = caller.f_back
        line = "its end" if caller is None else f"{_short(caller.f_code.co_filename)}:{caller.f_lineno}"
        is_waiting = frame is not None and caller is not frame
        self._heartbeat += 1
        return RankStatus(step=self.step, line=line, is_waiting=is_waiting, heartbeat=self._heartbeat)

    def _other_statuses(self) -> dict[int, RankStatus | None]:
        """Return the statuses of the other ranks; None for a rank that published nothing during three intervals.

        This rank continues to publish meanwhile, because other ranks may read its status.
        """
        first = self._read_others()
        end = time.monotonic() + 3 * self._interval_s + 1.0
        while time.monotonic() < end and not self._stopped.wait(self._interval_s):
            self._publish(self._observe())
        second = self._read_others()
        is_alive = {
            rank: status != first[rank] or (status and status.heartbeat == _FINAL_HEARTBEAT)
            for rank, status in second.items()
        }
        return {rank: status if is_alive[rank] else None for rank, status in second.items()}

    def _read_others(self) -> dict[int, RankStatus | None]:
        return {rank: self._status_of(rank) for rank in range(self._world_size) if rank != self._rank}

    def _status_of(self, rank: int) -> RankStatus | None:
        """Return the last status that a rank published, or None."""
        key = self._key(rank)
        return RankStatus(**json.loads(self._store.get(key))) if self._store.check([key]) else None

    def _key(self, rank: int) -> str:
        return f"{self._prefix}/{rank}"

    def _exit(self, message: str) -> NoReturn:
        os.write(2, f"moetrain: {message}\n".encode())  # the main thread may hold the lock of sys.stderr
        os._exit(EXIT_CODE)  # the main thread cannot be interrupted in a collective


def launcher_keeps_store() -> bool:
    """Return whether the launcher hosts the rendezvous store, which then outlives the ranks; otherwise rank 0 does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def restart_of_shared_store() -> str:
    """Return the number of this restart if all restarts share one store; "0" if each start has a new store.

    Each launcher counts its own restarts only, so restarts share a store on one machine only: see launch/torchrun.sh.
    """
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if launcher_keeps_store() else "0"


def hang_message(own: RankStatus, others: Mapping[int, RankStatus | None], *, rank: int, timeout_s: float) -> str:
    """Return the error line of a rank with status `own`. others: statuses of the other ranks; None: no sign of life."""
    silent = [other for other, status in others.items() if status is None]
    elsewhere = {other: status for other, status in others.items() if status is not None and not status.is_waiting}
    reasons = [f"{_ranks(silent)} no sign of life (stopped, or the machine is gone)"] if silent else []
    reasons += [f"rank {other} is at {status.line} in step {status.step}" for other, status in elsewhere.items()]
    if not reasons:
        statuses = {other: status for other, status in others.items() if status is not None}
        reasons = [f"rank {other} waits at {status.line} in step {status.step}" for other, status in statuses.items()]
        return f"step {own.step}: rank {rank} has waited at {own.line} for {timeout_s:g} s; " + "; ".join(reasons)
    missing = sorted([*silent, *elsewhere])
    return (
        f"step {own.step}: rank {rank} has waited in the collective at {own.line} for {timeout_s:g} s "
        f"(parallel.timeout_s); did not arrive: rank {', '.join(map(str, missing))}: " + "; ".join(reasons)
    )


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]} gives" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} give"


def _is_collective(frame: FrameType) -> bool:
    return any(part in frame.f_code.co_filename for part in _COLLECTIVES)


def _short(path: str) -> str:
    """Return the last three parts of a path."""
    parts = Path(path).parts
    return "/".join(parts[-3:])
