"""Collects the numbers of a run from its stages' files, for `results.json` and the tables.

`results` contains only numbers that a repetition of the run reproduces exactly: no times and no paths.
"""

import math
from collections.abc import Mapping
from typing import Any

from moetrain.report.stages import Kind, Run, Stage

ERROR_FREE, LONGER, VOTED = "greedy_error_free", "greedy_longer", "voted_longer"
"""Modes that are rows in the columns of other modes: tools that never fail, and more calls than in training."""


def results(run: Run) -> dict[str, Any]:
    """Return the numbers of a run as plain JSON, with null for numbers that are not finite."""
    content = {
        "run": run.name,
        "stages": {
            stage.name: {
                "kind": stage.kind.value,
                "is_finished": stage.is_finished,
                "steps": stage.summary.get("steps"),
            }
            for stage in run.stages
        },
        "missing": run.missing,
        "validation": validation(run),
        "evaluations": {stage.name: _evaluation(stage) for stage in run.evaluations},
        "sizes": sizes(run),
        "verified": {stage.name: stage.verification["rows"] for stage in run.stages if stage.verification},
        "digests": digests(run),
    }
    cleaned: dict[str, Any] = _finite(content)
    return cleaned


def times(run: Run) -> dict[str, float]:
    """Return the seconds of each stage that a recipe ran."""
    return {stage.name: stage.done["seconds"] for stage in run.stages if "seconds" in stage.done}


def validation(run: Run) -> dict[str, dict[str, Any]]:
    """Return nats per character by source: after each stage, of the exported weights, and of the bigram model.

    The bigram model and the held-out rows are those of the first stage that reads the source. A later stage with other
    held-out rows, for example longer ones, is shown only in its own chart. Sources of the first stage come first.
    """
    sources: dict[str, dict[str, Any]] = {}
    held_out: dict[str, tuple[int, int]] = {}
    for stage in run.of_kind(Kind.training):
        for source, row in stage.summary.get("validation", {}).items():
            entry = sources.setdefault(
                source,
                {"bigram": row.get("bigram_nats_per_character"), "bigram_of": stage.name, "stages": {}, "exports": {}},
            )
            if _rows(row) == held_out.setdefault(source, _rows(row)):
                entry["stages"][stage.name] = _or_nan(row["nats_per_character"])
    for stage in run.evaluations:
        for source, value in stage.evaluation.get("language", {}).items():
            entry = sources.setdefault(source, {"bigram": None, "bigram_of": None, "stages": {}, "exports": {}})
            entry["exports"][stage.weights] = _or_nan(value)
    return sources


def _or_nan(value: float | None) -> float:
    """Return a number as read from JSON, where null stands for NaN."""
    return math.nan if value is None else value


def _rows(row: Mapping[str, Any]) -> tuple[int, int]:
    """Return what identifies a set of held-out rows: its numbers of characters and of predicted tokens."""
    return row["characters"], row["targets"]


def sizes(run: Run) -> dict[str, dict[str, Any]]:
    """Return the size of each set of weights in bytes: as exported, and with experts in bf16."""
    found: dict[str, dict[str, Any]] = {}
    for stage in run.of_kind(Kind.export):
        report = {**stage.export.get("report", {}), **stage.summary}
        if "num_bytes" in report:
            found[stage.weights] = {
                "format": report.get("format"),
                "bytes": report["num_bytes"],
                "bf16_bytes": report["num_bytes_bf16"],
            }
    for stage in run.evaluations:
        if stage.weights not in found and "export" in stage.evaluation:
            found[stage.weights] = dict(stage.evaluation["export"])
    return found


def digests(run: Run) -> dict[str, dict[str, str]]:
    """Return the digests of what each stage read or wrote: sources, tokenizer, exported files."""
    found: dict[str, dict[str, str]] = {}
    for stage in run.stages:
        read = {**stage.summary.get("digests", {}), **stage.evaluation.get("digests", {})}
        of_stage = {name: str(value) for name, value in read.items()}
        if "sha256" in stage.export:
            of_stage["export"] = stage.export["sha256"]
        if of_stage:
            found[stage.name] = of_stage
    return found


def main_modes(stage: Stage) -> list[str]:
    """Return the modes of an evaluation that have their own columns."""
    return [mode for mode in stage.evaluation.get("modes", {}) if mode not in (ERROR_FREE, LONGER, VOTED)]


def mode_title(mode: str) -> str:
    """Return a mode's name as shown in the report."""
    if mode.startswith("sampled_t"):
        return f"sampled T={mode.removeprefix('sampled_t')}"
    titles = {
        ERROR_FREE: "greedy, task.tool_failure=0",
        LONGER: "greedy, longer chains",
        VOTED: "each turn voted on, longer chains",
    }
    return titles.get(mode, mode)


def _evaluation(stage: Stage) -> dict[str, Any]:
    """Return an evaluation's numbers without the outcome of each task."""
    content = {name: value for name, value in stage.evaluation.items() if name != "time"}
    for group in ("modes", "masters"):
        if group in content:
            content[group] = {
                mode: {name: value for name, value in summary.items() if name != "outcomes"}
                for mode, summary in content[group].items()
            }
    return {"weights_of": stage.weights, **content}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
