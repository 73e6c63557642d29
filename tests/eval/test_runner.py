"""Modes of an evaluation: the trajectories do not depend on how many ranks share the tasks."""

from functools import partial

import torch

from moetrain.eval.runner import Mode, Played, run_mode
from moetrain.eval.summary import summarize
from moetrain.inference.protocol import Generation, Model
from moetrain.optim.config import OptimConfig
from moetrain.parallel.config import EngineName, ParallelConfig
from moetrain.parallel.engine import build_engine
from moetrain.parallel.topology import setup
from moetrain.quant.config import QuantConfig
from moetrain.rollout.config import RolloutConfig
from moetrain.rollout.engine import make_generation
from moetrain.rollout.sync import sync_weights
from moetrain.tasks.config import TaskConfig
from moetrain.tasks.protocol import Split, TaskFamily
from tests.distributed import run_ranks
from tests.even_task import MODEL, EvenFamily, EvenTask, even_tokenizer
from tests.threads import num_threads

_QUANT = QuantConfig(enabled=True)


NUM_TASKS = (5, 1)
"""With two ranks, one has a task more than the other; then the other has none."""


def _generation(model: Model, rollout: RolloutConfig, number: int) -> Generation:
    return make_generation(model, rollout, num_sequences=number)


def _played(parallel: ParallelConfig, family: TaskFamily, *modes: Mode) -> list[Played]:
    engine = build_engine(
        MODEL, parallel, optim_config=OptimConfig(), quant_config=_QUANT, compute_dtype=torch.float32, seed=0
    )
    rollout = RolloutConfig(num_slots=4, max_tokens=80, max_turn_tokens=60, max_turns=2)
    model = sync_weights(engine, config=MODEL, quant=_QUANT, dtype=torch.float32)
    return [
        run_mode(
            mode,
            make_generation=partial(_generation, model, rollout),
            family_of=lambda config: family,
            task_config=TaskConfig(),
            tokenizer=even_tokenizer(),
            rollout=rollout,
            vote_samples=1,
            seed=3,
            topology=setup(parallel),
        )
        for mode in modes
    ]


def _trajectories(name: EngineName) -> list[list[tuple[int, list[int]]]]:
    """Return (task, tokens) of each trajectory that this rank is given back, for each number of tasks."""
    modes = [
        Mode(name="sampled", temperature=1.0, tasks=[(7 + place, None) for place in range(num_tasks)])
        for num_tasks in NUM_TASKS
    ]
    return [
        [(trajectory.task, trajectory.segments[0].tokens) for trajectory in played.trajectories]
        for played in _played(ParallelConfig(engine=name), EvenFamily(), *modes)
    ]


def test_ranks_that_share_the_tasks_give_the_trajectories_of_one_process() -> None:
    with num_threads(1):
        alone = _trajectories(EngineName.torch)
    first, second = run_ranks(_trajectories, 2, name=EngineName.deepspeed)
    assert [[task for task, _ in mode] for mode in alone] == [list(range(7, 7 + number)) for number in NUM_TASKS]
    assert first == second == alone


class _UncountedTask(EvenTask):
    num_calls = None  # type: ignore[assignment]


class _LongerFamily(EvenFamily):
    trained_calls = (1, 1)

    def task_of_length(self, split: Split, index: int, *, num_calls: int) -> _UncountedTask:
        return _UncountedTask(index=index)


def test_tasks_of_a_given_length_that_state_none_are_told_apart_by_it() -> None:
    mode = Mode(name="greedy_longer", temperature=0.0, tasks=[(0, 3), (0, 5)])
    (played,) = _played(ParallelConfig(engine=EngineName.torch), _LongerFamily(), mode)
    assert summarize(played.trajectories)["outcomes"].keys() == {"0/3", "0/5"}
