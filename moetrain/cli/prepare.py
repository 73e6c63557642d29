"""`moetrain prepare`."""

import functools

from rich.console import Console
from rich.table import Table

from moetrain.commands.data import PrepareRun
from moetrain.data.chat_tokenizer import load_tokenizer, with_named_template
from moetrain.data.prepare.run import prepare
from moetrain.data.store.index import Index
from moetrain.data.tokenizer import Tokenizer
from moetrain.files import user_path
from moetrain.run.plugins import load_plugins
from moetrain.run.stage import stage_folder


def main(run: PrepareRun) -> int:
    """Prepare every source, print a table of their counts, and return 0."""
    with stage_folder(run) as folder:
        start_worker = functools.partial(_load_plugins, run.plugins)
        indices = prepare(run.data, run.prepare, folder=folder, tokenizer=_tokenizer(run), start_worker=start_worker)
        Console(width=140).print(_table(indices))
    return 0


def _load_plugins(plugins: list[str]) -> None:
    load_plugins(plugins)


def _tokenizer(run: PrepareRun) -> Tokenizer | None:
    if run.data.tokenizer.path is not None:
        return load_tokenizer(run.data.tokenizer, user_path(run.data.tokenizer.path))
    if run.init_from is None:
        return None
    from moetrain.run.weights import read_weights, tokenizer_of  # loads torch

    return with_named_template(tokenizer_of(read_weights(run.init_from)), run.data.tokenizer)


def _table(indices: dict[str, Index]) -> Table:
    table = Table("quantity", *indices, box=None)
    counts = [index.counts for index in indices.values()]
    rows = {
        "documents read": [each.num_read for each in counts],
        "dropped: unreadable": [each.num_unreadable for each in counts],
        "dropped: empty": [each.num_empty for each in counts],
        "dropped: identical": [each.num_identical for each in counts],
        "dropped: nearly identical": [each.num_similar for each in counts],
        **{
            f"dropped: in {name}": [each.num_contaminated.get(name, 0) for each in counts]
            for name in dict.fromkeys(name for each in counts for name in each.num_contaminated)
        },
        "training documents": [each.num_training for each in counts],
        "held-out documents": [each.num_held_out for each in counts],
        "training tokens": [each.num_tokens for each in counts],
        "held-out tokens": [each.num_tokens_held_out for each in counts],
        "longer than 2^20 characters": [each.num_long for each in counts],
    }
    for name, values in rows.items():
        table.add_row(name, *(f"{value:,}" for value in values))
    ratios = [each.num_characters / max(1, each.num_tokens + each.num_tokens_held_out) for each in counts]
    table.add_row("characters per token", *(f"{ratio:.2f}" if ratio else "-" for ratio in ratios))
    return table
