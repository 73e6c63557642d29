"""Data sets of the Hugging Face hub on the command line, from a server of the hub's interface on this machine."""

import json
from pathlib import Path

from moetrain.data.maths import maths_problems
from tests.cli.command import moetrain
from tests.cli.hub_server import REVISION, hub

TEXTS = list(maths_problems(seed=1, num_documents=120))


def _jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def _words(tmp_path: Path, name: str) -> list[str]:
    source = [f"data.sources.web.path={name}", "data.sources.web.field=text"]
    return [*source, "data.tokenizer.vocab_size=320", "prepare.workers=1", f"run.folder={tmp_path}"]


def _tokens(tmp_path: Path, run: str) -> bytes:
    folder = tmp_path / run / "prepare" / "web"
    return b"".join(path.read_bytes() for path in sorted(folder.glob("tokens-*.bin")))


def test_a_data_set_of_the_hub_is_streamed_to_the_tokens_of_its_files(tmp_path: Path) -> None:
    files = {
        "README.md": b"---\nlicense: mit\n---\n",
        "data/train-0.jsonl": _jsonl(TEXTS[:50]),
        "data/train-1.jsonl": _jsonl(TEXTS[50:]),
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    words = ["prepare", "data.sources.web.kind=hub", "run.name=hub", *_words(tmp_path, "owner/name")]
    with hub(files) as (address, requests):
        run = moetrain(*words, HF_ENDPOINT=address, HF_HOME=str(tmp_path / "hf"))
    assert run.returncode == 0, run.stderr
    assert f"GET /datasets/owner/name/resolve/{REVISION}/data/train-1.jsonl" in requests
    with hub(files, revision="b" * 40) as (address, _):  # somebody uploaded to the data set
        run = moetrain(*words, HF_ENDPOINT=address, HF_HOME=str(tmp_path / "hf"))
    assert run.returncode == 2 and "was prepared with another content of the data set" in run.stderr
    words = ["prepare", "data.sources.web.kind=jsonl", "run.name=files", *_words(tmp_path, str(tmp_path / "data"))]
    assert moetrain(*words).returncode == 0
    assert _tokens(tmp_path, "hub") == _tokens(tmp_path, "files") != b""


def test_a_local_folder_that_datasets_reads_is_not_prepared_already_when_it_grew(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set/train.jsonl").write_bytes(_jsonl(TEXTS[:60]))
    words = ["prepare", "data.sources.web.kind=hub", *_words(tmp_path, str(tmp_path / "set"))]
    for expected in ("documents", "is prepared already"):
        run = moetrain(*words, HF_HOME=str(tmp_path / "hf"))
        assert run.returncode == 0 and expected in run.stderr + run.stdout
    (tmp_path / "set/train.jsonl").write_bytes(_jsonl(TEXTS))
    run = moetrain(*words, HF_HOME=str(tmp_path / "hf"))
    assert run.returncode == 2 and "was prepared with another content of the data set" in run.stderr


def test_a_data_set_that_the_hub_does_not_give_is_one_line(tmp_path: Path) -> None:
    files = {"data/train.jsonl": _jsonl(TEXTS)}
    for name, gated, reason in [
        ("owner/name", True, "Dataset 'owner/name' is a gated dataset on the Hub"),
        ("owner/other", False, "owner/other cannot be read: Dataset 'owner/other' doesn't exist on the Hub"),
        ("owner/name:part", False, "owner/name:part cannot be read: "),
    ]:
        words = ["prepare", "data.sources.web.kind=hub", *_words(tmp_path, name)]
        with hub(files, gated=gated) as (address, _):
            run = moetrain(*words, HF_ENDPOINT=address, HF_HOME=str(tmp_path / reason.replace("/", "_")))
        assert run.returncode == 2
        assert reason in run.stderr.splitlines()[-1] and "Traceback" not in run.stderr
