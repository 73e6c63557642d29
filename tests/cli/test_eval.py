"""`moetrain eval`: an earlier evaluation that cannot be paired with is refused before anything runs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moetrain.cli.eval import main
from moetrain.compose import compose, save_config
from moetrain.data.tokenizer import Tokenizer
from moetrain.errors import CheckpointError, ConfigError, DataError
from moetrain.eval.summary import summarize
from moetrain.export.config import ExportConfig, ExportFormat
from moetrain.export.write import export_model
from moetrain.model.transformer import Transformer, initialize
from moetrain.parallel.state import TensorReader
from moetrain.quant.config import QuantConfig
from tests.data.test_tokenizer import plain_tokenizer
from tests.even_task import MODEL
from tests.report.nano_run import trajectory

MODE = summarize([trajectory(task, success=task > 0) for task in range(4)])
GOOD = json.dumps({"modes": {"greedy": MODE}})
WITHOUT = json.dumps({"modes": {"greedy": {name: value for name, value in MODE.items() if name != "outcomes"}}})


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        ('{"modes": ', [], r"eval\.json: cannot be read as JSON"),
        ('{"modes": 3}', [], r"eval\.before: .*eval\.json: modes: 3 is not of type 'object'; the file is damaged"),
        ('{"modes": {}}', [], r"eval\.before: .*eval\.json contains no outcomes; run that evaluation again"),
        (WITHOUT, [], r"eval\.before: .*eval\.json contains no outcomes; run that evaluation again"),
        (
            GOOD.replace('"outcomes": {', '"outcomes": null, "x": {'),
            [],
            r"modes\.greedy\.outcomes: None is not of type",
        ),
        (GOOD, ["eval.num_tasks=4"], r"before evaluated other tasks \(eval\.num_tasks: 4 -> 2\); give the same ones"),
        (
            GOOD,
            ["eval.num_tasks=2", "task.database.max_calls=3"],
            r"evaluated other tasks \(task\.database\.max_calls: 3 -> 8\)",
        ),
        (
            GOOD,
            ["eval.num_tasks=2", "task.database.last_line=40"],
            r"evaluated other tasks \(task\.database\.last_line: 40 -> 17\)",
        ),
        (None, [], r"eval\.before: there is no .*eval\.json; give the folder of a finished evaluation"),
    ],
)
def test_an_earlier_evaluation_that_cannot_be_paired_is_refused(
    content: str | None, settings: list[str], message: str, tmp_path: Path
) -> None:
    before = tmp_path / "before"
    before.mkdir()
    save_config(compose("eval", settings), before / "config.yaml")
    if content is not None:
        (before / "eval.json").write_text(content)
    words = [f"init_from={tmp_path}", f"eval.before={before}", "eval.num_tasks=2", f"run.folder={tmp_path / 'runs'}"]
    with pytest.raises((CheckpointError, DataError), match=message):
        main(compose("eval", words))
    assert not (tmp_path / "runs").exists()


def test_a_config_beside_an_earlier_evaluation_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "eval.json").write_text(GOOD)
    (tmp_path / "config.yaml").write_text("eval: 3\n")
    with pytest.raises(DataError, match=r"eval\.before: .*config\.yaml: eval: 3 is not of type 'object'"):
        main(compose("eval", [f"init_from={tmp_path}", f"eval.before={tmp_path}", f"run.folder={tmp_path / 'runs'}"]))


def test_records_that_are_read_last_are_checked_first(tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text('{"text": \n')
    source = [f"data.sources.x.{word}" for word in ("kind=jsonl", f"path={tmp_path / 'broken.jsonl'}")]
    with pytest.raises(DataError, match=r"broken\.jsonl:1 is not JSON"):
        main(compose("eval", [f"init_from={tmp_path}", *source, f"run.folder={tmp_path / 'runs'}"]))


def test_texts_are_evaluated_without_tasks_and_without_a_chat_template(tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"plain text {n}"}) + "\n" for n in range(9)))
    tokenizer = Tokenizer.load(plain_tokenizer(tmp_path / "plain", config={"eos_token": "<|endoftext|>"}))
    shape = replace(MODEL, vocab_size=tokenizer.vocab_size)
    model = Transformer(shape, compute_dtype=torch.float32)
    initialize(model, 0)
    export = tmp_path / "bf16"
    export_model(
        TensorReader({name: tensor.detach() for name, tensor in model.state_dict().items()}),
        folder=export,
        model=shape,
        quant=QuantConfig(),
        export=ExportConfig(format=ExportFormat.bf16),
        tokenizer=tokenizer,
        step=1,
        sources={"weights": "0"},
    )
    words = [f"init_from={export}", f"run.folder={tmp_path / 'runs'}", "eval.num_tasks=0", "run.wandb.mode=disabled"]
    source = ["data.sources.x.kind=jsonl", f"data.sources.x.path={tmp_path / 'texts.jsonl'}"]
    assert main(compose("eval", [*words, "data=none", *source])) == 0
    results = next(tmp_path.glob("runs/**/eval.json"))
    numbers = json.loads(results.read_text())
    assert main(compose("eval", [*words, "data=none", *source])) == 0
    assert [path.name for path in results.parent.glob("eval.json*")] == ["eval.json"]  # the same results
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"other words {n}"}) + "\n" for n in range(9)))
    assert main(compose("eval", [*words, "data=none", *source])) == 0
    assert json.loads((results.parent / "eval.json.previous").read_text()) == numbers != json.loads(results.read_text())
    assert numbers["modes"] == {} and numbers["language"]["x"] > 0
    with pytest.raises(ConfigError, match=r"eval.num_tasks is 0 and data.sources is empty"):
        main(compose("eval", [*words, "data=none"]))
    with pytest.raises(DataError, match="the tokenizer has no chat template that is known"):
        main(compose("eval", [f"init_from={export}", f"run.folder={tmp_path / 'other'}", "run.wandb.mode=disabled"]))
