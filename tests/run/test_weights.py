"""Weights of a folder that another program wrote are checked tensor by tensor when they are read."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moetrain.cli.main import main
from moetrain.compose import compose
from moetrain.data.tokenizer import train_tokenizer
from moetrain.errors import CheckpointError, DataError
from moetrain.hf.names import hf_disk_tensors
from moetrain.hf.shape import to_hf_config
from moetrain.run.inputs import check_weights
from moetrain.run.weights import read_weights, tokenizer_of
from tests.even_task import even_export
from tests.hf.test_hf import TINY, make

NORM = "model.norm.weight"


def write(folder: Path, **changes: torch.Tensor | None) -> Path:
    """Write a folder whose tensors are a small model's but for `changes`; None leaves one out."""
    tensors = {name: tensor.contiguous() for name, tensor in hf_disk_tensors(make().state_dict())}
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    (folder / "config.json").write_text(json.dumps(to_hf_config(TINY)))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (NORM, None, r"model\.norm\.weight is missing: the weights do not fit this model"),
        ("lm_head.weight", None, r"lm_head\.weight is missing"),
        ("extra.weight", torch.zeros(3), r"extra\.weight is not a tensor of this model"),
        (NORM, torch.zeros(3), r"model\.norm\.weight has shape \[3\], but this model requires"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named_with_its_folder(
    name: str, tensor: torch.Tensor | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=rf"^{tmp_path}: {message}"):
        read_weights(str(write(tmp_path, **{name: tensor})))


def test_a_number_that_is_not_finite_is_refused_when_it_is_read(tmp_path: Path) -> None:
    origin = read_weights(str(write(tmp_path, **{NORM: torch.full((TINY.hidden_size,), torch.nan)})))
    with pytest.raises(CheckpointError, match=rf"^{tmp_path}: model\.norm\.weight holds numbers that are not finite"):
        origin.reader.read(NORM, first=0, last=1)
    with pytest.raises(CheckpointError, match="not finite"):
        origin.tensors[NORM]


def test_a_whole_folder_is_read_and_a_derived_buffer_in_it_is_nobodys_mistake(tmp_path: Path) -> None:
    derived = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    assert read_weights(str(write(tmp_path, **derived))).step == 0


def test_a_config_that_does_not_fit_is_named_with_its_folder(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**to_hf_config(TINY), "hidden_size": "abc"}))
    with pytest.raises(CheckpointError, match=rf"^{tmp_path}: config\.json: hidden_size is 'abc': give a number"):
        read_weights(str(tmp_path))


@pytest.mark.parametrize("broken", ["init_from", "eval.masters", "eval.codes_before", "eval.before"])
def test_what_an_evaluation_takes_is_read_before_its_ranks_start(broken: str, tmp_path: Path) -> None:
    """Under a launcher each rank would say it, and the launcher's own lines would follow."""
    good, bad = write(_folder(tmp_path, "good")), write(_folder(tmp_path, "bad"), **{NORM: None})
    words = [f"init_from={good}", f"eval.masters={good}", f"eval.codes_before={good}"]
    with pytest.raises(CheckpointError, match=rf"^{good}: there is no tokenizer.json beside the weights"):
        check_weights(compose("eval", words))
    with pytest.raises(CheckpointError, match=rf"^{bad}: .* is missing|^eval\.before: there is no {bad}/eval\.json"):
        check_weights(compose("eval", [*words, f"{broken}={bad}"]))


@pytest.mark.parametrize("command", ["export", "generate", "chat", "serve", "prepare"])
def test_weights_without_the_tokenizer_that_a_command_uses_are_refused_by_its_check(
    command: str, tmp_path: Path
) -> None:
    folder = write(_folder(tmp_path, "good"))
    words = ["prompt=x"] if command == "generate" else []
    with pytest.raises(CheckpointError, match=rf"^{folder}: there is no tokenizer.json beside the weights"):
        check_weights(compose(command, [f"init_from={folder}", *words]))


def test_data_prepared_with_another_tokenizer_than_that_of_the_weights_are_refused_by_the_check(tmp_path: Path) -> None:
    export = even_export(tmp_path / "export")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"some words {n}"}) + "\n" for n in range(40)))
    source = ["data=none", "data.sources.x.kind=jsonl", f"data.sources.x.path={tmp_path / 'a.jsonl'}"]
    sizes = ["data.tokenizer.vocab_size=280", "prepare.workers=1"]
    assert main(["prepare", *source, *sizes, f"run.folder={tmp_path / 'runs'}", "run.wandb.mode=disabled"]) == 0
    prepared = tmp_path / "runs" / "default" / "prepare" / "x"
    words = ["data=none", "data.sources.x.kind=prepared", f"data.sources.x.path={prepared}", "data.seq_len=32"]
    run = compose("sft", [f"init_from={export}", "quant.enabled=false", *words])
    with pytest.raises(DataError, match=r"^data\.sources\.x: .* was prepared with another tokenizer"):
        check_weights(run)
    check_weights(run, planned=[prepared.parent])  # a stage before this one prepares them anew


def test_weights_that_are_no_export_are_not_verified_as_one(tmp_path: Path) -> None:
    folder = write(_folder(tmp_path, "good"))
    with pytest.raises(CheckpointError, match=rf"^init_from is {folder}: not an export"):
        check_weights(compose("verify exports", [f"init_from={folder}", f"masters={folder}"]))


@pytest.mark.parametrize("field", ["eval.masters", "eval.codes_before"])
def test_weights_of_another_model_are_no_masters(field: str, tmp_path: Path) -> None:
    good, other = write(_folder(tmp_path, "good")), write(_folder(tmp_path, "other"))
    config = {**to_hf_config(TINY), "rms_norm_eps": 0.5}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"^{field} is {other}: its model differs from {good} \(rms_norm_eps"):
        check_weights(compose("eval", [f"init_from={good}", f"{field}={other}"]))


def test_a_tokenizer_of_more_tokens_than_the_weights_have_is_named(tmp_path: Path) -> None:
    folder = write(_folder(tmp_path, "good"))
    train_tokenizer(["a tokenizer of every byte and some more " * 20], vocab_size=300).save(folder)
    with pytest.raises(
        CheckpointError, match=rf"{folder}: it has \d+ tokens and the weights beside it 50; copy the tokenizer"
    ):
        tokenizer_of(read_weights(str(folder)))


def _folder(parent: Path, name: str) -> Path:
    (parent / name).mkdir()
    return parent / name
