"""`moetrain prepare` and what reads its folder, on the command line."""

import json
import re
from pathlib import Path

import pytest

from moetrain.cli.main import main
from moetrain.data.maths import maths_problems


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """The command line of a preparation, and of what reads it."""
    texts = maths_problems(seed=1, num_documents=80)
    path = tmp_path / "web.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, "same", "same"]))
    source = ["data.sources.web.kind=jsonl", f"data.sources.web.path={path}"]
    return ["prepare", *source, "data.tokenizer.vocab_size=320", "prepare.workers=1", f"run.folder={tmp_path}"]


def test_a_prepared_source_is_shown_and_checked(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 0
    page = capsys.readouterr().out
    assert "documents read" in page and "characters per token" in page
    folder = tmp_path / "default" / "prepare" / "web"
    reads = ["data=none", "data.sources.web.kind=prepared", f"data.sources.web.path={folder}"]
    assert main(["data", *reads, "characters=30", "records=2"]) == 0
    page = capsys.readouterr().out
    assert page.count("--- web, record") == 2 and "[BOS]⟦" in page
    row = page.splitlines()[-1].split()
    assert row[:4] == ["web", "81", "1", "0"] and row[7] == "100%"
    check = ["check", "pretrain", "model=k2_nano_test", "model.vocab_size=320", *reads, f"run.folder={tmp_path}"]
    assert main(check) == 0
    assert main([*check, "model.vocab_size=300"]) == 2
    assert "was prepared with a tokenizer of 320 tokens: set model.vocab_size to 320" in capsys.readouterr().err
    (folder / "split.bin").write_bytes(bytes(81))
    assert main(check) == 2
    assert "split.bin has other content than index.json states" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("data.sources.web.max_characters=100", "max_characters is 100: a source of kind jsonl is prepared whole"),
        ("data.sources.web.kind=prepared", "web.jsonl has no index.json"),
        ("data.tokenizer.vocab_size=9000", r"vocab_size is 9000, and \d+ characters give \d+ tokens: give a smaller"),
        ("data.sources.tokenizer.kind=maths", "a source named tokenizer: choose a folder name"),
        ("data.sources.web.kind=megatron", "data.sources.web is of kind megatron: give the folder of the tokenizer"),
        ("prepare.workers=0", "prepare.workers is 0"),
        ("prepare.decontaminate.test.kind=text", "prepare.decontaminate.test.path is None"),
        ("data.sources.web.field=body", "web.jsonl:1 has no column body"),
    ],
)
def test_what_cannot_be_prepared_is_refused(
    word: str, message: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, word]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(message, error), error
    assert not (tmp_path / "default").exists()
