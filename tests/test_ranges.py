"""Numbers out of range: one line that names the field, the value and what would do, whatever command has the field."""

import pytest

from moetrain.compose import compose
from moetrain.errors import ConfigError

OUT_OF_RANGE = {
    "pretrain": [
        *("model.vocab_size=0", "model.qk_nope_head_dim=-4", "model.v_head_dim=0", "model.intermediate_size=-1"),
        *("model.moe_intermediate_size=0", "model.num_shared_experts=-1", "model.q_lora_rank=0", "model.rope_theta=0"),
        *("model.initializer_range=-1", "model.initializer_range=nan", "model.rms_norm_eps=-1"),
        *("model.routed_scaling_factor=nan", "model.yarn.factor=-1", "model.yarn.factor=inf", "model.yarn.mscale=nan"),
        *("data.validation_rows=0", "data.validation_rows=-1", "data.tokenizer.max_characters=0"),
        *("data.sources.english.weight=nan", "data.sources.english.weight=inf", "data.sources.english.weight=-1"),
        *("data.sources.maths.num_documents=0", "data.sources.maths.num_documents=-3"),
        *("data.sources.english.max_characters=-5", "data.tokenizer.vocab_size=10"),
        *("optim.lr=nan", "optim.lr=inf", "optim.lr=0", "optim.momentum=2", "optim.eps=-1", "optim.clip_norm=nan"),
        *("optim.weight_decay=-1", "optim.schedule.final_ratio=-1", "optim.schedule.warmup_steps=-1"),
        *("train.validate_every=-1", "train.steps=0", "train.steps=99999999999999999999", "train.max_skipped_in_row=0"),
        *(
            "parallel.timeout_s=-1",
            "parallel.expert=0",
            "parallel.expert_rows=0",
            "task.database.max_calls=0",
            "task.database.deadline_s=-1",
        ),
        *("task.tool_failure=1", "run.seed=-1", "run.seed=99999999999999999999", "run.threads=0"),
    ],
    "rl": [
        "rl.tokens_per_micro_batch=-1",
        "rl.tokens_per_micro_batch=0",
        "rollout.temperature=nan",
        "rollout.max_seconds=-1",
    ],
    "eval": ["eval.first_task=-1", "eval.kl_tasks=0", "eval.num_traces=-1", "eval.longer_tasks=-1"],
    "generate": ["temperature=nan", "temperature=-1", "temperature=1e-09", "max_new_tokens=0"],
    "verify exports": ["num_rows=0", "num_tokens=0"],
    "verify layouts": ["expert_rows=0", "steps=0"],
    "run": ["seed=-1", "num_processes=0", "threads=0"],
}


@pytest.mark.parametrize(
    ("command", "override"), [(command, override) for command, words in OUT_OF_RANGE.items() for override in words]
)
def test_a_number_out_of_range_is_named_with_its_field(command: str, override: str) -> None:
    field, _, value = override.partition("=")
    with pytest.raises(ConfigError) as caught:
        compose(command, [override])
    said = str(caught.value)
    assert said.startswith((f"{field} is {value}: give ", f"{field} is {value}.0: give ")), said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("command", "override", "message"),
    [
        ("eval", "eval.longer_calls=[0]", "eval.longer_calls is [0]: give at least 1"),
        ("eval", "eval.temperatures=[1.0,nan]", "eval.temperatures is [1.0, nan]: give 0 (greedy), or at least 1e-06"),
        ("pretrain", "optim.betas=[0.9,1]", "optim.betas is [0.9, 1.0]: give a number from 0 to below 1"),
        ("pretrain", "run.folder=", "run.folder is '': give the path of a folder"),
        ("pretrain", 'run.name="a\nb"', r"run.name is 'a\nb': give the name of a folder"),
        ("run", "folder=", "folder is '': give the path of a folder"),
        (
            "pretrain",
            "data.sources.mine.kind=jsonl",
            "data.sources.mine.path is None: a source of kind jsonl requires one",
        ),
        (
            "pretrain",
            "data.sources.mine.path=a.jsonl",
            "data.sources.mine.path is a.jsonl, which a source of kind stdlib_code does not read",
        ),
    ],
)
def test_what_is_no_single_number_is_named_too(command: str, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(command, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "choice"),
    [
        ("optim.momentum=0.9", "optim.name=adamw"),
        ("optim.newton_schulz=hybrid_8_2", "optim.name=adamw"),
        ("optim.schedule.decay_fraction=0.2", "optim.schedule.name=cosine"),
        ("optim.schedule.decay_shape=cosine", "optim.schedule.name=constant"),
        ("optim.schedule.final_ratio=0.2", "optim.schedule.name=constant"),
    ],
)
def test_a_setting_that_another_setting_makes_useless_is_refused(override: str, choice: str) -> None:
    field, _, value = override.partition("=")
    compose("pretrain", [override])
    compose("pretrain", [choice])
    with pytest.raises(
        ConfigError, match=f"^{field} is {value} and has no effect, because {choice.replace('=', ' is ')}:"
    ):
        compose("pretrain", [override, choice])
