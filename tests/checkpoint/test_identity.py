from dataclasses import asdict

from moetrain.checkpoint.identity import upgraded
from moetrain.model.config import ModelConfig
from moetrain.train.config import TrainConfig


def test_data_without_a_template_is_that_of_an_older_version() -> None:
    older = {"sources": {"a": {"kind": "jsonl"}}, "tokenizer": {"vocab_size": 300}}
    now = {
        "sources": {"a": {"kind": "jsonl", "unreadable": "refuse"}},
        "tokenizer": {"vocab_size": 300, "template": "auto"},
    }
    assert upgraded({"data": older}) == upgraded({"data": now}) == {"data": now}


def test_a_run_without_multi_token_prediction_is_that_of_an_older_version() -> None:
    older = {"model": {"num_layers": 2}, "train": {"steps": 3}}
    now = {
        "model": asdict(ModelConfig(num_layers=2)),
        "train": {"steps": 3, "mtp": asdict(TrainConfig().mtp)},
    }
    found = upgraded(older)
    assert found["train"] == now["train"]
    assert found["model"] == {name: now["model"][name] for name in ("num_layers", "num_mtp_layers")}
