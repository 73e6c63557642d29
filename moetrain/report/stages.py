"""Reads the folder of a run: the files of each stage, and which stage trained the weights that another stage uses.

The kind of a stage follows from the sections of its `config.yaml` and not from its name, so that any recipe can be
reported. A file that a stage has not written yet is empty here. A file that cannot be read is an error that names it.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml

from moetrain.errors import ConfigError, DataError
from moetrain.files import user_path
from moetrain.log import read_metrics
from moetrain.report.shapes import (
    CONFIG_SHAPE,
    DONE_SHAPE,
    EVALUATION_SHAPE,
    EXPORT_SHAPE,
    MADE_BY_SHAPE,
    SUMMARY_SHAPE,
    VERIFICATION_SHAPE,
    Schema,
    validated,
    validated_metrics,
)
from moetrain.stage_files import CONFIG, DONE, EVALUATION, EXPORT_RECORD, MADE_BY, METRICS, SUMMARY, VERIFICATION


class Kind(StrEnum):
    """What a stage does."""

    training = "training"
    rl = "rl"
    export = "export"
    evaluation = "evaluation"
    other = "other"


_SECTIONS = {"rl": Kind.rl, "eval": Kind.evaluation, "export": Kind.export, "optim": Kind.training}
"""Kind of a stage by the section of its config that determines it; the first match counts."""


@dataclass(kw_only=True)
class Stage:
    """One stage, read from its folder.

    trained_by: name of the stage that trained its weights; its own name when it trains. weights: name of those weights,
    unique among the stages of this kind.
    """

    name: str
    folder: Path
    kind: Kind
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    summary: dict[str, Any]
    """`summary.json`."""
    evaluation: dict[str, Any]
    """`eval.json`."""
    export: dict[str, Any]
    """`model/moetrain.json`."""
    verification: dict[str, Any]
    """`verify.json`."""
    done: dict[str, Any]
    """`done.json`, which `moetrain run` writes."""
    made_by: dict[str, Any]
    """`made_by.json`: version, date, machine."""
    trained_by: str
    weights: str

    @property
    def is_finished(self) -> bool:
        """Whether the stage wrote its last file."""
        last = {Kind.evaluation: self.evaluation, Kind.other: self.verification or self.done}
        return bool(last.get(self.kind, self.summary))

    def values(self, name: str) -> list[tuple[float, float]]:
        """Return (step, value) of a metric, in the order in which they were written."""
        return [(row["step"], row[name]) for row in self.metrics if name in row]

    def metric_names(self, prefix: str) -> list[str]:
        """Return the names of metrics that begin with `prefix`, in order of first appearance."""
        return list(dict.fromkeys(name for row in self.metrics for name in row if name.startswith(prefix)))


@dataclass(kw_only=True)
class Run:
    """A run: its stages in order, and the names of those that have not begun."""

    name: str
    stages: list[Stage]
    missing: list[str]

    def of_kind(self, *kinds: Kind) -> list[Stage]:
        """Return the stages of these kinds, in order."""
        return [stage for stage in self.stages if stage.kind in kinds]

    @property
    def trained(self) -> list[Stage]:
        """Return the stages that train, RL included."""
        return self.of_kind(Kind.training, Kind.rl)

    @property
    def evaluations(self) -> list[Stage]:
        """Return the evaluations that have numbers."""
        return [stage for stage in self.of_kind(Kind.evaluation) if stage.evaluation]

    @property
    def unfinished(self) -> list[str]:
        """Return the names of the stages that have not finished, with a note if they have not begun."""
        begun = [stage.name for stage in self.stages if not stage.is_finished]
        return [*(f"{name} (not begun)" for name in self.missing), *begun]

    @property
    def weights_format(self) -> str:
        """Return the format of the weights that were evaluated, such as `INT4`; several are joined by `and`."""
        names = dict.fromkeys(stage.evaluation.get("weights_format", "int4") for stage in self.evaluations)
        return " and ".join(name if name == "bf16" else name.upper() for name in names)


def read_run(folder: Path, stages: Sequence[str]) -> Run:
    """Return the run in `folder`. stages: folders in the order to show; empty takes all that have a config.

    Raises ConfigError when there is nothing to report, and DataError when a file cannot be read.
    """
    configs_in_run = {path.parent: _yaml(path) for path in folder.glob(f"*/{CONFIG}") if not _is_previous(path.parent)}
    wanted = [user_path(stage) for stage in stages] or _ordered(configs_in_run)
    configs = {path: config for path in wanted if (config := configs_in_run.get(path) or _yaml(path / CONFIG))}
    if not configs:
        raise ConfigError(
            f"{folder} has no stage with a {CONFIG}: give the name of a run, run.name=..., that has begun"
        )
    all_stages = [
        _read_stage(path, config, trained_by=_trained_by(path, {**configs_in_run, **configs}))
        for path, config in configs.items()
    ]
    run_stages = [stage for stage in all_stages if "report" not in stage.config]
    num_same = Counter((stage.kind, stage.trained_by) for stage in run_stages)
    for stage in run_stages:
        if num_same[stage.kind, stage.trained_by] > 1:
            stage.weights = f"{stage.trained_by} ({stage.name})"
    return Run(name=folder.name, stages=run_stages, missing=[path.name for path in wanted if path not in configs])


def _read_stage(folder: Path, config: dict[str, Any], *, trained_by: Path) -> Stage:
    metrics = folder / METRICS
    return Stage(
        name=folder.name,
        folder=folder,
        kind=next((kind for section, kind in _SECTIONS.items() if section in config), Kind.other),
        config=config,
        metrics=validated_metrics(read_metrics(metrics), place=metrics) if metrics.is_file() else [],
        summary=_json(folder / SUMMARY, SUMMARY_SHAPE),
        evaluation=_json(folder / EVALUATION, EVALUATION_SHAPE),
        export=_json(folder / "model" / EXPORT_RECORD, EXPORT_SHAPE),
        verification=_json(folder / VERIFICATION, VERIFICATION_SHAPE),
        done=_json(folder / DONE, DONE_SHAPE),
        made_by=_json(folder / MADE_BY, MADE_BY_SHAPE),
        trained_by=trained_by.name,
        weights=trained_by.name,
    )


def _ordered(configs_in_run: Mapping[Path, Mapping[str, Any]]) -> list[Path]:
    """Return the stages' folders of a run, each after those that its config names; otherwise sorted by name."""

    def depth(path: Path, trail: tuple[Path, ...] = ()) -> int:
        named = {_stage_at(text, configs_in_run) for text in _strings(configs_in_run[path])} - {None, path, *trail}
        return 1 + max((depth(source, (*trail, path)) for source in named if source), default=0)

    return sorted(configs_in_run, key=lambda path: (depth(path), path.name))


def _is_previous(folder: Path) -> bool:
    """Return whether a folder holds the earlier results of a stage that ran again (`files.previous_name`)."""
    return re.search(r"\.previous(\.\d+)?$", folder.name) is not None


def _origin(config: Mapping[str, Any], configs: Mapping[Path, Mapping[str, Any]]) -> Path | None:
    """Return the folder of the stage of this run from which a config takes its weights; None if there is none."""
    named = config.get("init_from") or config.get("continue_from")
    return _stage_at(named, configs) if isinstance(named, str) else None


def _stage_at(text: str, configs: Mapping[Path, Mapping[str, Any]]) -> Path | None:
    """Return the stage whose folder contains the path `text`: its present folder, or the one in its config."""
    if "/" not in text:
        return None
    path = user_path(text).resolve()
    for folder, config in configs.items():
        run = config.get("run", {})
        places = [folder, Path(run.get("folder", "")) / run.get("name", "") / run.get("stage", "")]
        if any(path.is_relative_to(user_path(place).resolve()) for place in places if place.name == folder.name):
            return folder
    return None


def _trained_by(path: Path, configs: Mapping[Path, Mapping[str, Any]]) -> Path:
    """Return the stage that trained a stage's weights: itself if it trains, else the nearest one before it."""
    seen: set[Path] = set()
    while "optim" not in configs[path] and path not in seen:
        seen.add(path)
        path = _origin(configs[path], configs) or path
    return path


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, str):
        yield value


def _json(path: Path, shape: Schema) -> dict[str, Any]:
    """Return the object in a JSON file; empty when the file does not exist."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}): run its stage again") from None
    return validated(content, shape, place=path)


def _yaml(path: Path) -> dict[str, Any]:
    """Return a stage's config; empty when the file does not exist."""
    if not path.is_file():
        return {}
    try:
        content = yaml.load(path.read_bytes(), Loader=yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: bytes that are not text, or an invalid date
        raise DataError(f"{path} is not YAML ({str(error).splitlines()[0]}): run its stage again") from None
    return validated(content, CONFIG_SHAPE, place=path)
