"""The tables of a run as text, for the terminal, for Markdown and for the page.

They contain only numbers that a repetition of the run with the same seed reproduces.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import PurePath
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from moetrain.report.numbers import ERROR_FREE, LONGER, main_modes, mode_title, sizes, validation
from moetrain.report.stages import Run, Stage

NONE = "-"
"""Shown in place of a missing number."""
_MAIN = ["all", "after tool error"]
_PADDING = 3  # characters that rich adds to a cell of this style
_BYTES_PER_MB = 1_000_000


@dataclass(kw_only=True)
class Table:
    """Rows of text under a header. The first cell is the name of the row. notes: lines below the table."""

    title: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)
    main_rows: list[str] = field(default_factory=list)
    """First cells of the rows that are highlighted."""


def tables(run: Run) -> list[Table]:
    """Return the tables for which the run has numbers."""
    candidates = [validation_table(run), success_table(run), difference_table(run), masters_table(run), size_table(run)]
    return [table for table in candidates if table is not None]


def validation_table(run: Run) -> Table | None:
    """Return nats per character by source: of the bigram model, after each stage, and of the exported weights."""
    found = validation(run)
    if not found:
        return None
    stages = [stage.name for stage in run.trained if any(stage.name in row["stages"] for row in found.values())]
    exports = list(dict.fromkeys(name for row in found.values() for name in row["exports"]))
    rows = [
        [
            source,
            _number(row["bigram"]),
            *(_number(row["stages"].get(name)) for name in stages),
            *(_number(row["exports"].get(name)) for name in exports),
        ]
        for source, row in found.items()
    ]
    header = ["source", "bigram", *(f"after {name}" for name in stages), *(f"{name}, exported" for name in exports)]
    fitted_on = sorted({row["bigram_of"] for row in found.values() if row["bigram_of"]})
    notes = [f"bigram: Witten-Bell, fitted on the training split of {' and '.join(fitted_on)}"] if fitted_on else []
    return Table(title="Validation loss, nats per character (lower is better)", header=header, rows=rows, notes=notes)


def success_table(run: Run) -> Table | None:
    """Return held-out success in percent with 95 % intervals, by number of calls. Columns: evaluation and mode."""
    columns = [(stage, mode) for stage in run.evaluations for mode in main_modes(stage)]
    if not columns:
        return None
    header = ["tool calls", *(f"after {stage.weights}, {mode_title(mode)}" for stage, mode in columns)]
    trained = run.evaluations[-1].evaluation.get("trained_calls", [])
    rows: list[list[str]] = []

    def add(title: str, rates: Sequence[Mapping[str, Any] | None]) -> None:
        if any(rate is not None and rate["count"] for rate in rates):
            rows.append([title, *(rate_text(rate) for rate in rates)])

    evaluated = _calls(stage.evaluation["modes"][mode] for stage, mode in columns)
    for calls in evaluated:
        add(calls, [stage.evaluation["modes"][mode]["by_calls"].get(calls) for stage, mode in columns])
    add("all", [stage.evaluation["modes"][mode]["all"] for stage, mode in columns])
    after_error = [stage.evaluation["modes"][mode].get("after_tool_error") for stage, mode in columns]
    add("after tool error", after_error)
    if any(rate and rate["count"] for rate in after_error):  # else no tool has failed, and all tasks are without one
        add(
            "without tool error", [stage.evaluation["modes"][mode].get("without_tool_error") for stage, mode in columns]
        )
    extras = [_extra_summary(stage, mode, ERROR_FREE) for stage, mode in columns]
    add("task.tool_failure=0", [summary["all"] if summary else None for summary in extras])
    longer = [_extra_summary(stage, mode, LONGER) for stage, mode in columns]
    given = _calls(summary for summary in longer if summary)
    what = "longer" if not trained or all(int(calls) > trained[-1] for calls in given) else "of given length"
    for calls in given:
        add(f"{calls}, {what}", [summary["by_calls"].get(calls) if summary else None for summary in longer])
    add(f"all {what}", [summary["all"] if summary else None for summary in longer])
    notes = ["% of tasks right, with 95 % intervals (Wilson), on held-out tasks"]
    if evaluated:
        notes.append(f"all: tasks of {evaluated[0]} to {evaluated[-1]} calls")
    notes += _grader_notes(run.evaluations[-1].evaluation)
    return Table(
        title=f"Held-out success, {run.weights_format} weights", header=header, rows=rows, notes=notes, main_rows=_MAIN
    )


def length_table(run: Run) -> Table | None:
    """Return the average number of tool calls, contexts and sampled tokens of a trajectory, by evaluation and mode.

    Where an evaluation votes on turns, a further column has the average number of samples per turn.
    """
    names = ("mean_calls", "mean_segments", "mean_sampled_tokens")
    summaries = {
        f"{stage.weights} {mode_title(mode)}": summary
        for stage in run.evaluations
        for mode, summary in stage.evaluation["modes"].items()
        if summary["all"]["count"] and all(name in summary for name in names)
    }
    rows = [[title, *(f"{summary[name]:,.1f}" for name in names)] for title, summary in summaries.items()]
    header = ["average per trajectory", "tool calls", "contexts", "sampled tokens"]
    samples = [summary.get("samples_per_turn") for summary in summaries.values()]
    if any(number is not None for number in samples):
        header.append("samples per turn")
        for row, number in zip(rows, samples, strict=True):
            row.append("1" if number is None else f"{number:.2f}")
    return Table(title="Length of trajectories", header=header, rows=rows) if rows else None


def difference_table(run: Run) -> Table | None:
    """Return the paired differences of success to an earlier evaluation of the same tasks."""
    rows = [
        [
            f"{stage.weights} {mode_title(mode)}",
            f"{100 * row['value']:+.1f}",
            f"{100 * row['low']:+.1f} to {100 * row['high']:+.1f}",
            *(
                [str(row["gained"]), str(row["lost"]), f"{row['p_value']:.2g}"]
                if {"gained", "lost", "p_value"} <= row.keys()
                else [NONE] * 3
            ),
            str(row["count"]),
        ]
        for stage in run.evaluations
        for mode, row in stage.evaluation.get("paired", {}).items()
    ]
    header = ["success", "points", "95 % interval", "gained", "lost", "exact p", "tasks"]
    return Table(title="Against the earlier evaluation, paired by task", header=header, rows=rows) if rows else None


def masters_table(run: Run) -> Table | None:
    """Return success of the exported weights beside that of their bf16 masters."""
    rows = [
        [
            f"{stage.weights} {mode_title(mode)}",
            rate_text(stage.evaluation["modes"].get(mode, {}).get("all")),
            rate_text(summary["all"]),
            rate_text(stage.evaluation["modes"].get(mode, {}).get("after_tool_error")),
            rate_text(summary.get("after_tool_error")),
        ]
        for stage in run.evaluations
        for mode, summary in stage.evaluation.get("masters", {}).items()
    ]
    if not rows:
        return None
    notes = []
    for stage in run.evaluations:
        note = _divergence(stage, name=run.weights_format)
        if note:
            notes.append(f"{stage.weights}: {note}")
    name = run.weights_format
    header = ["% right", name, "bf16", f"{name} after error", "bf16 after error"]
    return Table(title=f"{name} beside the bf16 masters", header=header, rows=rows, notes=notes)


def size_table(run: Run) -> Table | None:
    """Return the size of each export beside that of the same weights with experts in bf16."""
    rows = [
        [
            name,
            str(row.get("format") or NONE),
            f"{row['bytes'] / _BYTES_PER_MB:.2f} MB",
            f"{row['bf16_bytes'] / _BYTES_PER_MB:.2f} MB",
            f"{row['bytes'] / row['bf16_bytes']:.3f}",
        ]
        for name, row in sizes(run).items()
    ]
    header = ["weights", "format", "exported", "in bf16", "share"]
    return Table(title="Exported size", header=header, rows=rows) if rows else None


def rate_text(rate: Mapping[str, Any] | None) -> str:
    """Return a rate and its interval in percent: `63.2 [57-69]`."""
    if rate is None or not rate["count"]:
        return NONE
    return f"{100 * rate['value']:.1f} [{100 * rate['low']:.0f}-{100 * rate['high']:.0f}]"


def show(tables_to_print: Sequence[Table], console: Console) -> None:
    """Print tables. A table that is too wide is divided into several, each with the first column."""
    for table in chain.from_iterable(_split_to_width(wide_table, console.width) for wide_table in tables_to_print):
        rich_table = RichTable(title=table.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        for number, name in enumerate(table.header):
            rich_table.add_column(Text(_wrap_in_two(name)), justify="right" if number else "left", no_wrap=number > 0)
        for row in table.rows:
            rich_table.add_row(*(Text(cell) for cell in row), style="bold" if row[0] in table.main_rows else None)
        console.print()
        console.print(rich_table)
        for note in table.notes:
            console.print(Text(f"  {note}", style="dim"))


def _split_to_width(table: Table, width: int) -> Iterator[Table]:
    """Yield a table in parts of at most `width` characters. The last part has the notes."""
    widths = [
        _PADDING + max(len(line) for cell in column for line in _wrap_in_two(cell).split("\n"))
        for column in ([name, *(row[number] for row in table.rows)] for number, name in enumerate(table.header))
    ]
    start = 1
    while start < len(widths):
        end = start + 1
        while end < len(widths) and widths[0] + sum(widths[start : end + 1]) <= width:
            end += 1
        yield replace(
            table,
            title=table.title if start == 1 else f"{table.title}, continued",
            header=[table.header[0], *table.header[start:end]],
            rows=[[row[0], *row[start:end]] for row in table.rows],
            notes=table.notes if end == len(widths) else [],
        )
        start = end


def markdown(table: Table) -> str:
    """Return a table as Markdown, its title as a heading."""
    lines = [f"## {table.title}", "", _markdown_row(table.header)]
    lines.append("|" + "|".join([" --- ", *[" ---: "] * (len(table.header) - 1)]) + "|")
    lines += [_markdown_row(row) for row in table.rows]
    if table.notes:
        lines += ["", *(f"- {note}" for note in table.notes)]
    return "\n".join(lines) + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _wrap_in_two(name: str) -> str:
    """Return a column's name broken at its middle space, so that six columns fit a terminal."""
    spaces = [place for place, letter in enumerate(name) if letter == " "]
    if not spaces or len(name) <= 12:
        return name
    place = min(spaces, key=lambda place: max(place, len(name) - place))
    return f"{name[:place]}\n{name[place + 1 :]}"


def _extra_summary(stage: Stage, mode: str, other: str) -> Mapping[str, Any] | None:
    """Return the summary of a mode that is shown in the column of `greedy`."""
    summary: Mapping[str, Any] | None = stage.evaluation["modes"].get(other) if mode == "greedy" else None
    return summary


def _calls(summaries: Iterator[Mapping[str, Any]]) -> list[str]:
    return sorted({calls for summary in summaries for calls in summary["by_calls"]}, key=int)


def _grader_notes(evaluation: dict[str, Any]) -> list[str]:
    """Return the success rates of two policies with known results, as a check of the graders."""
    graders = evaluation.get("graders")
    if not graders:
        return []
    note = f"graders, on {graders['num_tasks']} tasks: a null policy {100 * graders['null_policy']:g} %"
    perfect = graders.get("perfect_demonstrator", graders.get("perfect_expert"))  # the key in older evaluations
    return [note if perfect is None else f"{note}, the perfect demonstrator {100 * perfect:g} %"]


def _divergence(stage: Stage, *, name: str) -> str:
    """Return the divergence of an export in the format `name` from its masters, and the share of changed codes."""
    row, changes, parts = stage.evaluation.get("divergence"), stage.evaluation.get("code_changes"), []
    if row and row["mean_kl"] is None:
        parts.append(f"KL(bf16 || {name}) is not finite")
    elif row:
        parts.append(f"KL(bf16 || {name}) {row['mean_kl']:.3g} nats per token on average, at most {row['max_kl']:.3g}")
        parts.append(f"most likely token differs at {100 * row['top1_changed']:.2g} % of {row['num_tokens']} tokens")
    if changes:
        earlier = PurePath(stage.config["eval"].get("codes_before") or "earlier weights").name
        codes, scales = 100 * changes["code_flip_rate"], 100 * changes["scale_change_rate"]
        parts.append(f"{codes:.3g} % of the codes and {scales:.3g} % of the scales differ from those of {earlier}")
    return "; ".join(parts)


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.4f}"
