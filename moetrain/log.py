"""What a run tells: log lines, progress with time left, and metrics as JSON lines and in W&B.

Rank 0 alone makes these objects. No torch here, and wandb is imported only by a run that uses it.
"""

import json
import logging
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from moetrain.errors import CheckpointError, ConfigError
from moetrain.files import to_json

_log = logging.getLogger(__name__)

TIME_PREFIX = "time/"
"""Metrics that a clock gives; all others are the same each time a run is repeated."""
_WANDB_TIMEOUT_S = 20.0  # to log in, and to start a run, before it is written offline
_WANDB_SUMMARIES = {"loss": "min", "validation/*": "min", "reward": "max"}
"""What the table of runs shows of a metric, where that is not its last value."""
_PLAIN_INTERVAL_S = 15.0  # between lines of progress where there is no terminal


class WandbMode(StrEnum):
    """Where W&B writes. auto follows WANDB_MODE; without it, online when WANDB_API_KEY is set and offline otherwise."""

    auto = "auto"
    offline = "offline"
    online = "online"
    disabled = "disabled"


def setup_logging(*, rank: int = 0, level: int = logging.INFO) -> None:
    """Send log lines to stderr, coloured on a terminal, plain elsewhere; ranks above 0 say only warnings."""
    handler: logging.Handler
    if rank == 0 and sys.stderr.isatty():
        handler = RichHandler(console=Console(stderr=True), show_path=False, log_time_format="%H:%M:%S")
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler()
        place = "" if rank == 0 else f" [rank {rank}]"
        handler.setFormatter(logging.Formatter(f"%(asctime)s{place} %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    own = logging.getLogger("moetrain")
    own.handlers = [handler]
    own.setLevel(level if rank == 0 else logging.WARNING)


class Metrics(Protocol):
    """Takes the numbers of a step. Names are paths such as `train/loss`."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record `values` of `step`; steps do not go backwards."""

    def close(self) -> None:
        """Flush and release."""


class JsonlMetrics:
    """One JSON object a line, `{"step": 3, "loss": 5.1}`, flushed as it is written.

    The first write to a file that exists cuts off what a run that was stopped wrote beyond its last checkpoint: every
    line from the first one on that is of a later step, or of this step with one of these names. So the file holds each
    number once, however often the run was stopped. Names of times do not count: lines of one step share them.
    """

    def __init__(self, path: Path) -> None:
        """Open `path`; a broken line in it is an error, a torn last one is not."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file = path.open("a", encoding="utf-8")
        self._earlier: list[tuple[int, dict[str, Any]]] | None = _lines(path)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line."""
        if self._earlier is not None:
            names = {name for name in values if not name.startswith(TIME_PREFIX)}
            for offset, row in self._earlier:
                if not row or row["step"] > step or (row["step"] == step and names & row.keys()):
                    os.truncate(self._path, offset)
                    break
            self._earlier = None
        self._file.write(to_json({"step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics file; a last line that a killed run left torn is left out."""
    return [row for _, row in _lines(path) if row]


def _lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Return (offset in bytes, object) of each line; a torn last line is an empty object.

    Raises `CheckpointError` where a line is none, or its step is missing or smaller than that of the line before.
    """
    rows: list[tuple[int, dict[str, Any]]] = []
    offset, last = 0, 0
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError
        except ValueError:
            if number < len(lines):
                raise CheckpointError(f"{path}:{number} is not a JSON object: repair or remove the file") from None
            _log.warning("%s: the last line is torn and is left out", path)
            rows.append((offset, {}))
            break
        step = row.get("step")
        if not isinstance(step, int) or step < last:
            raise CheckpointError(f"{path}:{number}: its step is no number from {last}: repair or remove the file")
        last = step
        rows.append((offset, row))
        offset += len(line)
    return rows


def wandb_mode(mode: WandbMode) -> WandbMode:
    """Return the mode that `auto` stands for: WANDB_MODE, else online with WANDB_API_KEY and offline without."""
    if mode is not WandbMode.auto:
        return mode
    said = os.environ.get("WANDB_MODE", "").strip().lower()
    if said:
        known = {"dryrun": WandbMode.offline, "run": WandbMode.online} | {each.value: each for each in WandbMode}
        if known.get(said, WandbMode.auto) is WandbMode.auto:
            raise ConfigError(f"WANDB_MODE is {said!r}: set offline, online or disabled, or give run.wandb.mode")
        return known[said]
    if os.environ.get("WANDB_DISABLED", "").strip().lower() in ("1", "true", "yes"):
        return WandbMode.disabled
    return WandbMode.online if os.environ.get("WANDB_API_KEY") else WandbMode.offline


class WandbMetrics:
    """A W&B run whose files lie in the stage's folder; a stage that resumes keeps its W&B run.

    W&B never ends a stage. When the server cannot be reached, the run is written offline and `fell_back` is true; a
    call that fails later is logged once, and what it should have sent is missing in W&B alone.
    """

    def __init__(
        self,
        folder: Path,
        *,
        project: str,
        name: str,
        mode: WandbMode,
        config: Mapping[str, Any],
        group: str | None = None,
        job_type: str | None = None,
        tags: Sequence[str] = (),
    ) -> None:
        """Start or resume the W&B run of the stage folder; `mode` is offline or online."""
        import wandb  # a second of import time that only runs pay

        folder.mkdir(parents=True, exist_ok=True)
        id_file = folder / "wandb_id"
        run_id = id_file.read_text() if id_file.exists() else secrets.token_hex(4)
        id_file.write_text(run_id)

        def start(mode: WandbMode) -> Any:
            return wandb.init(
                project=project,
                name=name,
                id=run_id,
                group=group,
                job_type=job_type,
                tags=list(tags),
                resume="allow" if mode is WandbMode.online else None,
                dir=folder,
                config=dict(config),
                settings=wandb.Settings(
                    silent=True,
                    console="off",
                    mode=mode.value,
                    init_timeout=_WANDB_TIMEOUT_S,
                    login_timeout=_WANDB_TIMEOUT_S,
                ),
            )

        self.fell_back = False
        self._has_failed = False
        try:
            self._run = start(mode)
        except (wandb.errors.Error, OSError) as error:
            if mode is not WandbMode.online:
                raise
            reason = " ".join(str(error).split())[:200]
            _log.warning("W&B cannot be reached, so it writes offline; upload later with `wandb sync`: %s", reason)
            self.fell_back = True
            wandb.teardown()  # its process still holds the run's id
            self._run = start(WandbMode.offline)
        for pattern, summary in _WANDB_SUMMARIES.items():
            self._run.define_metric(pattern, summary=summary)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Send the values of a step."""
        self._attempt(lambda: self._run.log(dict(values), step=step))

    def close(self) -> None:
        """Finish the W&B run and wait for its files."""
        self._attempt(self._run.finish)

    def _attempt(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # another program's code and process, which may fail in any way
            if not self._has_failed:
                _log.warning(
                    "W&B failed, and what it misses is in metrics.jsonl: %s", " ".join(str(error).split())[:200]
                )
            self._has_failed = True


class Fanout:
    """Writes to several metrics. `first` is added to the first values that are written."""

    def __init__(self, sinks: Sequence[Metrics], *, first: Mapping[str, float] | None = None) -> None:
        """Pass on to `sinks`, in order."""
        self._sinks = list(sinks)
        self._first = dict(first or {})

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write to all."""
        values, self._first = {**values, **self._first}, {}
        for sink in self._sinks:
            sink.write(step, values)

    def close(self) -> None:
        """Close all."""
        for sink in self._sinks:
            sink.close()


class _PlainProgress:
    """Logs a line of progress now and then, for where there is no terminal."""

    def __init__(self, *, total: int, description: str, completed: int) -> None:
        self._total, self._description, self._completed = total, description, completed
        self._first = completed
        self._start = self._last_line = time.monotonic()

    def advance(self, note: str) -> None:
        self._completed += 1
        now = time.monotonic()
        if now - self._last_line < _PLAIN_INTERVAL_S and self._completed != self._total:
            return
        self._last_line = now
        left = (now - self._start) / (self._completed - self._first) * (self._total - self._completed)
        said = f" {note}" if note else ""
        _log.info("%s %d/%d%s, %s left", self._description, self._completed, self._total, said, duration(left))


@contextmanager
def progress(
    total: int, description: str, *, completed: int = 0, console: Console | None = None
) -> Iterator[Callable[[str], None]]:
    """Yield a function to call after each of `total` steps, of which `completed` were taken before, with a few words.

    `with progress(10, "sft") as advance: ... advance("loss 3.1")`. A bar with the time left on a terminal; elsewhere a
    log line at the end and every 15 seconds.
    """
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield _PlainProgress(total=total, description=description, completed=completed).advance
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(
        TextColumn("{task.description}"), *columns, TextColumn("{task.fields[note]}"), console=console
    ) as bar:
        task = bar.add_task(description, total=total, completed=completed, note="")
        yield lambda note: bar.update(task, advance=1, note=note)


def duration(seconds: float) -> str:
    """Return a duration as a person writes it: `1:02:03`, `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
