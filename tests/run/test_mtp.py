"""Modules of multi-token prediction from training to an export, and which of them later stages have."""

import json
from pathlib import Path

import pytest

from moetrain.checkpoint.shape import stored_shape
from moetrain.cli.main import main
from moetrain.export.read import read_export
from moetrain.run.weights import read_weights
from moetrain.verify.exports import differing_copies

DATA = (
    *("model=k2_nano_test", "data=test", "data.seq_len=64", "~data.sources.english", "~data.sources.dialogues"),
    *("data.sources.maths.kind=maths", "data.sources.maths.num_documents=40"),
)
SMALL = (
    *("train.rows_per_step=2", "train.rows_per_micro_batch=2", "train.steps=3", "train.compute_dtype=float32"),
    *("train.kernels=torch", "parallel.engine=torch", "run.wandb.mode=disabled", "train.mtp.late_share=0.5"),
)
SFT = [*(word for word in DATA if not word.startswith("model=")), *SMALL, "quant.enabled=true"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mtp")
    place = [f"run.folder={path}", "run.name=x"]
    assert main(["pretrain", "model.num_mtp_layers=2", *DATA, *SMALL, *place]) == 0
    return path / "x"


def _number(weights: Path) -> int:
    shape = stored_shape(str(weights))
    assert shape is not None
    return shape.num_mtp_layers


def test_the_loss_of_the_modules_is_logged_and_changes_with_its_weight(folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "pretrain" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "mtp_cross_entropy" in line]
    assert len(steps) == 3
    for line, weight in zip(steps, (0.3, 0.1, 0.1), strict=True):
        rest = line["loss"] - line["cross_entropy"] - weight * line["mtp_cross_entropy"]
        assert 0 <= rest < 0.01, "what is left is the balance loss"
        assert "maxvio/model.layers.3.mlp" in line


def test_an_export_has_the_modules_and_computes_as_the_stage(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = [f"run.folder={folder}", "run.name=out", "run.wandb.mode=disabled"]
    assert main(["sft", f"init_from={folder}/pretrain", *SFT, *place]) == 0
    assert main(["export", f"init_from={folder}/out/sft", *place]) == 0
    export = read_export(folder / "out" / "export" / "model")
    assert export.model.num_mtp_layers == 2
    assert "model.layers.3.mlp.experts.down_proj" in export.experts
    said = []
    for weights in (folder / "out" / "sft", folder / "out" / "export"):
        capsys.readouterr()
        assert main(["generate", f"init_from={weights}", "prompt='def f'", "max_new_tokens=20", "temperature=0"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    words = ["export.format=gguf", "run.stage=gguf", *place]
    assert main(["export", f"init_from={folder}/out/export", *words]) == 0
    assert _number(folder / "out" / "gguf") == 0


def test_modules_are_left_out_and_never_added(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = ["sft", f"init_from={folder}/pretrain", *SFT, f"run.folder={folder}"]
    assert main([*start, "run.name=fewer", "model.num_mtp_layers=1"]) == 0
    assert _number(folder / "fewer" / "sft") == 1
    names = read_weights(str(folder / "fewer" / "sft")).reader.shapes().keys()
    assert "model.layers.2.eh_proj.weight" in names and "model.layers.3.eh_proj.weight" not in names
    capsys.readouterr()
    assert main([*start, "run.name=more", "model.num_mtp_layers=3"]) == 2
    assert "num_mtp_layers: 2 -> 3" in capsys.readouterr().err


def test_a_run_goes_on_with_fewer_modules(folder: Path) -> None:
    own = [word for word in (*DATA, *SMALL) if not word.startswith("model=")]
    words = ["model=k2_nano_test", *own, f"continue_from={folder}/pretrain", "train.continue_as=part"]
    assert main(["pretrain", *words, "model.num_mtp_layers=1", f"run.folder={folder}", "run.name=on"]) == 0
    assert _number(folder / "on" / "pretrain") == 1


def test_dense_weights_with_modules_are_upcycled_without_them(tmp_path: Path) -> None:
    place = [f"run.folder={tmp_path}", "run.name=x"]
    dense = ["model.num_dense_layers=2", "model.num_mtp_layers=1"]
    assert main(["pretrain", *DATA, *SMALL, *dense, *place]) == 0
    words = [f"init_from={tmp_path}/x/pretrain", "model=k2_nano_test", "model.moe_intermediate_size=64"]
    assert main(["upcycle", *words, *place]) == 0
    assert _number(tmp_path / "x" / "upcycle") == 0


def test_a_copy_that_differs_is_found(folder: Path) -> None:
    place = [f"run.folder={folder}", "run.name=copies", "run.wandb.mode=disabled"]
    assert main(["export", f"init_from={folder}/pretrain", "export.format=quantized", *place]) == 0
    export = read_export(folder / "copies" / "export" / "model")
    expected = {name: export.dense[name] for name in ("lm_head.weight", "model.embed_tokens.weight")}
    assert len(export.copies) == 4 and differing_copies(export, expected) == 0
    export.copies["model.layers.3.shared_head.head.weight"] = expected["lm_head.weight"] + 1
    assert differing_copies(export, expected) == 1


def test_a_weight_of_zero_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "pretrain", "train.mtp.weight=0"]) == 2
    assert "train.mtp.weight is 0" in capsys.readouterr().err
