"""The page of a run, `report.html`: a single file without scripts or external resources.

A section whose stage has not run is left out, and the page names it.
"""

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path, PurePath
from typing import Any

import yaml

from moetrain.log import duration
from moetrain.report.charts import (
    hazard_chart,
    learning_charts,
    load_charts,
    optimizer_charts,
    rl_charts,
    success_charts,
)
from moetrain.report.numbers import digests, main_modes, mode_title, sizes, times, validation
from moetrain.report.stages import Kind, Run, Stage
from moetrain.report.style import STYLE
from moetrain.report.table import (
    NONE,
    Table,
    difference_table,
    length_table,
    masters_table,
    rate_text,
    size_table,
    success_table,
    validation_table,
)
from moetrain.report.trace_page import pairs, read_traces, select_traces, trajectory_html
from moetrain.stage_files import TRACES

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""Content security policy: the browser applies inline styles and nothing else, whatever a trajectory contains."""
_FEW_COLUMNS = 3  # number of columns that fits a phone screen
_RESOLVED = ("compute_dtype", "kernels")
_SHOWN_SETTINGS = [
    (
        "model",
        ("hidden_size", "num_layers", "num_experts", "num_experts_per_token", "num_shared_experts", "vocab_size"),
    ),
    ("optim", ("name", "lr")),
    ("train", ("steps", "batch_ramp", "rows_per_step", "compute_dtype", "kernels")),
    ("data", ("seq_len", "mix")),
    ("quant", ("enabled", "format", "grid", "group_size")),
    ("task", ("name", "tool_failure")),
    ("task.database", ("min_calls", "max_calls")),
    ("task.ledger", ("min_calls", "max_calls", "branching")),
    ("rollout", ("max_tokens", "max_turns", "temperature")),
    ("rl", ("algorithm", "tasks_per_step", "group_size")),
    ("eval", ("num_tasks", "temperatures")),
    ("export", ("format",)),
    ("parallel", ("engine", "expert", "zero")),
]
"""Fields of each section of the config that the page shows per stage; the whole config is in a collapsed element."""


def run_page(run: Run, *, num_trajectories: int) -> str:
    """Return the page. num_trajectories: number of right trajectories, and of wrong ones, to show per mode."""
    sections = [
        ("task", "The task", _task(run), "no evaluation has recorded its task"),
        ("success", "What it can do", _success(run), "no evaluation has finished"),
        ("learning", "What it learnt", _learning(run), "no stage that reads documents has begun"),
        (
            "rl",
            "Reinforcement learning",
            _charts([rl_charts(s) for s in run.of_kind(Kind.rl)]),
            "no RL stage has begun",
        ),
        ("experts", "Expert load", _loads(run), "no stage has trained experts"),
        ("quantised", "Quantised weights", _quantised(run), "nothing was exported or evaluated"),
        ("trajectories", "Trajectories", _trajectories(run, num_trajectories), "no trajectory was kept"),
        ("making", "How it was made", _setup_and_cost(run), "no stage has begun"),
    ]
    links = "".join(f'<a href="#{key}">{escape(title)}</a>' for key, title, content, _ in sections if content)
    left_out = [f"{title} ({why})" for _, title, content, why in sections if not content]
    left_out += [f"stage {name} (not begun)" for name in run.missing]
    unfinished = [stage.name for stage in run.stages if not stage.is_finished]
    notes = [f"Left out: {'; '.join(left_out)}."] if left_out else []
    notes += [f"Not finished yet: {', '.join(unfinished)}; the numbers so far are shown."] if unfinished else []
    body = "".join(f'<h2 id="{key}">{escape(title)}</h2>\n{content}' for key, title, content, _ in sections if content)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f"<title>{escape(run.name)} - moetrain</title>\n<style>{STYLE}</style></head>\n<body><main>\n"
        f'<span class="dim">moetrain run</span><h1>{escape(run.name)}</h1>\n'
        f"<p>{escape(' → '.join(stage.name for stage in run.stages))}</p>\n"
        + "".join(f"<p><b>{escape(note)}</b></p>\n" for note in notes)
        + f"<nav>{links}</nav>\n{_tiles(run)}{body}</main></body></html>\n"
    )


def table_html(table: Table, *, is_titled: bool = True) -> str:
    """Return a table with its notes."""
    kind = "scroll many" if len(table.header) > _FEW_COLUMNS else "scroll"
    head = "".join(f"<th>{escape(name)}</th>" for name in table.header)
    rows = "".join(
        f"<tr{' class=main' if row[0] in table.main_rows else ''}>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in row)
        + "</tr>\n"
        for row in table.rows
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in table.notes)
    return (
        (f"<h3>{escape(table.title)}</h3>" if is_titled else "")
        + f'<div class="{kind}"><table><thead><tr>{head}</tr></thead><tbody>\n{rows}</tbody></table></div>\n'
        + (f'<ul class="notes">{notes}</ul>\n' if notes else "")
    )


def _tiles(run: Run) -> str:
    """Return the headline numbers."""
    tiles: list[tuple[str, str]] = []
    if run.evaluations:
        last = run.evaluations[-1]
        modes = last.evaluation["modes"]
        for mode in main_modes(last):
            share = rate_text(modes[mode]["all"]).split()[0]
            tiles.append((f"{share} %", f"held-out tasks right, {last.weights} {mode_title(mode)}"))
        first = next(iter(main_modes(last)), None)
        if first and modes[first]["after_tool_error"]["count"]:
            tiles.append((rate_text(modes[first]["after_tool_error"]).split()[0] + " %", "right after a tool error"))
    read = [row for row in validation(run).values() if row["bigram"] and row["stages"]]
    if read:
        better = sum(next(iter(row["stages"].values())) < row["bigram"] for row in read)
        tiles.append((f"{better} of {len(read)}", "sources predicted better than by the bigram model"))
    for name, row in list(sizes(run).items())[-1:]:
        tiles.append((f"{row['bytes'] / 1e6:.2f} MB", f"exported ({name}), {row['bf16_bytes'] / 1e6:.2f} MB in bf16"))
    content = "".join(
        f'<div class="tile"><b>{escape(big)}</b><span>{escape(small)}</span></div>' for big, small in tiles
    )
    return f'<div class="tiles">{content}</div>\n' if tiles else ""


def _task(run: Run) -> str:
    """Return the task family that was evaluated, and its tools."""
    record = next((stage.evaluation["task"] for stage in reversed(run.evaluations) if "task" in stage.evaluation), None)
    if record is None:
        return ""
    rows = [[name, description] for name, description in record["tools"].items()]
    list_html = "".join(f"<li><code>{escape(name)}</code> {escape(description)}</li>" for name, description in rows)
    note = "it calls these tools" if rows else "it has no tools"
    return f"<p>Task family <code>{escape(record['name'])}</code>; {note}:</p>\n<ul>{list_html}</ul>\n"


def _success(run: Run) -> str:
    table = success_table(run)
    if table is None:
        return ""
    change = difference_table(run)
    beside = "".join(table_html(found) for found in (change, length_table(run)) if found)
    return table_html(table) + beside + _charts([success_charts(run), hazard_chart(run)]) + _endings(run)


def _endings(run: Run) -> str:
    """Return the table with counts of endings, and of the reasons of grades."""
    columns = [(stage, mode) for stage in run.evaluations for mode in stage.evaluation["modes"]]
    rows = []
    for group, prefix in (("endings", ""), ("grades", "answered: ")):
        counted = [stage.evaluation["modes"][mode].get(group, {}) for stage, mode in columns]
        for name in sorted({name for counts in counted for name in counts}):
            rows.append([prefix + name.replace("_", " "), *(str(counts.get(name, 0)) for counts in counted)])
    header = ["", *(f"{stage.weights} {mode_title(mode)}" for stage, mode in columns)]
    return table_html(
        Table(title="How trajectories ended", header=header, rows=rows, notes=["numbers of trajectories"])
    )


def _learning(run: Run) -> str:
    table = validation_table(run)
    stages = run.of_kind(Kind.training)
    charts = _charts([learning_charts(stage) for stage in stages])
    more = "".join(optimizer_charts(stage) for stage in run.trained)
    folded = f"<details><summary>Gradient norm and learning rate</summary>{_charts([more])}</details>\n" if more else ""
    return (table_html(table) if table else "") + charts + folded


def _loads(run: Run) -> str:
    charts = [(stage.name, load_charts(stage)) for stage in run.trained]
    return "".join(f"<h3>{escape(name)}</h3>{_charts([chart])}" for name, chart in charts if chart)


def _quantised(run: Run) -> str:
    tables = [table for table in (masters_table(run), size_table(run), _verified(run)) if table is not None]
    return "".join(table_html(table) for table in tables)


def _verified(run: Run) -> Table | None:
    """Return the table of the measurements of `moetrain verify`."""
    rows = [
        [row["name"], f"{row['value']:.6g}", f"{row['bound']:.6g}", "ok" if row["is_kept"] else "MISSED", row["note"]]
        for stage in run.stages
        for row in stage.verification.get("rows", [])
    ]
    return Table(title="Verified", header=["what", "found", "bound", "", ""], rows=rows) if rows else None


def _trajectories(run: Run, count: int) -> str:
    parts: list[str] = []
    traces_by_stage = {
        stage.name: {path.stem: read_traces(path) for path in _traces_of(stage)}
        for stage in [*run.of_kind(Kind.rl), *run.evaluations]
    }
    parts += _before_and_after(run, traces_by_stage, count)
    is_open = not parts
    for stage in reversed(run.evaluations):
        for mode in stage.evaluation["modes"]:
            title = f"after {stage.weights}, {mode_title(mode)}"
            for trace in select_traces(traces_by_stage[stage.name].get(mode, []), count=count):
                parts.append(trajectory_html(trace, title=title, is_open=is_open))
                is_open = False
    for stage in run.of_kind(Kind.rl):
        for name, traces in traces_by_stage[stage.name].items():
            title = f"{stage.name}, step {int(name.removeprefix('step_'))}"
            parts += [
                trajectory_html(trace, title=title, is_open=False) for trace in select_traces(traces, count=count)
            ]
    return "".join(parts)


def _before_and_after(run: Run, traces_by_stage: dict[str, dict[str, list[dict[str, Any]]]], count: int) -> list[str]:
    """Return tasks of one mode that the last evaluation solved and the evaluation that it is compared with did not."""
    if len(run.evaluations) < 2:
        return []
    last = run.evaluations[-1]
    named = PurePath(last.config["eval"].get("before") or "").name
    first = next((stage for stage in run.evaluations if stage.name == named), run.evaluations[0])
    for mode in last.evaluation["modes"]:
        solved = list(pairs(traces_by_stage[first.name].get(mode, []), traces_by_stage[last.name].get(mode, [])))[
            :count
        ]
        if solved:
            parts = ["<h3>The same task, before and after</h3>"]
            for number, trace_pair in enumerate(solved):
                for stage, trace in zip((first, last), trace_pair, strict=True):
                    title = f"after {stage.weights}, {mode_title(mode)}"
                    parts.append(trajectory_html(trace, title=title, is_open=number == 0))
            return [*parts, "<h3>More</h3>"]
    return []


def _traces_of(stage: Stage) -> Sequence[Path]:
    """Return the files of trajectories: all of an evaluation, the first and the last step of RL."""
    paths = sorted((stage.folder / TRACES).glob("*.jsonl"))
    if stage.kind is Kind.evaluation:
        return paths
    steps = [path for path in paths if path.stem.removeprefix("step_").isdecimal()]
    return list(dict.fromkeys([*steps[:1], *steps[-1:]]))


def _setup_and_cost(run: Run) -> str:
    seconds = times(run)
    rows = [[stage.name, "; ".join(_settings(stage)), _time(seconds.get(stage.name))] for stage in run.stages]
    parameters = next((stage.summary["parameters"] for stage in run.trained if "parameters" in stage.summary), None)
    notes = []
    if parameters:
        notes.append(
            f"{parameters['total']:,} parameters, {parameters['active_with_head']:,} active per token, "
            f"{parameters['routed']:,} in routed experts"
        )
    notes += [line for stage in run.stages[-1:] for line in _machine(stage)]
    if seconds:
        notes.append(f"{duration(sum(seconds.values()))} in all stages")
    list_html = "".join(
        f"<tr><td>{escape(name)}</td><td class='wide'>{escape(text)}</td><td>{escape(time)}</td></tr>\n"
        for name, text, time in rows
    )
    digest_rows = [[name, what, value] for name, of_stage in digests(run).items() for what, value in of_stage.items()]
    digest_rows += [[stage.name, "moetrain", version] for stage in run.stages if (version := stage.done.get("made_by"))]
    digest_table = Table(title="", header=["stage", "of", "sha256"], rows=digest_rows)
    return (
        "<div class='scroll'><table><thead><tr><th>stage</th><th class='wide'>settings</th><th>time</th></tr></thead>"
        f"<tbody>\n{list_html}</tbody></table></div>\n"
        f"<ul class='notes'>{''.join(f'<li>{escape(note)}</li>' for note in notes)}</ul>\n"
        + table_html(_costs(run))
        + "<details><summary>Digests</summary>"
        + table_html(digest_table, is_titled=False)
        + "</details>\n"
        + "".join(
            f"<details><summary>config of {escape(stage.name)}</summary>"
            f"<pre>{escape(yaml.safe_dump(stage.config, sort_keys=False))}</pre></details>\n"
            for stage in run.stages
        )
    )


def _costs(run: Run) -> Table:
    """Return the table with each stage's start, version, tokens, speed and memory."""
    rows = []
    for stage in run.stages:
        made_by, summary = stage.made_by, stage.summary
        tokens = summary.get("tokens", summary.get("sampled_tokens"))
        speed, memory = summary.get("time", {}).get("tokens_per_s"), made_by.get("peak_memory_gib")
        release = " ".join(str(part) for part in (made_by.get("moetrain"), made_by.get("commit")) if part)
        rows.append(
            [
                stage.name,
                made_by.get("started") or NONE,
                release or NONE,
                NONE if tokens is None else f"{tokens:,.0f}",
                NONE if speed is None else f"{speed:,.0f}",
                NONE if memory is None else f"{memory:.2f} GiB",
            ]
        )
    header = ["stage", "started", "version", "tokens", "tokens/s", "peak memory of rank 0"]
    return Table(title="Cost", header=header, rows=rows)


def _machine(stage: Stage) -> Iterator[str]:
    """Yield the machine that a stage ran on, if it was recorded."""
    machine = stage.made_by
    if machine.get("processor"):
        device = f", {machine['device']}" if machine.get("device") else ""
        memory = f"{machine['memory_gib']} GiB of memory"
        yield f"machine: {machine['processor']}, {machine['cores']} cores, {memory}{device}"


def _settings(stage: Stage) -> Iterator[str]:
    """Yield the main settings of a stage by section."""
    task = stage.config.get("task") or {}
    for section, names in _SHOWN_SETTINGS:
        if section.startswith("task.") and section != f"task.{task.get('name')}":
            continue  # the settings of another family
        values: Any = stage.config
        for part in section.split("."):
            values = values.get(part) if isinstance(values, dict) else None
        if isinstance(values, dict) and values.get("enabled") is not False:
            if section == "train":  # the values in use, where the config leaves the choice to the machine
                values = values | {name: stage.summary[name] for name in _RESOLVED if name in stage.summary}
            if section == "model":  # a tokenizer of fewer tokens than the config allows may have shrunk it
                rows = stage.summary.get("vocabulary", {}).get("rows")
                values = values if rows is None else values | {"vocab_size": rows}
            text = ", ".join(f"{name}={values[name]}" for name in names if values.get(name) not in (None, []))
            if text:
                yield f"{section}: {text}"
    if task.get("options"):
        yield f"task.options: {', '.join(f'{name}={value}' for name, value in task['options'].items())}"


def _time(seconds: float | None) -> str:
    return duration(seconds) if seconds is not None else "-"


def _charts(parts: Sequence[str]) -> str:
    """Return charts side by side if the screen is wide enough; empty when there are none."""
    return f'<div class="charts">{"".join(parts)}</div>\n' if any(parts) else ""
