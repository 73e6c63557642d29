from moetrain.checkpoint.identity import upgraded
from moetrain.model.config import ModelConfig
from moetrain.optim.config import OptimConfig
from moetrain.quant.config import QuantConfig
from moetrain.train.config import TrainConfig
from moetrain.train.identity import identity_of


def test_data_without_a_template_is_that_of_an_older_version() -> None:
    older = {"sources": {"a": {"kind": "jsonl"}}, "tokenizer": {"vocab_size": 300}}
    now = {
        "sources": {"a": {"kind": "jsonl", "unreadable": "refuse"}},
        "tokenizer": {"vocab_size": 300, "template": "auto"},
    }
    assert upgraded({"data": older}) == upgraded({"data": now}) == {"data": now}


def test_a_run_without_multi_token_prediction_is_that_of_an_older_version() -> None:
    assert upgraded({"model": {"num_layers": 2}})["model"] == {"num_layers": 2, "num_mtp_layers": 0}
    sections = {"quant": QuantConfig(), "optim": OptimConfig(), "seed": 0, "origin": None, "others": {}}
    plain, predicting = (
        identity_of(model=ModelConfig(num_mtp_layers=number), train=TrainConfig(), **sections)  # type: ignore[arg-type]
        for number in (0, 1)
    )
    assert "mtp" not in plain["train"]
    assert predicting["train"]["mtp"] == {"weight": 0.3, "late_weight": 0.1, "late_share": 0.324}
