"""`bench drafts`: each kind of draft generates the same tokens, and one that does not is found."""

from dataclasses import replace

import pytest

from moetrain.bench.drafts import Contestant, bench_drafts, render
from moetrain.commands.bench_generation import BenchDraftsRun
from moetrain.errors import BoundError, ConfigError
from moetrain.inference.build import build_model
from moetrain.inference.protocol import Model
from moetrain.inference.speculation import Speculation
from moetrain.kernels.build import Library, load
from moetrain.model.transformer import Transformer, initialize
from moetrain.quant.config import QuantConfig
from moetrain.rollout.config import RolloutConfig
from tests.even_task import MODEL, EvenFamily, even_tokenizer

RUN = BenchDraftsRun(
    episodes=3, repetitions=1, rollout=RolloutConfig(num_slots=1, max_tokens=80, max_turn_tokens=60, max_turns=2)
)


def _model(*, seed: int = 0, speculation: Speculation = Speculation.off, library: Library | None = None) -> Model:
    config = replace(MODEL, num_mtp_layers=1)
    source = Transformer(config)
    initialize(source, seed)
    return build_model(
        source.state_dict(),
        config=config,
        quant=QuantConfig(),
        library=library,
        speculation=speculation,
    )


def test_every_kind_of_draft_is_measured_on_the_same_tokens() -> None:
    report = bench_drafts(
        RUN,
        contestants=[
            Contestant(name="none", model=_model(library=load()), speculation=Speculation.off),
            Contestant(
                name="module",
                model=_model(speculation=Speculation.auto, library=load()),
                speculation=Speculation.auto,
            ),
        ],
        family=EvenFamily(),
        tokenizer=even_tokenizer(),
    )
    none, module = report["rows"]
    assert report["tokens"] > 0 and none["tokens_per_s"]["min"] > 0
    assert none["ratio"] == {"min": 1.0, "median": 1.0, "max": 1.0} and none["drafted"] == 0
    assert module["changed"] == 0 and module["drafted"] > 0 and 0 <= module["right"] <= module["drafted"]
    (table,) = render(report)
    assert table.row_count == 2


def test_a_contestant_with_other_tokens_is_found() -> None:
    others = [
        Contestant(name=f"seed {seed}", model=_model(seed=seed, library=load()), speculation=Speculation.off)
        for seed in (0, 1)
    ]
    with pytest.raises(BoundError, match="seed 1 generates other tokens than seed 0"):
        bench_drafts(RUN, contestants=others, family=EvenFamily(), tokenizer=even_tokenizer())


def test_trajectories_that_the_order_of_sums_changed_are_counted() -> None:
    others = [Contestant(name=str(seed), model=_model(seed=seed), speculation=Speculation.off) for seed in (0, 1)]
    report = bench_drafts(RUN, contestants=others, family=EvenFamily(), tokenizer=even_tokenizer())
    assert [row["changed"] for row in report["rows"]] == [0, 3]


def test_counts_out_of_range_are_named() -> None:
    for name in ("episodes", "repetitions"):
        with pytest.raises(ConfigError, match=f"{name} is 0"):
            BenchDraftsRun(**{name: 0})  # type: ignore[arg-type]
