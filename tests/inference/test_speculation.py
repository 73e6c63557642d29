"""Drafts and forced tokens change how many steps a sequence takes, and nothing else."""

import random
from dataclasses import asdict
from typing import Any

import pytest

from moetrain.chat.grammar import Calls, turn_grammar
from moetrain.chat.templates.kimi_k2 import IM_END, KIMI_K2
from moetrain.inference.build import build_model
from moetrain.inference.engine import GenerationEngine
from moetrain.inference.guided import Guide
from moetrain.inference.protocol import Counts, Model, Sequence
from moetrain.inference.sampling import Constraint, Sampling
from moetrain.inference.speculation import Drafter, Speculation
from moetrain.kernels.build import load
from moetrain.model.config import ModelConfig
from moetrain.model.transformer import Transformer, initialize
from moetrain.quant.config import QuantConfig
from tests.even_task import even_tokenizer
from tests.inference.test_guided import LOOK, STOP

TOKENIZER = even_tokenizer()
GUIDE = Guide(TOKENIZER, end_id=TOKENIZER.special_ids[IM_END])
GRAMMAR = turn_grammar(
    [LOOK, STOP], template=KIMI_K2, special_ids=TOKENIZER.special_ids, calls=Calls.required, thinks=False
)


def _model(seed: int, *, deviation: float = 0.1) -> Model:
    config = ModelConfig(
        vocab_size=TOKENIZER.vocab_size,
        num_layers=2,
        hidden_size=64,
        moe_intermediate_size=32,
        num_experts=8,
        initializer_range=deviation,
    )
    source = Transformer(config)
    initialize(source, seed)
    return build_model(source.state_dict(), config=config, quant=QuantConfig(enabled=True), library=load())


@pytest.fixture(scope="module")
def model() -> Model:
    return _model(1)


_TWO_TOKENS = Sampling(temperature=0.5, logit_bias=((5, 40.0), (6, 40.0)))
"""Draws two tokens only, so that drafts are often made, often right and often wrong, whatever the model."""


def _samplings(stream: random.Random) -> Sampling:
    """Return settings of low entropy, so that sequences repeat themselves."""
    bias = tuple((token, 3.0) for token in stream.sample(range(TOKENIZER.vocab_size), 3))
    return stream.choice(
        [
            _TWO_TOKENS,
            Sampling(temperature=0.0),
            Sampling(temperature=0.15),
            Sampling(temperature=0.4, top_p=0.5, top_logprobs=2),
            Sampling(top_k=2, logit_bias=bias),
            Sampling(min_p=0.5),
            Sampling(temperature=0.3, logit_bias=bias),
        ]
    )


def _sequences(stream: random.Random, *, number: int, is_guided: bool) -> list[Sequence]:
    """Return sequences whose prompts repeat parts, some of them a common beginning."""
    shared = [stream.randrange(60) for _ in range(70)]
    sequences = []
    for place in range(number):
        part = [stream.randrange(60) for _ in range(8)]
        prompt = (shared[: stream.choice((0, 30, 66, 70))] + part * 3)[: stream.randint(5, 94)] or part
        constraint: Constraint | None = GUIDE.constraint(GRAMMAR) if is_guided and place % 2 == 0 else None
        sequences.append(
            Sequence(
                tokens=list(prompt),
                stream=place + 1,
                limit=len(prompt) + stream.randint(1, 60),
                stop_ids=frozenset(stream.sample(range(60), 2)) | frozenset(TOKENIZER.end_ids),
                sampling=_samplings(stream),
                constraint=constraint,
            )
        )
    return sequences


def _record(sequence: Sequence) -> dict[str, Any]:
    """Return all that a sequence says about its tokens."""
    names = ("tokens", "logprobs", "is_sampled", "versions", "free_logprobs", "alternatives")
    return {name: getattr(sequence, name) for name in names}


def _run(case: int, model: Model, speculation: Speculation) -> tuple[list[dict[str, Any]], Counts, int]:
    """Generate two turns of the sequences of a drawn case; return them, the counts, and the number of steps."""
    stream = random.Random(case)
    number = stream.choice((1, 1, 2, 3, 5, 9))
    sequences = _sequences(stream, number=number, is_guided=case % 2 == 1)
    results = {id(sequence): [stream.randrange(60) for _ in range(3)] * 3 for sequence in sequences}
    pages = stream.choice((3, 5, 40))
    engine = GenerationEngine(
        model,
        num_slots=stream.choice((2, 9)),
        max_tokens=180,
        cache_megabytes=(pages + 0.5) * model.new_cache(1).nbytes / (1 << 20),
        speculation=speculation,
    )
    for sequence in sequences:
        engine.add(sequence)
    num_steps = 0
    first_turns = set(map(id, sequences))
    while engine.is_busy:
        num_steps += 1
        for sequence in engine.step():
            if id(sequence) in first_turns and sequence.constraint is None:
                first_turns.discard(id(sequence))
                given = results[id(sequence)]
                engine.extend(sequence, given, limit=min(len(sequence.tokens) + 9 + 20, 180))
            else:
                engine.cancel(sequence)
    assert engine.counts.num_pages_used == 0
    return [_record(sequence) for sequence in sequences], engine.counts, num_steps


def test_drafts_and_forced_tokens_change_nothing_but_the_number_of_steps(model: Model) -> None:
    total = dict.fromkeys(asdict(Counts()), 0)
    steps = {Speculation.off: 0, Speculation.auto: 0}
    for case in range(21):
        plain, none, num_plain = _run(case, model, Speculation.off)
        drafted, counts, num_drafted = _run(case, model, Speculation.auto)
        assert drafted == plain
        assert none.num_drafted == 0
        steps[Speculation.off] += num_plain
        steps[Speculation.auto] += num_drafted
        total = {name: number + asdict(counts)[name] for name, number in total.items()}
    assert total["num_right"] > 50 and total["num_drafted"] - total["num_right"] > 100
    assert total["num_forced"] > 50 and total["num_preemptions"] > 5 and total["num_drafts"] > 50
    assert steps[Speculation.auto] < steps[Speculation.off]


def test_pages_that_held_rejected_drafts_continue_like_new_ones(model: Model) -> None:
    """Other sequences read the pages of the first from the tree, at every length."""
    engine = GenerationEngine(model, num_slots=40, max_tokens=180, speculation=Speculation.auto)
    prompt = [1, 2, 3, 4, 5, 6, 7] * 3
    first = Sequence(tokens=list(prompt), stream=3, limit=170, sampling=_TWO_TOKENS)
    engine.add(first)
    while engine.is_busy:
        engine.step()
    assert 0 < engine.counts.num_right < engine.counts.num_drafted
    engine.cancel(first)
    for length in range(25, 170, 13):
        for tail in ([], [9, 8]):
            found, expected = (
                Sequence(tokens=first.tokens[:length] + tail, stream=5, limit=length + 6) for _ in range(2)
            )
            alone = GenerationEngine(model, num_slots=1, max_tokens=180)
            for sequence, its in ((found, engine), (expected, alone)):
                its.add(sequence)
                while its.is_busy:
                    its.step()
                its.cancel(sequence)
            assert found.num_cached >= length - 1 and _record(found) == _record(expected)
    assert engine.counts.num_pages_used == 0


def test_new_weights_in_the_middle_of_a_turn_continue_as_without_drafts(model: Model) -> None:
    other = _model(2)
    records = []
    loaded_at = 0
    for speculation in (Speculation.auto, Speculation.off):
        engine = GenerationEngine(model, num_slots=1, max_tokens=180, version=3, speculation=speculation)
        sequence = Sequence(tokens=[1, 2, 3, 4] * 4, stream=3, limit=120, sampling=_TWO_TOKENS)
        engine.add(sequence)
        while len(sequence.tokens) < (loaded_at or 60):
            engine.step()
        loaded_at = len(sequence.tokens)
        engine.load(other, version=4)
        while engine.is_busy:
            engine.step()
        records.append(_record(sequence))
        assert (engine.counts.num_right > 0) == (speculation is Speculation.auto)
    assert records[0] == records[1] and set(records[0]["versions"]) == {3, 4}


def test_cancelled_sequences_return_their_pages_in_the_middle_of_drafts(model: Model) -> None:
    stream = random.Random(5)
    engine = GenerationEngine(
        model,
        num_slots=6,
        max_tokens=180,
        cache_megabytes=8.5 * model.new_cache(1).nbytes / (1 << 20),
        speculation=Speculation.auto,
    )
    running: list[Sequence] = []
    for _ in range(150):
        if len(running) < 8:
            running += (new := _sequences(stream, number=1, is_guided=stream.random() < 0.5))
            engine.add(new[0])
        ended = engine.step()
        for sequence in [*ended, *stream.sample(running, stream.random() < 0.2)]:
            if sequence in running:
                running.remove(sequence)
                engine.cancel(sequence)
    assert engine.counts.num_preemptions and engine.counts.num_drafted and engine.counts.num_pages_used
    for sequence in running:
        engine.cancel(sequence)
    assert engine.counts.num_pages_used == 0 and not engine.is_busy


def test_forced_tokens_are_fed_in_one_step_also_without_drafts(model: Model) -> None:
    grammar = turn_grammar(
        [STOP], template=KIMI_K2, special_ids=TOKENIZER.special_ids, calls=Calls.required, thinks=False
    )
    engine = GenerationEngine(model, num_slots=1, max_tokens=64)
    sequence = Sequence(tokens=[TOKENIZER.bos_id], stream=1, limit=40, constraint=GUIDE.constraint(grammar))
    engine.add(sequence)
    engine.step()
    text = TOKENIZER.decode(sequence.tokens[1:])
    assert text.startswith("<|tool_calls_section_begin|><|tool_call_begin|>functions.stop-it:")
    forced = range(1, len(sequence.tokens) - 1)
    assert engine.counts.num_forced == len(forced) > 15
    assert all(sequence.logprobs[place] == 0.0 and sequence.is_sampled[place] for place in forced)
    one_by_one = GenerationEngine(model, num_slots=1, max_tokens=64)
    free = Sequence(tokens=sequence.tokens[:5], stream=1, limit=6, constraint=_after(grammar, sequence.tokens[1:5]))
    one_by_one.add(free)
    one_by_one.step()
    assert free.tokens[5] == sequence.tokens[5] and free.free_logprobs[5] == sequence.free_logprobs[5] < -1


def _after(grammar: str, tokens: list[int]) -> Constraint:
    constraint = GUIDE.constraint(grammar)
    for token in tokens:
        constraint.advance(token)
    return constraint


def test_many_sequences_are_decoded_without_drafts(model: Model) -> None:
    for number, is_drafted in ((4, True), (17, False)):
        engine = GenerationEngine(model, num_slots=32, max_tokens=64, speculation=Speculation.auto)
        for place in range(number):
            engine.add(
                Sequence(tokens=[1, 2, 3] * 4, stream=place, limit=40, sampling=Sampling(temperature=0.0)),
            )
        while engine.is_busy:
            engine.step()
        assert (engine.counts.num_drafted > 0) == is_drafted


def test_a_draft_is_what_followed_the_longest_and_latest_occurrence() -> None:
    assert Drafter().draft([1, 2, 3, 4, 9, 1, 2, 3], most=3) == [4, 9, 1]
    assert Drafter().draft([1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3], most=1) == [5]
    assert Drafter().draft([8, 1, 2, 3, 4, 9, 1, 2, 3, 5, 8, 1, 2, 3], most=1) == [4]
    assert Drafter().draft([1, 2, 1, 2, 1, 2], most=4) == [1, 2, 1, 2]  # also beyond the end
    assert Drafter().draft([1, 2, 3, 4, 2, 3], most=4) == []
    assert Drafter().draft([1, 1, 1], most=4) == []
    drafter = Drafter()
    assert drafter.draft([1, 2, 3, 4], most=4) == []
    assert drafter.draft([1, 2, 3, 4, 1, 2, 3], most=2) == [4, 1]  # tokens that came later


def test_wrong_drafts_end_and_right_ones_grow() -> None:
    drafter = Drafter()
    tokens = [1, 2, 3] * 10
    lengths = []
    for _ in range(5):
        lengths.append(len(drafter.draft(tokens, most=32)))
        drafter.settle(num_drafted=lengths[-1], num_right=0)
    assert lengths == [4, 2, 1, 0, 0]
    waited = 0
    while not drafter.draft(tokens, most=32):
        drafter.settle(num_drafted=0, num_right=0)
        waited += 1
    assert waited > 10
    lengths = []
    for _ in range(12):
        lengths.append(len(drafter.draft(tokens, most=32)))
        drafter.settle(num_drafted=lengths[-1], num_right=lengths[-1])
    assert lengths[0] == 1 and lengths == sorted(lengths) and lengths[-1] == 16
