"""A stage from its config sections to its folder: what it leaves, what it starts from, and what it refuses."""

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moetrain.chat.templates.kimi_k2 import KIMI_K2
from moetrain.checkpoint import read as checkpoint
from moetrain.checkpoint.origin import TOKENIZER, Origin, check_fit, read_origin
from moetrain.checkpoint.read import CHECKPOINTS
from moetrain.data.config import DataConfig, MixConfig, SourceConfig, SourceKind, TokenizerConfig
from moetrain.data.tokenizer import Tokenizer, train_tokenizer
from moetrain.errors import CheckpointError, ConfigError
from moetrain.log import JsonlMetrics, read_metrics
from moetrain.model.gate_scale import routed_scaling_factor
from moetrain.optim.config import OptimConfig
from moetrain.parallel.config import EngineName, ParallelConfig
from moetrain.parallel.state import TensorReader
from moetrain.quant.config import QuantConfig
from moetrain.stage_files import SUMMARY
from moetrain.train.config import ComputeDtype, DocumentTrainConfig, RampConfig
from moetrain.train.interrupt import Status
from moetrain.train.stage_tokenizer import stage_tokenizer
from moetrain.train.stages import Sections, train_stage
from tests.data.test_tokenizer import plain_tokenizer
from tests.distributed import run_ranks
from tests.train.toy import losses, toy_model

VOCAB_SIZE = 256 + len(KIMI_K2.special_tokens) + 8


WORDS = ["alpha", "beta", "gamma", "delta", "one", "two", "three", "four"]


def write_texts(folder: Path, *, words: Sequence[str] = WORDS) -> None:
    folder.mkdir(parents=True)
    for number in range(24):
        line = " ".join(words[(number + i * i) % 8] for i in range(30))
        (folder / f"{number:02d}.txt").write_text(f"text {number}: {line}.\n")


def sections(texts: Path, *, engine: EngineName = EngineName.torch, expert: int = 1) -> Sections:
    return Sections(
        model=replace(toy_model(), vocab_size=VOCAB_SIZE),
        data=DataConfig(
            seq_len=64,
            sources={"words": SourceConfig(kind=SourceKind.text, path=str(texts))},
            tokenizer=TokenizerConfig(vocab_size=VOCAB_SIZE),
            validation_fraction=0.2,
            validation_rows=3,
        ),
        optim=OptimConfig(lr=1e-2),
        train=DocumentTrainConfig(
            steps=3, rows_per_step=4, rows_per_micro_batch=2, checkpoint_every=2, compute_dtype=ComputeDtype.float32
        ),
        parallel=ParallelConfig(engine=engine, expert=expert),
        quant=QuantConfig(),
        seed=5,
    )


def run(folder: Path, settings: Sections, *, origin: Origin | None = None) -> Status:
    metrics = JsonlMetrics(folder / "metrics.jsonl")
    try:
        return train_stage(settings, folder=folder, metrics=metrics, origin=origin)
    finally:
        metrics.close()


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_texts(folder / "texts")
    assert run(folder / "pretrain", sections(folder / "texts")) is Status.finished
    return folder


def test_a_finished_stage_says_how_well_it_predicts_beside_a_bigram(pretrained: Path) -> None:
    summary = json.loads((pretrained / "pretrain" / SUMMARY).read_text())
    words = summary["validation"]["words"]
    assert 0 < words["nats_per_character"] < 10
    assert 0 < words["bigram_nats_per_character"] < 10
    assert summary["steps"] == 3
    assert set(summary["digests"]) == {"words", "tokenizer"}
    assert summary["parameters"]["total"] > summary["parameters"]["routed"] > 0
    last = read_metrics(pretrained / "pretrain" / "metrics.jsonl")[-1]
    assert last["validation/words"] == words["nats_per_character"]


def test_a_stage_run_twice_gives_the_same_summary_but_for_the_time(pretrained: Path, tmp_path: Path) -> None:
    write_texts(tmp_path / "elsewhere")
    run(tmp_path / "pretrain", sections(tmp_path / "elsewhere"))
    one, other = (json.loads((folder / "pretrain" / SUMMARY).read_text()) for folder in (pretrained, tmp_path))
    assert one.pop("time").keys() == other.pop("time").keys()
    assert one == other


@pytest.mark.parametrize("name", ["pretrain", f"pretrain/{CHECKPOINTS}/step_00000003"])
def test_a_stage_starts_from_another_stages_weights_and_tokenizer(pretrained: Path, tmp_path: Path, name: str) -> None:
    origin = read_origin(pretrained / name)
    assert origin.step == 3
    assert origin.model == sections(pretrained / "texts").model
    settings = replace(sections(pretrained / "texts"), quant=QuantConfig(enabled=True))
    run(tmp_path / "sft", settings, origin=origin)
    tokenizer = (pretrained / "pretrain" / "tokenizer" / "tokenizer.json").read_text()
    assert (tmp_path / "sft" / "tokenizer" / "tokenizer.json").read_text() == tokenizer
    before, after = losses(pretrained / "pretrain" / "metrics.jsonl"), losses(tmp_path / "sft" / "metrics.jsonl")
    assert after[0] < before[0] - 0.05
    identity = checkpoint.load(tmp_path / "sft" / CHECKPOINTS / "step_00000003").state["identity"]
    assert identity["origin"] == origin.digest
    assert read_origin(tmp_path / "sft").quant == settings.quant


def without_tokenizer(pretrained: Path, folder: Path) -> Path:
    shutil.copytree(pretrained / "pretrain", folder, ignore=shutil.ignore_patterns(TOKENIZER))
    return folder


def test_weights_without_a_tokenizer_get_a_new_one_only_when_told(pretrained: Path, tmp_path: Path) -> None:
    origin = read_origin(without_tokenizer(pretrained, tmp_path / "alone"))
    settings = sections(pretrained / "texts")
    with pytest.raises(ConfigError, match=r"alone.* has no tokenizer beside its weights: .*retrain=true"):
        run(tmp_path / "sft", settings, origin=origin)
    assert not (tmp_path / "sft" / TOKENIZER).exists() and not (tmp_path / "sft" / CHECKPOINTS).exists()
    told = replace(settings, data=replace(settings.data, tokenizer=TokenizerConfig(retrain=True)))
    assert run(tmp_path / "sft", told, origin=origin) is Status.finished
    vocabulary = json.loads((tmp_path / "sft" / SUMMARY).read_text())["vocabulary"]
    assert vocabulary == {"tokens": VOCAB_SIZE, "rows": VOCAB_SIZE}
    with pytest.raises(ConfigError, match=r"alone.* has no tokenizer beside its weights"):
        run(tmp_path / "sft", settings, origin=origin)


def test_weights_train_on_with_their_tokenizer_wherever_it_is_named(pretrained: Path, tmp_path: Path) -> None:
    origin = read_origin(without_tokenizer(pretrained, tmp_path / "alone"))
    data = sections(pretrained / "texts").data
    theirs = replace(data, tokenizer=TokenizerConfig(path=str(pretrained / "pretrain" / TOKENIZER)))
    named = stage_tokenizer(theirs, tmp_path / "a", num_rows=VOCAB_SIZE, origin=origin)
    assert named.digest == Tokenizer.load(pretrained / "pretrain" / TOKENIZER).digest
    train_tokenizer(["other words " * 20], vocab_size=VOCAB_SIZE).save(tmp_path / "other")
    other = replace(data, tokenizer=TokenizerConfig(path=str(tmp_path / "other")))
    for weights in (origin, read_origin(pretrained / "pretrain")):
        with pytest.raises(ConfigError, match=r"data\.tokenizer\.path is .*/other, which is not the tokenizer of"):
            stage_tokenizer(other, tmp_path / "b", num_rows=VOCAB_SIZE, origin=weights)
    assert not (tmp_path / "b").exists()
    told = replace(data, tokenizer=replace(other.tokenizer, retrain=True))
    found = stage_tokenizer(told, tmp_path / "b", num_rows=VOCAB_SIZE, origin=origin)
    assert found.digest == Tokenizer.load(tmp_path / "other").digest
    with pytest.raises(ConfigError, match=r"b/tokenizer contains another tokenizer than that of the weights"):
        stage_tokenizer(data, tmp_path / "b", num_rows=VOCAB_SIZE, origin=read_origin(pretrained / "pretrain"))


@pytest.mark.parametrize("name", ["stage", f"stage/{CHECKPOINTS}/step_00000003", "step_of_a_stage"])
def test_the_tokenizer_is_found_beside_the_path_as_given(pretrained: Path, tmp_path: Path, name: str) -> None:
    elsewhere = tmp_path / "far" / "away"
    shutil.copytree(pretrained / "pretrain" / CHECKPOINTS, elsewhere)
    shutil.copytree(pretrained / "pretrain" / TOKENIZER, tmp_path / "stage" / TOKENIZER)
    (tmp_path / "stage" / CHECKPOINTS).symlink_to(elsewhere)
    (tmp_path / "step_of_a_stage").symlink_to(pretrained / "pretrain" / CHECKPOINTS / "step_00000003")
    found = read_origin(tmp_path / name).tokenizer
    assert found is not None and Tokenizer.load(found).vocab_size == VOCAB_SIZE


def test_a_model_with_more_rows_than_tokens_learns(pretrained: Path, tmp_path: Path) -> None:
    settings = sections(pretrained / "texts")
    padded = replace(
        settings,
        model=replace(settings.model, vocab_size=VOCAB_SIZE + 40),
        data=replace(settings.data, tokenizer=TokenizerConfig(path=str(pretrained / "pretrain" / TOKENIZER))),
    )
    assert run(tmp_path / "pretrain", padded) is Status.finished
    vocabulary = json.loads((tmp_path / "pretrain" / SUMMARY).read_text())["vocabulary"]
    assert vocabulary == {"tokens": VOCAB_SIZE, "rows": VOCAB_SIZE + 40}


def test_a_threshold_of_infinity_is_kept_in_checkpoints_and_goes_on(pretrained: Path, tmp_path: Path) -> None:
    settings = sections(pretrained / "texts")
    train = replace(settings.train, checkpoint_every=1, keep_checkpoints=3)
    settings = replace(settings, train=train, optim=replace(settings.optim, qk_clip=math.inf))
    run(tmp_path / "pretrain", settings)
    whole = losses(tmp_path / "pretrain" / "metrics.jsonl")
    folder = tmp_path / "pretrain" / CHECKPOINTS
    assert checkpoint.steps(folder) == [1, 2, 3]
    assert checkpoint.load(folder / "step_00000003").state["identity"]["optim"]["qk_clip"] == "inf"
    shutil.rmtree(folder / "step_00000003")
    assert run(tmp_path / "pretrain", settings) is Status.finished
    assert losses(tmp_path / "pretrain" / "metrics.jsonl") == whole  # the last step was taken again
    clipped = replace(settings, optim=replace(settings.optim, qk_clip=100.0))
    with pytest.raises(CheckpointError, match=r"optim\.qk_clip: inf -> 100\.0"):
        run(tmp_path / "pretrain", clipped)


def test_weights_of_another_shape_are_refused_with_the_field(pretrained: Path, tmp_path: Path) -> None:
    settings = sections(pretrained / "texts")
    other = replace(settings, model=replace(settings.model, rope_theta=1e4))
    with pytest.raises(CheckpointError, match=r"does not fit \(rope_theta: 50000.0 -> 10000.0\)"):
        run(tmp_path / "sft", other, origin=read_origin(pretrained / "pretrain"))
    assert not (tmp_path / "sft" / TOKENIZER).exists()  # met before the data


def test_a_derived_factor_is_the_number_that_an_export_writes_of_it(pretrained: Path) -> None:
    origin = read_origin(pretrained / "pretrain")
    assert origin.model.routed_scaling_factor is None
    written = replace(origin, model=replace(origin.model, routed_scaling_factor=routed_scaling_factor(origin.model)))
    assert check_fit(written, origin.model) == []
    other = replace(origin, model=replace(origin.model, routed_scaling_factor=1.0))
    with pytest.raises(CheckpointError, match=r"does not fit \(routed_scaling_factor: 1\.0 -> "):
        check_fit(other, origin.model)


def test_a_named_checkpoint_with_a_flipped_byte_is_the_users_error(pretrained: Path, tmp_path: Path) -> None:
    settings = replace(sections(pretrained / "texts"), seed=6)
    run(tmp_path / "pretrain", settings)
    path = tmp_path / "pretrain" / CHECKPOINTS / "step_00000003"
    shard = path / "model-r00000-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    with pytest.raises(CheckpointError, match=r"model-r00000-00001.safetensors: its sha256 is") as raised:
        read_origin(path)
    assert raised.value.exit_code == 2


def test_a_folder_without_weights_is_refused_with_what_would_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither the folder of a stage"):
        read_origin(tmp_path)


def scheduled(texts: Path, *, engine: EngineName = EngineName.torch, steps: int = 6) -> Sections:
    """A stage with a ramp, a mix that changes in it, and a balance bias that stands still at the end."""
    settings = sections(texts, engine=engine)
    numbers = texts.with_name("numbers")
    if not numbers.exists():
        write_texts(numbers, words=[str(7**n) for n in range(8)])
    sources = {
        "words": SourceConfig(kind=SourceKind.text, path=str(texts)),
        "numbers": SourceConfig(kind=SourceKind.text, path=str(numbers), weight=0.0),
    }
    return replace(
        settings,
        data=replace(settings.data, sources=sources, mix=[MixConfig(from_step=3, weights={"numbers": 3.0})]),
        model=replace(settings.model, balance=replace(settings.model.balance, bias_still_share=0.5)),
        train=replace(
            settings.train,
            steps=steps,
            rows_per_step=6,
            rows_per_micro_batch=2,
            batch_ramp=[RampConfig(steps=2, rows=2), RampConfig(steps=2, rows=4)],
            checkpoint_every=1,
            keep_checkpoints=9,
        ),
    )


@pytest.fixture(scope="module")
def ramped(pretrained: Path) -> Path:
    assert run(pretrained / "ramped", scheduled(pretrained / "texts")) is Status.finished
    return pretrained / "ramped"


def tensors(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return dict(checkpoint.load(folder / CHECKPOINTS / f"step_{step:08d}").tensors)


def test_rows_tokens_mix_and_bias_rate_are_told_and_counted(ramped: Path) -> None:
    steps = [row for row in read_metrics(ramped / "metrics.jsonl") if "loss" in row]
    assert [row["rows"] for row in steps] == [2, 2, 4, 4, 6, 6]
    assert [row["mix"] for row in steps] == [0, 0, 0, 1, 1, 1]
    assert [row["bias_rate"] for row in steps] == [1e-3] * 3 + [0.0] * 3
    summary = json.loads((ramped / SUMMARY).read_text())
    assert summary["rows"] == 24
    assert summary["tokens"] == sum(row["tokens"] for row in steps)
    first, second = summary["mixes"]
    assert first == {"words": 8, "numbers": 0}
    assert sum(second.values()) == 16
    assert second["numbers"] == pytest.approx(12, abs=2)
    assert set(summary["validation"]) == {"words", "numbers"}


def test_the_balance_bias_stands_still_when_its_rate_is_zero(ramped: Path) -> None:
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    biases = [tensors(ramped, step)[name] for step in range(1, 7)]
    assert not torch.equal(biases[1], biases[2])
    assert all(torch.equal(bias, biases[2]) for bias in biases[3:])


@pytest.mark.parametrize("step", [1, 3, 4])
def test_a_run_that_was_stopped_in_its_ramp_or_mix_goes_on_to_the_same_bits(
    ramped: Path, tmp_path: Path, step: int
) -> None:
    folder = tmp_path / "stopped"
    shutil.copytree(ramped, folder)
    for later in range(step + 1, 7):
        shutil.rmtree(folder / CHECKPOINTS / f"step_{later:08d}")
    (folder / SUMMARY).unlink()
    assert run(folder, scheduled(ramped.parent / "texts")) is Status.finished
    assert losses(folder / "metrics.jsonl") == losses(ramped / "metrics.jsonl")
    whole, other = tensors(ramped, 6), tensors(folder, 6)
    assert whole.keys() == other.keys()
    assert all(torch.equal(whole[name], other[name]) for name in whole)


def test_a_run_is_not_continued_with_another_ramp_or_mix(ramped: Path, tmp_path: Path) -> None:
    settings = scheduled(ramped.parent / "texts")
    folder = tmp_path / "changed"
    shutil.copytree(ramped, folder)
    shutil.rmtree(folder / CHECKPOINTS / "step_00000006")
    with pytest.raises(CheckpointError, match=r"train.batch_ramp: .*rows.: 2.* -> \[\]"):
        run(folder, replace(settings, train=replace(settings.train, batch_ramp=[])))
    with pytest.raises(CheckpointError, match=r"data.mix: .*from_step.: 3.* -> \[\]"):
        run(folder, replace(settings, data=replace(settings.data, mix=[])))


def train_on_ranks(folder: str, expert: int) -> dict[str, list[float]]:
    root = Path(folder)
    engine = sections(root / "texts", engine=EngineName.deepspeed, expert=expert)
    run(root / f"expert_{expert}", engine)
    run(root / "ramped_on_ranks", scheduled(root / "texts", engine=EngineName.deepspeed))
    return {name: losses(root / name / "metrics.jsonl") for name in (f"expert_{expert}", "ramped_on_ranks")}


def test_two_ranks_that_share_the_experts_give_the_losses_of_one_process_and_it_can_go_on_from_theirs(
    pretrained: Path, ramped: Path
) -> None:
    both = run_ranks(train_on_ranks, 2, folder=str(pretrained), expert=2)
    assert both[0] == both[1]
    torch.testing.assert_close(both[0]["ramped_on_ranks"], losses(ramped / "metrics.jsonl"), rtol=1e-5, atol=1e-5)
    one = both[0]["expert_2"]
    torch.testing.assert_close(one, losses(pretrained / "pretrain" / "metrics.jsonl"), rtol=1e-5, atol=1e-5)
    summaries = [json.loads((pretrained / name / SUMMARY).read_text()) for name in ("pretrain", "expert_2")]
    alone, shared = (summary["validation"]["words"]["nats_per_character"] for summary in summaries)
    assert shared == pytest.approx(alone, rel=1e-5)

    shutil.rmtree(pretrained / "expert_2" / CHECKPOINTS / "step_00000003")
    run(pretrained / "expert_2", sections(pretrained / "texts"))  # the plain engine goes on from what two ranks saved
    torch.testing.assert_close(losses(pretrained / "expert_2" / "metrics.jsonl"), one, rtol=1e-5, atol=1e-5)


def test_tokens_of_a_named_template_are_added_to_the_tokenizer_of_the_weights(tmp_path: Path) -> None:
    folder = plain_tokenizer(tmp_path / "plain", config={"eos_token": "<|endoftext|>"})
    plain = Tokenizer.load(folder)
    weights = Origin(
        path=folder,
        tensors={},
        reader=TensorReader({}),
        model=toy_model(),
        quant=None,
        tokenizer=folder,
        make_digest=lambda: "",
        step=0,
    )
    rows = plain.vocab_size + 8
    own = tmp_path / "sft"
    for name in (None, "chatml"):  # the folder has the plain tokenizer when the template is named
        config = DataConfig(tokenizer=TokenizerConfig(**({} if name is None else {"template": name})))
        found = stage_tokenizer(config, own, num_rows=rows, origin=weights)
        assert Tokenizer.load(own / TOKENIZER).digest == found.digest
    assert found.vocab_size == rows and Tokenizer.load(own / TOKENIZER).template.name == "chatml"
    assert stage_tokenizer(config, tmp_path / "new", num_rows=rows, origin=weights).digest == found.digest
    with pytest.raises(ConfigError, match=f"set model.vocab_size to {rows} or more"):
        stage_tokenizer(config, tmp_path / "small", num_rows=rows - 1, origin=weights)
