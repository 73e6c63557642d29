"""The thread that steps a `Generation`, and the jobs that the server's event loop hands to it.

The event loop and the thread share nothing but two queues: commands go in, and the tokens of each step come out. A job
is a sequence; only the thread touches it once it is submitted.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from moetrain.inference.protocol import Generation, Sequence
from moetrain.serve.job import Job, Token, Update
from moetrain.serve.metrics import ServeMetrics

_log = logging.getLogger(__name__)
_FAILED = "the engine failed"


@dataclass(frozen=True, kw_only=True)
class _Command:
    act: str
    job: Job


class EngineThread:
    """Steps a generation while it has jobs, and waits otherwise. Jobs are submitted and cancelled from one event loop.

    When a step fails, all jobs end with a problem, and `make` builds a new generation for later ones. When that fails
    too, the thread ends.
    """

    def __init__(self, make: Callable[[], Generation], *, metrics: ServeMetrics) -> None:
        self._make = make
        self._metrics = metrics
        self._commands: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()
        self._jobs: dict[Sequence, Job] = {}
        self._generation: Generation | None = make()
        self._is_broken = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="engine")

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs, and has not failed."""
        return self._thread.is_alive() and not self._is_broken

    def start(self) -> None:
        """Start the thread, and send updates to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Add a job."""
        self._commands.put(_Command(act="add", job=job))
        if self._is_broken:  # nobody may read the command any more; a second problem of a job is ignored
            self._send([(job, Update(is_ended=True, problem=_FAILED))])

    def cancel(self, job: Job) -> None:
        """End a job. Does nothing if it has ended."""
        self._commands.put(_Command(act="cancel", job=job))

    def stop(self) -> None:
        """End the thread after its present step."""
        self._commands.put(None)
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        while self._generation is not None:
            while not self._generation.is_busy or not self._commands.empty():
                command = self._commands.get()
                if command is None:
                    return
                self._apply(command, self._generation)
                self._report_load(self._generation)
            try:
                self._step(self._generation)
            except Exception:  # whatever a step raises, the server goes on with a new generation
                _log.exception("a generation step failed: all running requests end with an error")
                self._generation = None  # frees its cache before another one is made
            if self._generation is None:
                self._fail_jobs()
                self._generation = self._made_again()
            if self._generation is not None:
                self._report_load(self._generation)

    def _made_again(self) -> Generation | None:
        try:
            return self._make()
        except Exception:  # such as too little memory
            _log.exception("the engine cannot be built again: restart the server")
        self._is_broken = True
        while not self._commands.empty():
            command = self._commands.get()
            if command is not None and command.act == "add":
                self._jobs[command.job.sequence] = command.job
        self._fail_jobs()
        self._metrics.set_load(running=0, waiting=0)
        return None

    def _fail_jobs(self) -> None:
        jobs, self._jobs = list(self._jobs.values()), {}
        self._send([(job, Update(is_ended=True, problem=_FAILED)) for job in jobs])

    def _report_load(self, generation: Generation) -> None:
        num_running = sum(job.begun is not None for job in self._jobs.values())
        self._metrics.set_load(running=num_running, waiting=len(self._jobs) - num_running)
        self._metrics.observe_engine(generation.counts)

    def _apply(self, command: _Command, generation: Generation) -> None:
        job = command.job
        if command.act == "cancel":
            if self._jobs.pop(job.sequence, None) is not None:
                generation.cancel(job.sequence)
                self._metrics.observe_end(job, now=time.monotonic())
            return
        try:
            generation.add(job.sequence)
        except Exception as error:  # one bad sequence must not end the others
            _log.exception("a sequence was not accepted")
            self._send([(job, Update(is_ended=True, problem=f"not accepted: {error}"))])
            return
        self._jobs[job.sequence] = job

    def _step(self, generation: Generation) -> None:
        start = time.monotonic()
        ended = generation.step()
        now = time.monotonic()
        updates = []
        num_new = 0
        for sequence, job in list(self._jobs.items()):
            if job.begun is None and (sequence.num_fed or len(sequence.tokens) > job.num_sent):
                job.begun = start
                self._metrics.observe_begin(job, num_cached=sequence.num_cached)
            is_ended = sequence in ended
            if len(sequence.tokens) > job.num_sent or is_ended:
                update = _update(sequence, since=job.num_sent, is_ended=is_ended)
                num_new += len(update.tokens)
                job.num_sent = len(sequence.tokens)
                self._metrics.observe_tokens(job, number=len(update.tokens), now=now)
                updates.append((job, update))
            if is_ended:
                generation.cancel(sequence)
                del self._jobs[sequence]
                self._metrics.observe_end(job, now=now)
        self._metrics.observe_step(num_new)
        self._send(updates)

    def _send(self, updates: list[tuple[Job, Update]]) -> None:
        if not updates or self._loop is None or self._loop.is_closed():
            return

        def deliver() -> None:
            for job, update in updates:
                job.updates.put_nowait((job, update))

        try:
            self._loop.call_soon_threadsafe(deliver)
        except RuntimeError:  # the loop was closed in between
            _log.info("the server has stopped: the last tokens have no reader")


def _update(sequence: Sequence, *, since: int, is_ended: bool) -> Update:
    tokens = tuple(
        Token(
            id=sequence.tokens[position],
            logprob=sequence.logprobs[position],
            free_logprob=sequence.free_logprobs.get(position),
            alternatives=sequence.alternatives.get(position, ()),
        )
        for position in range(since, len(sequence.tokens))
    )
    return Update(tokens=tokens, is_ended=is_ended)
