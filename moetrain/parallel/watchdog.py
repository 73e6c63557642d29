"""Names the step and the ranks when a collective hangs; gloo's own error says neither.

Each rank has a thread that looks at the main thread now and then: in which step it is, at which line, whether it waits
in a collective. It tells so at the store where the ranks met. A rank whose main thread has waited in a collective for
the whole `timeout_s` reads what the others told, writes one line that names those that did not arrive, and ends the
process with exit code 1, so that a launcher ends the other ranks too, and starts them again if it was told to. A rank
that tells nothing any more is stopped, or gone with its machine.

The thread ends before the interpreter does: a thread that comes back from torch's C++ into an interpreter that ends
takes the process down with SIGABRT.

It takes part in no collective. Waiting is seen from outside: the innermost Python frame lies in torch's or DeepSpeed's
collectives and the thread uses no processor time.
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
_BUSY_S = 0.02  # processor time between two looks from which on a thread computes, and does not wait
_LONGEST_INTERVAL_S = 5.0
_SHORTEST_PAUSE_S = 0.01  # between the first looks for what the main rank prepares, which often is there already
_STORE_TIMEOUT = timedelta(seconds=10)
_LAST_BEAT = -1  # of a rank that has waited for the whole time and ends: it arrived
EXIT_CODE = 1
"""Exit code of a rank that has waited too long."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a rank is. step: None before the first one. line: file and line of the caller of a collective, or of what
    runs. waits: in a collective. beat: counts the looks, so that a rank that stopped is told from one that waits."""

    step: int | None
    line: str
    waits: bool
    beat: int


class Watchdog:
    """The thread of one rank; `step` is set by the training loop."""

    def __init__(self, *, rank: int, world_size: int, timeout_s: float) -> None:
        """Watch the thread that calls this one, with a connection of its own to the store where the ranks met."""
        self.step: int | None = None
        self._beat = 0
        self._num_waits = 0
        self._rank, self._world_size, self._timeout_s = rank, world_size, timeout_s
        self._interval_s = min(_LONGEST_INTERVAL_S, timeout_s / 10)
        self._watched = threading.get_ident()
        self._clock = time.pthread_getcpuclockid(self._watched)
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._store = dist.TCPStore(  # type: ignore[attr-defined]  # torch's stubs leave it out
            address, port, is_master=False, wait_for_workers=False, timeout=_STORE_TIMEOUT
        )
        self._prefix = f"moetrain/{restart_of_shared_store()}"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        atexit.register(self._close)

    def wait_for_main(self) -> None:
        """Return when the main rank has called this as many times as this rank, however long that takes.

        It is no collective, so no timeout of one holds. The process ends with a line when the main rank gives no sign
        of life for `timeout_s`, or when the store is gone with it.
        """
        self._num_waits += 1
        key = f"{self._prefix}/main/{self._num_waits}"
        if self._rank == 0:
            self._store.set(key, "done")
            return
        told: Place | None = None
        told_at = time.monotonic()
        pause_s = _SHORTEST_PAUSE_S
        while True:
            timer = self._end_in_a_while(self._without_main(time.monotonic() - told_at))
            try:
                is_done, place = self._store.check([key]), self._place_of(0)
            except (RuntimeError, OSError) as error:  # torch's errors of a store that does not answer
                self._end(f"{self._without_main(time.monotonic() - told_at)}: {error}")
            timer.cancel()
            if is_done:
                return
            if place != told:
                told, told_at = place, time.monotonic()
            elif time.monotonic() - told_at > self._timeout_s:
                self._end(self._without_main(self._timeout_s))
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, self._interval_s)

    def _without_main(self, silent_s: float) -> str:
        return (
            f"rank {self._rank} waits for what rank 0 prepares, and rank 0 has given no sign of life for "
            f"{silent_s:.0f} s (stopped, or the process or the machine is gone)"
        )

    def _close(self) -> None:
        """End the thread before the interpreter ends; a store that does not answer is not waited for without end."""
        self._over.set()
        self._thread.join(2 * _STORE_TIMEOUT.total_seconds())

    def _watch(self) -> None:
        waiting_since = time.monotonic()
        used_s = 0.0
        while not self._over.is_set():
            now_used_s = time.clock_gettime(self._clock)
            place = self._look()
            if not place.waits or now_used_s - used_s > _BUSY_S:
                waiting_since = time.monotonic()
            used_s = now_used_s
            try:
                self._tell(place)
                if time.monotonic() - waiting_since > self._timeout_s:
                    timer = self._end_in_a_while(self._silent_store(place))
                    others = self._others()
                    if self._look().waits and time.clock_gettime(self._clock) - used_s <= _BUSY_S:
                        self._tell(replace(place, beat=_LAST_BEAT))
                        self._end(hang_message(place, others, rank=self._rank, timeout_s=self._timeout_s))
                    timer.cancel()  # the one that was late came after all
            except (RuntimeError, OSError) as error:  # torch's errors of a store that does not answer
                if time.monotonic() - waiting_since > self._timeout_s:
                    self._end(self._without_store(place, why=str(error)))
            self._over.wait(self._interval_s)

    @property
    def _longest_answer_s(self) -> float:
        return 2 * (3 * self._interval_s + 1.0) + _STORE_TIMEOUT.total_seconds()

    def _end_in_a_while(self, message: str) -> threading.Timer:
        """End this process unless cancelled: a call to a store whose process is stopped does not return."""
        timer = threading.Timer(self._longest_answer_s, self._end, args=[message])
        timer.daemon = True
        timer.start()
        return timer

    def _silent_store(self, place: Place) -> str:
        if launcher_keeps_store():
            return self._without_store(place, why=f"nothing came for {self._longest_answer_s:g} s")
        return hang_message(place, {0: None}, rank=self._rank, timeout_s=self._timeout_s)  # rank 0 keeps it

    def _without_store(self, place: Place, *, why: str) -> str:
        return (
            f"step {place.step}: rank {self._rank} has waited at {place.line} for {self._timeout_s:g} s, "
            f"and the store at {os.environ['MASTER_ADDR']}, where the ranks met, does not answer: {why}"
        )

    def _tell(self, place: Place) -> None:
        self._store.set(self._key(self._rank), json.dumps(asdict(place)))

    def _look(self) -> Place:
        frame = sys._current_frames().get(self._watched)
        inner = frame
        while inner is not None and _is_collective(inner):
            inner = inner.f_back
        line = "its end" if inner is None else f"{_short(inner.f_code.co_filename)}:{inner.f_lineno}"
        waits = frame is not None and inner is not frame
        self._beat += 1
        return Place(step=self.step, line=line, waits=waits, beat=self._beat)

    def _others(self) -> dict[int, Place | None]:
        """Return where the other ranks are; None for one that told nothing during three looks.

        This rank continues to tell meanwhile: others may be looking at it.
        """
        first = self._read()
        end = time.monotonic() + 3 * self._interval_s + 1.0
        while time.monotonic() < end and not self._over.wait(self._interval_s):
            self._tell(self._look())
        second = self._read()
        lives = {rank: place != first[rank] or (place and place.beat == _LAST_BEAT) for rank, place in second.items()}
        return {rank: place if lives[rank] else None for rank, place in second.items()}

    def _read(self) -> dict[int, Place | None]:
        return {rank: self._place_of(rank) for rank in range(self._world_size) if rank != self._rank}

    def _place_of(self, rank: int) -> Place | None:
        """Return what a rank told last; None when it has told nothing yet."""
        key = self._key(rank)
        return Place(**json.loads(self._store.get(key))) if self._store.check([key]) else None

    def _key(self, rank: int) -> str:
        return f"{self._prefix}/{rank}"

    def _end(self, message: str) -> NoReturn:
        os.write(2, f"moetrain: {message}\n".encode())  # the main thread may hold the lock of sys.stderr
        os._exit(EXIT_CODE)  # it cannot be woken up


def launcher_keeps_store() -> bool:
    """Return whether ranks meet at a store of the launcher, which outlives them; otherwise rank 0 keeps it."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def restart_of_shared_store() -> str:
    """Return which start of the ranks this is at a store that several starts share; "0" where each has a store.

    The launcher counts for itself alone. So starts share a store on one machine only: see launch/torchrun.sh.
    """
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if launcher_keeps_store() else "0"


def hang_message(own: Place, others: Mapping[int, Place | None], *, rank: int, timeout_s: float) -> str:
    """Return the line that a rank says that waits at `own`, from what the others told last (None: no sign of life)."""
    silent = [other for other, place in others.items() if place is None]
    elsewhere = {other: place for other, place in others.items() if place is not None and not place.waits}
    reasons = [f"{_ranks(silent)} no sign of life (stopped, or the machine is gone)"] if silent else []
    reasons += [f"rank {other} is at {place.line} in step {place.step}" for other, place in elsewhere.items()]
    if not reasons:
        places = {other: place for other, place in others.items() if place is not None}
        reasons = [f"rank {other} waits at {place.line} in step {place.step}" for other, place in places.items()]
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
    """Return a path from its package on."""
    parts = Path(path).parts
    return "/".join(parts[-3:])
