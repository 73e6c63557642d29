"""Saving in the background: the state is copied, a thread per rank writes that rank's part, and training continues.

Methods of `Saver` that communicate must be called by all ranks at the same point, and all ranks agree on whether a save
is in progress; the threads themselves do not communicate. A save is finished at the first step boundary at which all
threads are done: the main rank then gives the checkpoint its final name (`checkpoint.write` documents the order).
"""

import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from moetrain.checkpoint.write import Retention, begin, commit, write_part
from moetrain.errors import CheckpointError, DivergenceError, SaveError
from moetrain.parallel.protocol import Engine, Piece
from moetrain.parallel.topology import Topology

CURE = "free some space or give another run.folder, and start again; the last good checkpoint is unchanged"


@dataclass(kw_only=True)
class _Pending:
    """A save in progress: its step, the folder it writes to, the content of its state.json, and this rank's thread."""

    step: int
    partial: Path
    state: Mapping[str, Any]
    future: Future[None]


class Saver:
    """Writes the checkpoints of one run, one at a time. waited_s: seconds that training waited for it."""

    def __init__(self, topology: Topology, folder: Path, *, retention: Retention) -> None:
        """Save into `folder`, which must be visible to all ranks."""
        self._topology = topology
        self._folder = folder
        self._retention = retention
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: _Pending | None = None
        self.waited_s = 0.0

    def __enter__(self) -> "Saver":
        """Return this saver."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish the save in progress; after an error that may have hit only this rank, just wait for this rank's
        thread.

        In that case the folder stays incomplete, and the next start removes it. A DivergenceError hits all ranks.
        """
        if error is None or isinstance(error, DivergenceError) or self._topology.world_size == 1:
            self.finish()
        self._threads.shutdown()

    def begin(self, engine: Engine, *, step: int, state: Mapping[str, Any]) -> None:
        """Begin to save the engine's state as checkpoint `step`, after finishing the previous save. Collective.

        state: content of state.json. Raises CheckpointError on every rank if this save or the previous one cannot write
        a file; existing checkpoints are unchanged, and nothing incomplete gets a final name.
        """
        self.finish()
        start = time.perf_counter()
        partial = self._on_main(lambda: begin(self._folder, step), step=step)
        pieces = [_copy(piece) for piece in engine.pieces(with_optimizer=True)]
        future = self._threads.submit(write_part, partial, pieces, rank=self._topology.rank)
        self._pending = _Pending(step=step, partial=partial, state=state, future=future)
        self.waited_s += time.perf_counter() - start

    def poll(self) -> None:
        """Finish the save in progress if all ranks have written their parts; call this at every step boundary.
        Collective.

        Raises the same errors as `begin`.
        """
        if self._pending is None:
            return
        start = time.perf_counter()
        is_writing = torch.tensor(0.0 if self._pending.future.done() else 1.0)
        if float(self._topology.all_reduce_max(is_writing)) == 0.0:
            self._complete(self._pending)
        self.waited_s += time.perf_counter() - start

    def finish(self) -> None:
        """Wait until the save in progress, if any, is complete. Collective; raises the same errors as `begin`."""
        if self._pending is None:
            return
        start = time.perf_counter()
        self._complete(self._pending)
        self.waited_s += time.perf_counter() - start

    def take_waited_s(self) -> float:
        """Return the seconds that training waited since the last call."""
        waited_s, self.waited_s = self.waited_s, 0.0
        return waited_s

    def _complete(self, pending: _Pending) -> None:
        self._pending = None
        error = pending.future.exception()  # waits for the thread
        failures = self._topology.gather_objects(None if error is None else f"{type(error).__name__}: {error}")
        failed = next((rank for rank, failure in enumerate(failures or ()) if failure is not None), None)

        def commit_parts() -> Path:
            if failures is not None and failed is not None:
                raise CheckpointError(f"rank {failed} could not write its part: {failures[failed]}")
            num_parts = self._topology.world_size
            return commit(
                pending.partial, pending.step, num_parts=num_parts, state=pending.state, retention=self._retention
            )

        self._on_main(commit_parts, step=pending.step, partial=pending.partial)

    def _on_main(self, work: Callable[[], Path], *, step: int, partial: Path | None = None) -> Path:
        """Return on every rank the result of `work` on the main rank; if it fails, remove `partial` and raise on every
        rank.
        """
        path = self._folder
        failure: str | None = None
        if self._topology.is_main:
            try:
                path = work()
            except Exception as error:  # any error, because the other ranks wait for the broadcast
                is_user_error = isinstance(error, OSError | CheckpointError)
                failure = f"{error}" if is_user_error else f"{type(error).__name__}: {error}"
                if partial is not None:
                    shutil.rmtree(partial, ignore_errors=True)  # the next start removes what remains
        path, failure = self._topology.broadcast_object((path, failure))
        if failure is not None:
            raise SaveError(f"{self._folder}: checkpoint {step} was not written: {failure}; {CURE}")
        return path


def _copy(piece: Piece) -> Piece:
    return replace(piece, values_P=piece.values_P.detach().to("cpu", copy=True))
