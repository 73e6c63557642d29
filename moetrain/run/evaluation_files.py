"""Files of an evaluation. Its numbers and its trajectories appear together at its end; earlier ones are kept."""

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moetrain.data.tokenizer import Tokenizer
from moetrain.eval.finished import FinishedModes
from moetrain.files import remove_folder, replace_folder, write_result
from moetrain.rollout.traces import write_traces
from moetrain.rollout.types import Trajectory
from moetrain.stage_files import CONFIG, EVALUATION, TRACES

_log = logging.getLogger(__name__)

_FINISHED = "finished_modes.json"
"""Results of the modes that an interrupted evaluation has finished."""
_UNFINISHED = f"{TRACES}.unfinished"
"""Folder of the trajectories of these modes; the name of a file has the key of its mode's result."""


class EvaluationFiles:
    """The files of one evaluation in a stage folder. Only the main rank uses it."""

    def __init__(self, folder: Path, *, num_traces: int) -> None:
        """Read what a stopped evaluation has finished. num_traces: trajectories to keep per mode."""
        self.finished = FinishedModes(folder / _FINISHED)
        self._folder = folder
        self._num_traces = num_traces

    def keep_traces(self, result: str, trajectories: Sequence[Trajectory], *, tokenizer: Tokenizer) -> None:
        """Write trajectories of a mode, spread over its tasks. result: the name of the mode, and its result's key."""
        spread = trajectories[:: max(len(trajectories) // max(self._num_traces, 1), 1)]  # tasks of every length
        path = self._folder / _UNFINISHED / f"{result}.jsonl"
        write_traces(path, spread[: self._num_traces], tokenizer=tokenizer)

    def publish(self, numbers: Mapping[str, Any]) -> None:
        """Write `eval.json` and `traces/`. Earlier ones with other numbers are kept, with the config that they had."""
        partial = self._folder / f".{TRACES}.tmp"
        remove_folder(partial)
        partial.mkdir()
        for mode, path in self._traces():
            shutil.copyfile(path, partial / f"{mode}.jsonl")
        if kept := write_result(self._folder / EVALUATION, numbers, beside=(CONFIG, TRACES)):
            _log.warning("%s had other results; they are kept as %s", self._folder / EVALUATION, kept.name)
        if any(partial.iterdir()):
            replace_folder(partial, self._folder / TRACES)
        remove_folder(partial)
        remove_folder(self._folder / _UNFINISHED)
        self.finished.remove()

    def _traces(self) -> Iterator[tuple[str, Path]]:
        """Yield (mode, file of trajectories) of the modes whose results this evaluation has used."""
        for path in sorted((self._folder / _UNFINISHED).glob("*.jsonl")):
            mode, _, key = path.stem.rpartition(".")
            if key in self.finished.used:
                yield mode, path
