"""Collects the groups of trajectories of each step. Each rank generates those of some tasks.

With `rl.max_staleness=0` a step collects all of its groups with its own weights. With k > 0 the collection starts the
groups of the next k steps early. A step ends when enough groups are complete; unfinished trajectories continue with the
new weights, and each token records the version of the weights that sampled it. A group is used at most k steps after it
was started: at step s at most (s + 1 + k) * tasks_per_step groups have been started (AReaL, arXiv 2505.24298, equation
3), and a step waits for the groups that the next one could no longer use.
"""

import json
import logging
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from moetrain.chat.context import ContextPolicy
from moetrain.data.tokenizer import Tokenizer
from moetrain.errors import ConfigError
from moetrain.files import to_json
from moetrain.inference.protocol import Counts, Generation, Model
from moetrain.parallel.topology import Topology
from moetrain.rl.config import RlConfig
from moetrain.rl.metrics import generation_metrics, staleness_metrics
from moetrain.rollout.collect import Collector, RolloutRequest
from moetrain.rollout.config import RolloutConfig
from moetrain.rollout.engine import make_generation
from moetrain.rollout.journal import Journal, append_line, read_lines
from moetrain.rollout.making import make_task
from moetrain.rollout.types import Trajectory
from moetrain.runtime import seed_of
from moetrain.tasks.protocol import Split, TaskFamily

_log = logging.getLogger(__name__)

USED = "used.jsonl"
"""File in the folder of the collection with the tasks that each step used; only written with `rl.max_staleness`."""


@dataclass(frozen=True, kw_only=True)
class CollectionSetting:
    """What the collection of all steps shares.

    first_task: number of the run's first task. tasks_before: number of tasks that the steps before a step use.
    first_step, last_step: the first and the last step. run: a digest of what trajectories depend on. folder: where
    trajectories are kept as they finish; None keeps none.
    """

    topology: Topology
    family: TaskFamily
    tokenizer: Tokenizer
    rl: RlConfig
    rollout: RolloutConfig
    declare_tools: bool
    context: ContextPolicy
    seed: int
    first_task: int
    tasks_before: Callable[[int], int]
    first_step: int
    last_step: int
    run: str
    folder: Path | None

    def own_tasks(self, step: int) -> list[int]:
        """Return the tasks of this rank that have been begun when step `step` collects, in earlier steps or now."""
        return self._tasks_of(self.topology.rank, self._begun(step))

    def num_own(self, step: int, *, rank: int | None = None) -> int:
        """Return the number of groups that step `step` uses of a rank, by default of this one."""
        before, after = (self.first_task + self.tasks_before(number) for number in (step, step + 1))
        return len(self._tasks_of(self.topology.rank if rank is None else rank, range(before, after)))

    def check_room(self, used: set[int], *, step: int) -> None:
        """Raise ConfigError if a rank holds more groups than its steps from `step` on can use before they are too old.

        used: the tasks that earlier steps used, on another number of ranks. All ranks find the same.
        """
        for rank in range(self.topology.world_size):
            due = [self.last_use(task) for task in self._tasks_of(rank, self._begun(step)) if task not in used]
            room = 0
            for number in range(step, min(step + self.rl.max_staleness, self.last_step) + 1):
                room += self.num_own(number, rank=rank)
                if sum(last_use <= number for last_use in due) > room:
                    raise ConfigError(
                        f"with rl.max_staleness={self.rl.max_staleness}, the groups that were in progress cannot be "
                        f"divided over {self.topology.world_size} ranks: start this stage on as many ranks as before"
                    )

    def last_use(self, task: int) -> int:
        """Return the last step that may use a task's group."""
        return self.begun_at(task) + self.rl.max_staleness

    def begun_at(self, task: int) -> int:
        """Return the step at which a task is begun: `max_staleness` steps before its turn, or the first one."""
        place = (task - self._first) // self.rl.tasks_per_step
        return self.first_step + max(0, place - self.rl.max_staleness)

    @property
    def _first(self) -> int:
        return self.first_task + self.tasks_before(self.first_step)

    def _begun(self, step: int) -> range:
        end = min(step + self.rl.max_staleness, self.last_step) + 1
        return range(self._first, self.first_task + self.tasks_before(end))

    def _tasks_of(self, rank: int, tasks: range) -> list[int]:
        return [task for task in tasks if task % self.topology.world_size == rank]

    def requests(self, task_index: int) -> list[RolloutRequest]:
        """Return the requests of a task's group."""
        make, limit_s = partial(self.family.task, Split.train, task_index), self.rollout.environment_deadline_s
        task, begun_at = make_task(make, limit_s=limit_s), self.begun_at(task_index)
        return [
            RolloutRequest(
                task_index=task_index,
                task=task,
                sample=sample,
                stream=seed_of(self.seed, "rollout", begun_at, task_index, sample),
            )
            for sample in range(self.rl.group_size)
        ]

    def used_before(self, step: int) -> set[int]:
        """Return the tasks that the steps before `step` used."""
        in_order = range(self._first, self.first_task + self.tasks_before(step))
        if not self.rl.max_staleness or self.folder is None:
            return set(in_order)
        path = self.folder / USED
        rows = [_read(text) for _, text in read_lines(path)] if path.is_file() else []
        by_step = {row["step"]: row["tasks"] for row in rows if row and row["step"] < step}
        used = {task for tasks in by_step.values() for task in tasks}
        if len(used) != len(in_order):
            _log.warning("%s does not name the tasks of all steps: they count as used in order", self.folder / USED)
            return set(in_order)
        return used


def _read(text: bytes | None) -> dict[str, Any]:
    """Return the step and its tasks in the text of a line; empty for a damaged one."""
    row = json.loads(text) if text is not None else None
    return row if isinstance(row, dict) and row.keys() == {"step", "tasks"} else {}


@dataclass(kw_only=True)
class _Group:
    """The trajectories of a task that have finished. number: its position in the order of completion."""

    finished: dict[int, Trajectory] = field(default_factory=dict)
    number: int = 0

    @property
    def trajectories(self) -> list[Trajectory]:
        return [trajectory for _, trajectory in sorted(self.finished.items())]


class Collection:
    """The collection of an RL stage. Call `groups` once per step, and `close` at the end."""

    def __init__(self, setting: CollectionSetting) -> None:
        """Prepare a collection in which nothing has begun."""
        self._setting = setting
        self._stack = ExitStack()
        self._running: tuple[Generation, Collector] | None = None
        self._groups: dict[int, _Group] = defaultdict(_Group)
        self._used: set[int] | None = None
        self._begun: set[int] = set()
        self._journals: dict[int, Journal] = {}
        self._num_complete = 0
        self._choice: list[int] | None = None
        self._choice_at = (-1, 0)

    def groups(self, model: Model, *, step: int) -> tuple[list[list[Trajectory]], dict[str, float]]:
        """Return the trajectories that step `step` uses by task, and metrics; both are the same on every rank."""
        setting, topology = self._setting, self._setting.topology
        requests = self._new_requests(step)
        generation, collector = self._prepared(model, step=step, num_requests=len(requests))
        collector.submit(requests)
        started, before = time.perf_counter(), replace(generation.counts)
        collector.run(lambda: self._choose(step) is not None)
        seconds = time.perf_counter() - started
        own = [self._groups.pop(task).trajectories for task in self._choose(step) or ()]
        counts = Counts(**{name: value - vars(before)[name] for name, value in vars(generation.counts).items()})
        by_rank = topology.broadcast_object(topology.gather_objects((own, counts, seconds)))
        assert by_rank is not None
        groups = sorted((group for part, _, _ in by_rank for group in part), key=lambda group: group[0].task)
        self._mark_used([group[0].task for group in groups], step=step)
        metrics = generation_metrics([each for _, each, _ in by_rank], seconds=sum(each for _, _, each in by_rank))
        if setting.rl.max_staleness:
            metrics |= staleness_metrics(groups, step=step)
        else:
            self.close()  # frees the cache for the update
        return groups, metrics

    def close(self) -> None:
        """Close the environments of trajectories in progress, and free the cache."""
        self._stack.close()
        self._running = None

    def _prepared(self, model: Model, *, step: int, num_requests: int) -> tuple[Generation, Collector]:
        """Return the generation with the weights of this step, and the collector."""
        setting, rollout = self._setting, self._setting.rollout
        if self._running is not None:
            self._running[0].load(model, version=step)
            return self._running
        number = rollout.num_slots if setting.rl.max_staleness else num_requests
        generation = make_generation(model, rollout, num_sequences=number, version=step)
        collector = Collector(
            generation=generation,
            family=setting.family,
            tokenizer=setting.tokenizer,
            config=rollout,
            declare_tools=setting.declare_tools,
            policy=setting.context,
            on_finished=self._keep,
        )
        self._running = generation, self._stack.enter_context(collector)
        return self._running

    def _new_requests(self, step: int) -> list[RolloutRequest]:
        """Return the requests of this rank that begin at `step`, without those whose trajectories are on disk."""
        setting = self._setting
        if self._used is None:
            self._used = setting.used_before(step)
            setting.check_room(self._used, step=step)
            self._begun = set(self._used)
        tasks = [task for task in setting.own_tasks(step) if task not in self._begun]
        self._begun.update(tasks)
        waiting = []
        for request in (request for task in tasks for request in setting.requests(task)):
            found = self._journal_of(request.task_index).find(request) if setting.folder is not None else None
            if found is None:
                waiting.append(request)
            else:
                self._add(found)
        return waiting

    def _journal_of(self, task: int) -> Journal:
        """Return the file of the step at which a task was begun."""
        begun_at, folder = self._setting.begun_at(task), self._setting.folder
        assert folder is not None
        if begun_at not in self._journals:
            rank = self._setting.topology.rank
            self._journals[begun_at] = Journal(folder, step=begun_at, rank=rank, run=self._setting.run)
        return self._journals[begun_at]

    def _keep(self, request: RolloutRequest, trajectory: Trajectory) -> None:
        if self._setting.folder is not None:
            self._journal_of(request.task_index).add(request, trajectory)
        self._add(trajectory)

    def _add(self, trajectory: Trajectory) -> None:
        group = self._groups[trajectory.task]
        group.finished[trajectory.sample] = trajectory
        if len(group.finished) == self._setting.rl.group_size:
            group.number = self._num_complete
            self._num_complete += 1

    def _choose(self, step: int) -> list[int] | None:
        """Return the tasks of this rank that step `step` uses; None while there are not enough complete groups.

        Takes first the groups that would be too old at the next step, then those that completed earliest.
        """
        if self._choice_at != (step, self._num_complete):  # a group has become complete since the last call
            self._choice, self._choice_at = self._new_choice(step), (step, self._num_complete)
        return self._choice

    def _new_choice(self, step: int) -> list[int] | None:
        assert self._used is not None
        setting = self._setting
        own = [task for task in setting.own_tasks(step) if task not in self._used]
        complete = [task for task in own if len(self._groups[task].finished) == setting.rl.group_size]
        chosen = [task for task in own if setting.last_use(task) <= step]
        wanted = setting.num_own(step)
        assert len(chosen) <= wanted, "earlier steps left room for the groups that are due"
        if not set(chosen) <= set(complete):
            return None
        for task in sorted(set(complete) - set(chosen), key=lambda task: self._groups[task].number):
            if len(chosen) < wanted and self._leaves_room([*chosen, task], own=own, step=step):
                chosen.append(task)
        return chosen if len(chosen) == wanted else None

    def _leaves_room(self, chosen: list[int], *, own: list[int], step: int) -> bool:
        """Return whether the rest of this step and later steps can use all other groups before they are too old."""
        setting = self._setting
        room = setting.num_own(step) - len(chosen)
        left = [setting.last_use(task) for task in set(own) - set(chosen)]
        for later in range(step + 1, min(step + setting.rl.max_staleness, setting.last_step) + 1):
            room += setting.num_own(later)
            if sum(last_use <= later for last_use in left) > room:
                return False
        return True

    def _mark_used(self, tasks: list[int], *, step: int) -> None:
        setting = self._setting
        assert self._used is not None
        self._used.update(tasks)
        for begun_at in [place for place in self._journals if place < step - setting.rl.max_staleness]:
            del self._journals[begun_at]
        if setting.rl.max_staleness and setting.folder is not None and setting.topology.is_main:
            append_line(setting.folder / USED, to_json({"step": step, "tasks": tasks}))
