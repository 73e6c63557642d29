"""The numbers of a run, out of its stages' files: what `results.json` holds and the tables are made of.

Only what repeats to the last digit when a run is repeated: no times, no paths.
"""

import math
from collections.abc import Mapping
from typing import Any

from moetrain.report.stages import Kind, Run, Stage

ERROR_FREE, LONGER = "greedy_error_free", "greedy_longer"
"""Modes of an evaluation that are shown as rows of the others: tools that never fail, chains beyond those trained."""


def results(run: Run) -> dict[str, Any]:
    """Return the numbers of a run as plain JSON; a number that is not finite is null."""
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
    """Return by source nats a character after each stage, of the exported weights, and of the bigram model.

    The bigram and the held-out rows are those of the first stage that reads the source; a later stage that holds other
    rows out, longer ones say, is left to its own chart. Sources of the first stage come first.
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
                entry["stages"][stage.name] = row["nats_per_character"]
    for stage in run.evaluations:
        for source, value in stage.evaluation.get("language", {}).items():
            entry = sources.setdefault(source, {"bigram": None, "bigram_of": None, "stages": {}, "exports": {}})
            entry["exports"][stage.weights] = value
    return sources


def _rows(row: Mapping[str, Any]) -> tuple[int, int]:
    """Return what tells held-out rows apart: their characters and their predicted tokens."""
    return row["characters"], row["targets"]


def sizes(run: Run) -> dict[str, dict[str, Any]]:
    """Return by weights their bytes as exported, and of the same weights with bf16 experts."""
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
    """Return by stage the digests of what it read or wrote: sources, tokenizer, exported files."""
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
    """Return the modes of an evaluation that are columns of their own."""
    return [mode for mode in stage.evaluation.get("modes", {}) if mode not in (ERROR_FREE, LONGER)]


def mode_title(mode: str) -> str:
    """Return a mode's name as a reader meets it."""
    if mode.startswith("sampled_t"):
        return f"sampled T={mode.removeprefix('sampled_t')}"
    titles = {ERROR_FREE: "greedy, tools never fail", LONGER: "greedy, longer chains"}
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
