"""Output of a run: log lines, progress with the time left, and metrics as JSON lines and in W&B.

Only rank 0 creates these objects. This module does not load torch, and imports wandb only for a run that uses it.
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
"""Prefix of metrics that depend on the clock. All other metrics are reproducible."""
_WANDB_TIMEOUT_S = 20.0  # for the login and for the start of a run; then the run is written offline
_WANDB_SUMMARIES = {"loss": "min", "validation/*": "min", "reward": "max"}
"""Value that W&B's table of runs shows for a metric, where it is not the last one."""
_PLAIN_INTERVAL_S = 15.0  # between progress lines when the output is not a terminal


class WandbMode(StrEnum):
    """Where W&B writes. auto follows WANDB_MODE; without it, online when WANDB_API_KEY is set and offline otherwise."""

    auto = "auto"
    offline = "offline"
    online = "online"
    disabled = "disabled"


def setup_logging(*, rank: int = 0, level: int = logging.INFO) -> None:
    """Send log lines to stderr, coloured on a terminal and plain elsewhere. Ranks above 0 log only warnings."""
    handler: logging.Handler
    if rank == 0 and sys.stderr.isatty():
        handler = RichHandler(console=Console(stderr=True), show_path=False, log_time_format="%H:%M:%S")
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler()
        place = "" if rank == 0 else f" [rank {rank}]"
        handler.setFormatter(logging.Formatter(f"%(asctime)s{place} %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    logging.raiseExceptions = False  # a line that cannot be written, as on a stream that a plugin closed, is lost
    own = logging.getLogger("moetrain")
    own.handlers = [handler]
    own.setLevel(level if rank == 0 else logging.WARNING)


class Metrics(Protocol):
    """Destination of a step's metrics. Names are paths such as `train/loss`."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record `values` of `step`; steps must not decrease."""

    def close(self) -> None:
        """Flush and release resources."""


class JsonlMetrics:
    """Writes one JSON object per line, `{"step": 3, "loss": 5.1}`, and flushes each line.

    The first write to an existing file removes what an interrupted run wrote after its last checkpoint. It truncates
    the file at the first line that has a later step, or that has the same step and one of the same names. So the file
    contains each value once, however often the run was interrupted. `time/` names are ignored in this comparison,
    because several lines of one step contain them.
    """

    def __init__(self, path: Path) -> None:
        """Open `path`. Raises `CheckpointError` for an invalid line, except for an incomplete last line."""
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
    """Return the lines of a metrics file, without an incomplete last line that a killed run left."""
    return [row for _, row in _lines(path) if row]


def _lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Return (offset in bytes, object) of each line; an incomplete last line gives an empty object.

    Raises `CheckpointError` if a line is not a JSON object, or its step is missing or smaller than the previous one.
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
            _log.warning("%s: the last line is incomplete and is ignored", path)
            rows.append((offset, {}))
            break
        step = row.get("step")
        if not isinstance(step, int) or step < last:
            raise CheckpointError(f"{path}:{number}: step is not an integer >= {last}: repair or remove the file")
        last = step
        rows.append((offset, row))
        offset += len(line)
    return rows


def wandb_mode(mode: WandbMode) -> WandbMode:
    """Resolve `auto`: WANDB_MODE if it is set, else online with WANDB_API_KEY and offline without it.

    WANDB_DISABLED=true disables W&B if WANDB_MODE is not set. Raises `ConfigError` for an unknown WANDB_MODE.
    """
    if mode is not WandbMode.auto:
        return mode
    value = os.environ.get("WANDB_MODE", "").strip().lower()
    if value:
        modes = {"dryrun": WandbMode.offline, "run": WandbMode.online} | {each.value: each for each in WandbMode}
        if modes.get(value, WandbMode.auto) is WandbMode.auto:
            raise ConfigError(f"WANDB_MODE is {value!r}: set offline, online or disabled, or give run.wandb.mode")
        return modes[value]
    if os.environ.get("WANDB_DISABLED", "").strip().lower() in ("1", "true", "yes"):
        return WandbMode.disabled
    return WandbMode.online if os.environ.get("WANDB_API_KEY") else WandbMode.offline


class WandbMetrics:
    """Writes metrics to a W&B run whose files are in the stage folder. A stage that resumes keeps its W&B run.

    A W&B failure never ends a stage. If the server cannot be reached at the start, the run is written offline and
    `fell_back` is true. The first later failure is logged; the values of failed calls are missing in W&B only.
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
        import wandb  # the import takes a second, so only runs that use W&B pay for it

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
            _log.warning(
                "W&B cannot be reached (%s); metrics are written offline, upload them later with `wandb sync`", reason
            )
            self.fell_back = True
            wandb.teardown()  # W&B's background process still holds the run's id
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
        except Exception as error:  # W&B's code and background process may raise anything
            if not self._has_failed:
                _log.warning("W&B failed (%s); metrics.jsonl still has all metrics", " ".join(str(error).split())[:200])
            self._has_failed = True


class Fanout:
    """Writes to several destinations. `first` is added to the values of the first write."""

    def __init__(self, sinks: Sequence[Metrics], *, first: Mapping[str, float] | None = None) -> None:
        """Write to `sinks` in this order."""
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
    """Logs a progress line every `_PLAIN_INTERVAL_S` seconds, for output that is not a terminal."""

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
        note_text = f" {note}" if note else ""
        _log.info("%s %d/%d%s, %s left", self._description, self._completed, self._total, note_text, duration(left))


@contextmanager
def progress(
    total: int, description: str, *, completed: int = 0, console: Console | None = None
) -> Iterator[Callable[[str], None]]:
    """Yield a function to call after each step with a short note: `with progress(10, "sft") as advance: ...`.

    total: number of steps. completed: steps that an earlier run took. On a terminal this shows a bar with the time
    left; elsewhere it logs a line every 15 seconds and after the last step.
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
    """Format a duration as h:mm:ss or m:ss, such as `1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
