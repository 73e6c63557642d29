"""From a dense stage over `moetrain upcycle` to a sparse stage: the loss goes on where it was."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moetrain.checkpoint import read as checkpoint
from moetrain.checkpoint.origin import TOKENIZER, read_origin
from moetrain.checkpoint.read import CHECKPOINTS
from moetrain.cli import upcycle as command
from moetrain.commands.stage import RunConfig
from moetrain.commands.weights import UpcycleRun
from moetrain.compose import compose
from moetrain.errors import BoundError, CheckpointError, ConfigError
from moetrain.hf.names import hf_disk_tensors
from moetrain.hf.shape import to_hf_config
from moetrain.log import read_metrics
from moetrain.model.config import ModelConfig
from moetrain.train.interrupt import Status
from moetrain.train.stages import Sections
from moetrain.upcycle import stage as module
from moetrain.upcycle.config import SharedStart, UpcycleConfig, UpcycleMethod
from tests.train.test_stages import run, sections, write_texts

SPLIT = UpcycleConfig(method=UpcycleMethod.split, shared=SharedStart.part)


def dense(texts: Path) -> Sections:
    settings = sections(texts)
    return replace(settings, model=replace(settings.model, num_dense_layers=3))


def sparse(model: ModelConfig) -> ModelConfig:
    """Of 48 units 12 are shared, the other 36 are 3 shards in 4 copies; of these 2 are chosen."""
    return replace(model, num_dense_layers=1, moe_intermediate_size=12, num_experts=12, num_experts_per_token=6)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    write_texts(folder / "texts")
    assert run(folder / "dense", dense(folder / "texts")) is Status.finished
    return folder


def upcycled(trained: Path, name: str, *, init_from: Path, config: UpcycleConfig = SPLIT, seed: int = 0) -> Path:
    model = sparse(dense(trained / "texts").model)
    settings = UpcycleRun(
        run=RunConfig(folder=str(trained), name="runs", stage=name, seed=seed),
        init_from=str(init_from),
        model=model,
        upcycle=config,
    )
    assert command.main(settings) == 0
    return settings.run.path


@pytest.fixture(scope="module")
def folder(trained: Path) -> Path:
    return upcycled(trained, "upcycle", init_from=trained / "dense")


def first_loss(folder: Path) -> float:
    return float(read_metrics(folder / "metrics.jsonl")[1]["cross_entropy"])


def test_training_goes_on_at_the_loss_where_the_dense_model_ended(trained: Path, folder: Path, tmp_path: Path) -> None:
    settings = dense(trained / "texts")
    run(tmp_path / "dense", settings, origin=read_origin(trained / "dense"))
    wide = replace(settings, model=sparse(settings.model))
    run(tmp_path / "sparse", wide, origin=read_origin(folder))
    run(tmp_path / "scratch", wide)
    expected = first_loss(tmp_path / "dense")
    assert first_loss(tmp_path / "sparse") == pytest.approx(expected, rel=1e-5)
    assert first_loss(tmp_path / "scratch") > expected + 0.05
    tokenizers = [path / TOKENIZER / "tokenizer.json" for path in (trained / "dense", folder, tmp_path / "sparse")]
    assert len({path.read_text() for path in tokenizers}) == 1
    experts = read_origin(tmp_path / "sparse").tensors["model.layers.1.mlp.experts.gate_up_proj"]
    assert torch.unique(experts, dim=0).shape[0] == 12  # the copies of a shard have separated


def test_a_hugging_face_folder_of_dense_weights_gives_the_same_weights(
    trained: Path, folder: Path, tmp_path: Path
) -> None:
    origin = read_origin(trained / "dense")
    hf = tmp_path / "hf"
    hf.mkdir()
    (hf / "config.json").write_text(json.dumps(to_hf_config(origin.model)))
    save_file(dict(hf_disk_tensors(dict(origin.tensors))), hf / "model.safetensors")
    other = upcycled(trained, "from_hf", init_from=hf)
    first, second = read_origin(folder).tensors, read_origin(other).tensors
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_folder_tells_what_was_made_and_how_it_was_checked(folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["plan"]["num_shards"] == 3
    assert summary["parameters"]["sparse"]["total"] > summary["parameters"]["dense"]["total"]
    rows = json.loads((folder / "verify.json").read_text())["rows"]
    assert len(rows) == 4
    assert all(row["is_kept"] for row in rows)
    origin = read_origin(folder)
    assert origin.step == 0
    assert origin.model.num_experts == 12
    assert origin.quant is not None and not origin.quant.enabled


def test_the_weights_do_not_depend_on_the_run_but_the_routers_on_its_seed(trained: Path, folder: Path) -> None:
    again = upcycled(trained, "again", init_from=trained / "dense" / CHECKPOINTS / "step_00000003")
    assert read_origin(again).digest == read_origin(folder).digest
    settings = UpcycleRun(
        run=RunConfig(folder=str(trained), name="runs", stage="seed", seed=1),
        init_from=str(trained / "dense"),
        model=sparse(dense(trained / "texts").model),
        upcycle=SPLIT,
    )
    command.main(settings)
    one, other = read_origin(folder).tensors, read_origin(settings.run.path).tensors
    differing = {name for name in one if not torch.equal(one[name], other[name])}
    assert differing == {f"model.layers.{layer}.mlp.gate.weight" for layer in (1, 2)}


def test_weights_that_have_experts_are_refused(trained: Path, folder: Path) -> None:
    with pytest.raises(CheckpointError, match="2 of its 3 layers already have experts"):
        upcycled(trained, "twice", init_from=folder)
    assert not (trained / "runs" / "twice").exists()


def test_a_folder_that_holds_trained_checkpoints_is_refused(trained: Path) -> None:
    taken = trained / "runs" / "taken"
    shutil.copytree(trained / "dense" / CHECKPOINTS, taken / CHECKPOINTS)
    before = checkpoint.steps(taken / CHECKPOINTS)
    with pytest.raises(CheckpointError, match="training checkpoints, the last of step 3") as raised:
        upcycled(trained, "taken", init_from=trained / "dense")
    assert raised.value.exit_code == 2
    assert checkpoint.steps(taken / CHECKPOINTS) == before


def test_a_folder_of_upcycled_weights_is_written_anew(trained: Path, folder: Path) -> None:
    first = upcycled(trained, "anew", init_from=trained / "dense")
    assert upcycled(trained, "anew", init_from=trained / "dense") == first
    assert checkpoint.steps(first / CHECKPOINTS) == [0]
    assert read_origin(first).digest == read_origin(folder).digest


def test_upcycled_weights_of_another_seed_are_not_replaced(trained: Path) -> None:
    folder = upcycled(trained, "seeds", init_from=trained / "dense")
    before = read_origin(folder).digest
    with pytest.raises(ConfigError, match=r"has weights of another configuration \(run.seed: 0 -> 4\), which would be"):
        upcycled(trained, "seeds", init_from=trained / "dense", seed=4)
    assert read_origin(folder).digest == before


def test_dense_weights_of_another_shape_are_refused_with_the_field(trained: Path) -> None:
    model = replace(sparse(dense(trained / "texts").model), rope_theta=1e4)
    origin = read_origin(trained / "dense")
    with pytest.raises(CheckpointError, match=r"does not fit \(rope_theta: 50000.0 -> 10000.0\)"):
        module.upcycle(origin, model=model, config=SPLIT, plan=command.plan_upcycling(model, SPLIT), seed=0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("missing", "model.layers.2.mlp.up_proj.weight is missing"),
        ("left over", "extra is not a tensor of its model"),
        ("shape", r"model.layers.2.mlp.up_proj.weight has shape \[3\], but its config requires \[48, 32\]"),
        ("not finite", "model.layers.2.mlp.up_proj.weight holds numbers that are not finite"),
    ],
)
def test_weights_that_do_not_fit_their_own_config_are_refused(trained: Path, change: str, said: str) -> None:
    origin = read_origin(trained / "dense")
    tensors, name = dict(origin.tensors), "model.layers.2.mlp.up_proj.weight"
    if change == "missing":
        del tensors[name]
    elif change == "left over":
        tensors["extra"] = torch.zeros(1)
    else:
        tensors[name] = torch.zeros(3) if change == "shape" else torch.full((48, 32), float("nan"))
    model = sparse(origin.model)
    with pytest.raises(CheckpointError, match=said):
        module.upcycle(
            replace(origin, tensors=tensors),
            model=model,
            config=SPLIT,
            plan=command.plan_upcycling(model, SPLIT),
            seed=0,
        )


def test_nothing_is_written_when_ties_cut_copies(trained: Path) -> None:
    with pytest.raises(BoundError, match="layer 1, tokens whose choice cuts a copy: 0"):
        upcycled(trained, "tied", init_from=trained / "dense", config=replace(SPLIT, router_std=1e-8))
    assert checkpoint.steps(trained / "runs" / "tied" / CHECKPOINTS) == []


def test_the_command_takes_its_choices_from_the_command_line() -> None:
    words = ["model=k2_nano_shards", "upcycle.method=split", "upcycle.shared=part", f"init_from={os.getcwd()}"]
    settings = compose("upcycle", words)
    assert settings.upcycle == SPLIT
    assert command.plan_upcycling(settings.model, settings.upcycle).num_shards == 3
