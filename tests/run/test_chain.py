"""Stages of a recipe are checked against each other before the first one runs; weights give the shape."""

import json
from pathlib import Path

import pytest

from moetrain.checkpoint.shape import stored_shape
from moetrain.commands.recipe import RecipeRun
from moetrain.compose import compose, load_config, save_config
from moetrain.data.tokenizer import train_tokenizer
from moetrain.errors import CheckpointError, ConfigError
from moetrain.hf.shape import to_hf_config
from moetrain.model.config import ModelConfig, YarnConfig
from moetrain.run import recipe
from moetrain.run.recipe import Stage

CHAIN = """
stages:
  - {name: dense, command: pretrain, overrides: [model=k2_nano_dense]}
  - {name: sparse, command: upcycle, overrides: [model=k2_nano_shards, upcycle.method=split, upcycle.shared=part,
      "init_from=${stage:dense}"]}
  - {name: sft, command: sft, overrides: ["init_from=${stage:sparse}", model.yarn.factor=2]}
  - {name: more, command: sft, overrides: [train.continue_as=part,
      "continue_from=${stage:sft}/checkpoints/step_00000003"]}
  - {name: rl, command: rl, overrides: ["init_from=${stage:more}", model.balance.bias_rule=none]}
  - {name: out, command: export, overrides: ["init_from=${stage:rl}"]}
  - {name: again, command: sft, overrides: ["init_from=${stage:out}"]}
  - {name: solved, command: eval, overrides: ["init_from=${stage:out}", "eval.masters=${stage:rl}"]}
"""
SHAPE = ModelConfig(hidden_size=64, num_layers=3, rms_norm_eps=1e-6, yarn=YarnConfig(factor=4.0))


def stages(folder: Path, *of_stages: str, text: str = CHAIN) -> dict[str, Stage]:
    (folder / "recipe.yaml").write_text(text)
    found = recipe.compose_stages(recipe.load(str(folder)), RecipeRun(folder=str(folder)), overrides=of_stages)
    return {stage.name: stage for stage in found}


def hf_folder(folder: Path, **changes: object) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**to_hf_config(SHAPE), **changes}))
    return str(folder)


def test_a_shape_is_said_once_and_every_later_stage_has_it(tmp_path: Path) -> None:
    found = stages(tmp_path)
    sparse = compose("upcycle", ["model=k2_nano_shards", "upcycle.method=split", "upcycle.shared=part"]).model
    assert found["sparse"].config.model == sparse
    for name in ("sft", "more", "rl", "again"):
        model = found[name].config.model
        assert (model.num_experts, model.num_experts_per_token) == (24, 3), name
        assert model.yarn.factor == 2, name
    assert found["rl"].config.model.balance.bias_rule == "none"
    assert found["more"].config.model.balance == sparse.balance


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["sft.model=k2_nano"],
            r"stage sft: model does not fit the weights of init_from=\S+/sparse \(.*num_experts: 24 -> 8",
        ),
        (
            ["rl.model.hidden_size=64"],
            r"stage rl: model does not fit .*/more \(hidden_size: 128 -> 64\): leave model= ",
        ),
        (["more.model.vocab_size=2000"], r"stage more: model does not fit the weights of continue_from=.*1024 -> 2000"),
        (
            ["dense.model.hidden_size=64"],
            r"stage sparse: model does not fit the dense weights .*hidden_size: 64 -> 128",
        ),
        (["dense.model.num_dense_layers=1"], r"stage sparse: init_from is .*: 3 of its 4 layers have experts already"),
        (["rl.rollout.max_tokens=4000"], r"stage rl: rollout.max_tokens is 4000: give at most model.max_position_emb"),
        (["solved.rollout.max_tokens=4000"], r"stage solved: rollout.max_tokens is 4000: give at most model.max_posi"),
        (["again.data.seq_len=4096"], r"stage again: data.seq_len is 4096: give at most model.max_position_embeddings"),
        (["rl.quant.group_size=24"], r"stage rl: quant.group_size is 24: it must divide model.hidden_size=128"),
        (
            ["sft.quant=none", "more.quant=none", "rl.quant=none", "out.quant=int4", "out.quant.group_size=40"],
            r"stage out: quant.group_size is 40: it must divide model.hidden_size=128",
        ),
        (
            ["out.quant=int4", "out.quant.group_size=64"],
            r"stage out: quant.group_size is 64, and the weights were trained with 32: leave quant out",
        ),
        (
            ["rl.task.context.kind=notes"],
            r"stage solved: task.context is not the one that \S+/out was trained with \(kind: notes -> full.*: "
            r"give the same, or eval.other_context=true",
        ),
        (["solved.eval.masters=${stage:dense}"], r"stage solved: eval.masters is .*/dense: that is another model"),
        (
            ["more.optim.name=adamw"],
            r"stage more: optim.name is adamw, but the run of \S+/sft/\S+ has muon: set optim",
        ),
        (["more.run.seed=3"], r"stage more: run.seed is 3, but the run of .* has 0: set run.seed=0"),
        (["more.continue_from=${stage:sparse}"], r"stage more: continue_from is \S+/sparse: that stage does not train"),
        (
            [
                "more.continue_from=${stage:sft}",
                "more.train.continue_as=whole",
                "more.train.steps=20",
                "sft.train.steps=20",
            ],
            r"stage more: train.steps is 20, but \S+/sft has taken 20 steps already",
        ),
        (
            ["more.data.seq_len=128"],
            r"stage more: \S+: it read other rows than this config \(data.seq_len: \d+ -> 128\)",
        ),
        (
            ["rl.init_from=null", "rl.continue_from=${stage:more}", "rl.train.continue_as=part"],
            r"stage rl: continue_from is \S+/more, a stage of another command: RL can continue only RL",
        ),
        (
            ["solved.init_from=${stage:out}", "again.init_from=${stage:solved}"],
            r"\$\{stage:solved\} is no earlier stage",
        ),
        (["dense.data.tokenizer.vocab_size=600", "sft.data.tokenizer.vocab_size=700"], r"stage sft: .*has 600 tokens"),
        (["sft.data.tokenizer.path=words"], r"stage sft: data.tokenizer.path is words: that is another tokenizer"),
        (
            ["dense.data.tokenizer.template=deepseek_v3", "sft.data.tokenizer.template=kimi_k2"],
            r"stage sft: data.tokenizer.template is kimi_k2, and the tokenizer of .* is trained for deepseek_v3",
        ),
    ],
)
def test_stages_that_do_not_fit_are_refused_before_the_first_one_runs(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train_tokenizer(["some words " * 9], vocab_size=275).save(tmp_path / "words")
    with pytest.raises(ConfigError, match=message) as caught:
        stages(tmp_path, *words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("export", "masters", "message"),
    [
        ("rl", "out", r"stage verified: init_from is \S+/rl: not an export"),
        ("out", "out", r"stage verified: masters is \S+/out: this is an export"),
        ("out", "rl", None),
    ],
)
def test_an_export_and_its_masters_are_not_mixed_up(
    export: str, masters: str, message: str | None, tmp_path: Path
) -> None:
    words = f'["init_from=${{stage:{export}}}", "masters=${{stage:{masters}}}"]'
    text = f"{CHAIN}  - {{name: verified, command: verify exports, overrides: {words}}}\n"
    if message is None:
        assert "verified" in stages(tmp_path, text=text)
    else:
        with pytest.raises(ConfigError, match=message):
            stages(tmp_path, text=text)


def test_another_context_is_evaluated_where_it_is_asked_for(tmp_path: Path) -> None:
    assert stages(tmp_path, "rl.task.context.kind=notes", "solved.eval.other_context=true")


def test_a_tokenizer_without_chat_tokens_is_refused_where_a_later_stage_chats(tmp_path: Path) -> None:
    train_tokenizer(["some words " * 9], vocab_size=275).save(tmp_path / "words")
    path = tmp_path / "words" / "tokenizer.json"
    path.write_text(path.read_text().replace("<|im_end|>", "<|another|>"))
    words = [f"dense.data.tokenizer.path={tmp_path}/words", "sft.data=language"]
    with pytest.raises(ConfigError, match=r"stage rl: .*im_end"):
        stages(tmp_path, *words, "more.data=language", "dense.data=language")
    retrained = ["sft.data.tokenizer.retrain=true"]
    assert stages(tmp_path, *words, *retrained, "more.data=language", "dense.data=language")


def test_a_tokenizer_that_is_named_again_is_the_same_one(tmp_path: Path) -> None:
    train_tokenizer(["some words " * 9], vocab_size=275).save(tmp_path / "words")
    same = [f"{name}.data.tokenizer.path={tmp_path}/words" for name in ("dense", "sft")]
    assert stages(tmp_path, *same)
    assert stages(tmp_path, "sft.data.tokenizer.path=${stage:dense}/tokenizer")


def test_prepared_data_have_the_tokenizer_of_the_weights(tmp_path: Path) -> None:
    train_tokenizer(["some words " * 9], vocab_size=275).save(tmp_path / "words")
    (tmp_path / "a.txt").write_text("some words")
    source = f"data.sources.web.kind=text, data.sources.web.path={tmp_path}/a.txt"
    reads = '"data=none", "data.sources.web.kind=prepared", "data.sources.web.path=${stage:shards}/web"'
    text = f"""
stages:
  - {{name: pretrain, command: pretrain, overrides: [model=k2_nano, data=test]}}
  - {{name: shards, command: prepare, overrides: [{source}, OTHER]}}
  - {{name: more, command: pretrain, overrides: ["init_from=${{stage:pretrain}}", {reads}]}}
"""
    other = f"data.tokenizer.path={tmp_path}/words"
    with pytest.raises(ConfigError, match=r"stage more: data.sources.web.path is .*: it is prepared with another tok"):
        stages(tmp_path, text=text.replace("OTHER", other))
    same = '"init_from=${stage:pretrain}"'
    assert stages(tmp_path, text=text.replace("OTHER", same))


def test_a_stage_that_writes_no_weights_is_no_beginning(tmp_path: Path) -> None:
    text = CHAIN + '  - {name: last, command: sft, overrides: ["init_from=${stage:solved}"]}\n'
    with pytest.raises(ConfigError, match=r"stage last: init_from is .*/solved: that stage writes no weights"):
        stages(tmp_path, text=text)


def test_a_hugging_face_folder_gives_every_field(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "hf")
    model = compose("sft", [f"init_from={folder}"]).model
    assert to_hf_config(model) == to_hf_config(SHAPE)
    longer = compose(
        "sft", [f"init_from={folder}", "model.yarn={factor: 8}", "model.max_position_embeddings=4096"]
    ).model
    assert longer.yarn == YarnConfig(factor=8.0, original_max_position=4096)
    assert (longer.hidden_size, longer.max_position_embeddings) == (64, 4096)
    assert compose("sft", [f"init_from={folder}", "model.hidden_size=64"]).model.hidden_size == 64  # it says the same
    with pytest.raises(ConfigError, match=r"\(num_layers: 3 -> 5\): leave model= and these fields out"):
        compose("rl", [f"init_from={folder}", "model.num_layers=5"])
    with pytest.raises(ConfigError, match=r"hidden_size: 64 -> 128"):
        compose("sft", [f"init_from={folder}", "model=k2_nano"])


def test_a_config_file_without_a_shape_takes_that_of_its_weights(tmp_path: Path) -> None:
    run = compose("sft", [f"init_from={hf_folder(tmp_path / 'hf')}"])
    save_config(run, tmp_path / "config.yaml")
    assert load_config("sft", tmp_path / "config.yaml") == run
    (tmp_path / "short.yaml").write_text(f"init_from: {tmp_path}/hf\ndata: {{sources: {{a: {{kind: maths}}}}}}\n")
    assert load_config("sft", tmp_path / "short.yaml").model == run.model


@pytest.mark.parametrize("weights", ["nowhere", "~nobody/x", "", "empty"])
def test_a_folder_without_weights_gives_no_shape(weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing there is said by the check of the inputs, in one line."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert stored_shape(weights) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "abc"}, r"hf: config\.json: hidden_size is 'abc': give a number"),
        ({"architectures": ["LlamaForCausalLM"]}, r"architecture LlamaForCausalLM is not supported"),
    ],
)
def test_a_folder_whose_shape_cannot_be_read_is_named(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        compose("sft", [f"init_from={hf_folder(tmp_path / 'hf', **changes)}"])


def test_a_damaged_checkpoint_is_passed_over_and_a_folder_of_them_is_named(tmp_path: Path) -> None:
    for step in (1, 2):
        (tmp_path / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"step_00000001/state\.json: the file is missing"):
        stored_shape(str(tmp_path))
    state = tmp_path / "checkpoints" / "step_00000001" / "state.json"
    state.write_text('{"identity": {"model": {}}}')
    with pytest.raises(CheckpointError, match=r"state\.json: contains no model shape that this version can read"):
        stored_shape(str(tmp_path))
