"""Modes of an evaluation: the trajectories do not depend on how many ranks share the tasks."""

import torch

from moetrain.eval.runner import Mode, run_mode
from moetrain.optim.config import OptimConfig
from moetrain.parallel.config import EngineName, ParallelConfig
from moetrain.parallel.engine import build_engine
from moetrain.parallel.topology import setup
from moetrain.quant.config import QuantConfig
from moetrain.rollout.config import RolloutConfig
from moetrain.rollout.sync import sync_weights
from moetrain.tasks.config import TaskConfig
from tests.distributed import run_ranks
from tests.even_task import MODEL, EvenFamily, even_tokenizer

_QUANT = QuantConfig(enabled=True)


def _trajectories(num_tasks: int) -> list[tuple[int, list[int]]]:
    """Return (task, tokens) of each trajectory that this rank is given back."""
    parallel = ParallelConfig(engine=EngineName.deepspeed)
    engine = build_engine(
        MODEL, parallel, optim_config=OptimConfig(), quant_config=_QUANT, compute_dtype=torch.float32, seed=0
    )
    trajectories = run_mode(
        Mode(name="sampled", temperature=1.0, tasks=[(7 + place, None) for place in range(num_tasks)]),
        weights=sync_weights(engine, config=MODEL, quant=_QUANT, dtype=torch.float32),
        family_of=lambda config: EvenFamily(),
        task_config=TaskConfig(),
        tokenizer=even_tokenizer(),
        rollout=RolloutConfig(num_slots=4, max_tokens=80, max_turn_tokens=60, max_turns=2),
        seed=3,
        topology=setup(parallel),
    )
    return [(trajectory.task, trajectory.tokens) for trajectory in trajectories]


def test_ranks_that_share_the_tasks_give_the_trajectories_of_one_process() -> None:
    """Five tasks: one rank has one more than the other. One task: the other has none."""
    for num_tasks in (5, 1):
        (alone,) = run_ranks(_trajectories, 1, num_tasks=num_tasks)
        first, second = run_ranks(_trajectories, 2, num_tasks=num_tasks)
        assert [task for task, _ in alone] == list(range(7, 7 + num_tasks))
        assert first == second == alone
