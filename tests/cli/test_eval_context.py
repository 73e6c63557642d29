"""An evaluation under another context policy than that of training is refused unless it is asked for."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from moetrain.chat.context import ContextKind, ContextPolicy, described
from moetrain.cli.chat import main as chat
from moetrain.cli.eval import main
from moetrain.compose import compose
from moetrain.errors import ConfigError
from moetrain.run.inputs import check_weights
from moetrain.run.trained_context import trained_context
from moetrain.run.weights import read_weights
from tests.even_task import even_export


def test_only_fields_with_an_effect_count() -> None:
    assert described(asdict(ContextPolicy(max_calls=3))) == described(asdict(ContextPolicy())) == {"kind": "full"}
    notes = described(asdict(ContextPolicy(kind=ContextKind.notes, keep=7)))
    assert notes == {"kind": "notes", "min_calls": 1, "max_calls": 8}
    assert described(asdict(ContextPolicy(kind=ContextKind.discard, keep=7)))["keep"] == 7


NOTES = {"kind": "notes", "min_calls": 1, "max_calls": 8, "keep": 2}


@pytest.mark.parametrize(
    ("trained", "settings"),
    [
        (NOTES, []),
        (NOTES, ["task.context.kind=notes", "task.context.max_calls=4"]),
        ({"kind": "full"}, ["task.context.kind=notes"]),
    ],
)
def test_another_context_than_that_of_training_is_refused(
    trained: dict[str, object], settings: list[str], tmp_path: Path
) -> None:
    export = even_export(tmp_path / "export", context=trained)
    words = [f"init_from={export}", f"run.folder={tmp_path / 'runs'}", *settings]
    for act in (main, check_weights):
        with pytest.raises(ConfigError, match=r"task\.context is not the one that .* was trained with \(.* -> .*\): "):
            act(compose("eval", words))


def test_an_agent_is_not_shown_under_another_context_than_that_of_training(tmp_path: Path) -> None:
    export = even_export(tmp_path / "export", context=NOTES)
    with pytest.raises(ConfigError, match=r"task\.context is not the one that .* was trained with .*: give the same$"):
        chat(compose("chat", [f"init_from={export}", "task_index=0"]))


def test_a_file_above_a_folder_of_another_program_is_not_read(tmp_path: Path) -> None:
    origin = replace(read_weights(str(even_export(tmp_path / "ours"))), path=tmp_path / "models" / "theirs" / "v1")
    origin.path.mkdir(parents=True)
    (tmp_path / "models" / "config.yaml").write_text("task: {context: {kind: notes}}")
    assert origin.checkpoint is None and trained_context(origin) is None


@pytest.mark.parametrize("trained", [NOTES, None])
def test_the_context_of_training_and_an_unknown_one_are_evaluated(
    trained: dict[str, object] | None, tmp_path: Path
) -> None:
    export = even_export(tmp_path / "export", context=trained)
    words = [f"init_from={export}", f"run.folder={tmp_path / 'runs'}", "task=marathon", "eval.num_tasks=2"]
    words += [
        "eval.longer_tasks=0",
        "eval.temperatures=[0]",
        "eval.error_free=false",
        "rollout.max_turn_tokens=20",
        "rollout.max_tokens=128",
    ]
    assert main(compose("eval", words)) == 0
    numbers = json.loads((tmp_path / "runs/default/eval/eval.json").read_text())
    assert numbers["task"]["context"] == {"kind": "notes", "min_calls": 1, "max_calls": 8}
