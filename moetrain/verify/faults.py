"""Disturbs real runs (kills, damaged files, a full disk, hangs) and compares the results with an undisturbed run.

A chain is one run with many attempts: each attempt is killed at a chosen moment, the next one resumes, and the last one
finishes. Losses and last checkpoint of the chain must be bit-identical to those of the same command without kills.
There is one chain with a single process and one with several ranks; they run at the same time. The files and reports
that a kill leaves behind show whether it happened in the intended phase.
"""

import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from moetrain.errors import ConfigError
from moetrain.log import progress
from moetrain.runtime import python_stream
from moetrain.verify import fault_runs
from moetrain.verify.collection_faults import collection_rows
from moetrain.verify.fault_runs import CHECKPOINT_EVERY, Attempt, FaultSetup, begin
from moetrain.verify.other_faults import elastic_rows, full_disk_row, hang_rows, nonfinite_rows
from moetrain.verify.recipe_faults import recipe_rows
from moetrain.verify.table import Row

_SAVE_FSYNCS = 10  # the first ten fsync calls of an attempt belong to its first two saves
_MOST_COLLECTIVES = 60  # kills happen in the first 60 collectives of an attempt, which belong to its first steps
_LONGEST_DELAY_S = 0.05


class Phase(StrEnum):
    """Phase of training in which a kill happens."""

    step = "step"
    collective = "collective"
    save = "save"
    rename = "rename"


class Damage(StrEnum):
    """Damage to a file of the newest checkpoint after a kill."""

    none = "none"
    flipped_byte = "flipped_byte"
    missing_shard = "missing_shard"
    truncated_file = "truncated_file"


@dataclass(frozen=True, kw_only=True)
class Request:
    """Arguments of `verify_faults`; see `commands.verify.VerifyFaultsRun`."""

    model: str
    kills: int
    collection_kills: int
    recipe: str
    recipe_kills: int
    ranks: int
    with_others: bool
    overrides: tuple[str, ...]
    planted: str
    seed: int


@dataclass(kw_only=True)
class Tally:
    """Counts of a chain.

    num_killed: kills by the phase in which they happened. evidence: a short note per kill. num_damaged: damages by
    kind. num_fallen_back: damages after which the next attempt fell back to an earlier checkpoint, by kind. unexpected:
    attempts that ended in an unexpected way.
    """

    num_killed: Counter[Phase] = field(default_factory=Counter)
    evidence: list[str] = field(default_factory=list)
    num_damaged: Counter[Damage] = field(default_factory=Counter)
    num_fallen_back: Counter[Damage] = field(default_factory=Counter)
    unexpected: list[str] = field(default_factory=list)


def shares(kills: int, *, ranks: int) -> dict[Phase, int]:
    """Return the number of kills per phase. Of 30: 10 in saves, 5 around renames, 6 in collectives, 9 in steps."""
    rename = max(1, kills // 6) if kills > 1 else 0
    save = max(1, kills // 3)
    collective = kills // 5 if ranks > 1 else 0
    return {
        Phase.save: save,
        Phase.rename: rename,
        Phase.collective: collective,
        Phase.step: max(0, kills - save - rename - collective),
    }


def verify_faults(folder: Path, request: Request) -> list[Row]:
    """Run all experiments and return the result rows. The runs stay in `folder`/runs."""
    want = shares(request.kills, ranks=request.ranks)
    alone, together = _draw_phases(want, request)
    runs = folder / "runs"
    shutil.rmtree(runs, ignore_errors=True)
    setups = [_setup(runs / "one", request, ranks=1, attempts=len(alone))]
    orders = [alone]
    if request.ranks > 1:
        setups.append(_setup(runs / "several", request, ranks=request.ranks, attempts=len(together)))
        orders.append(together)
    extra: list[Callable[[], list[Row]]] = []
    if request.with_others:
        extra += [lambda: [full_disk_row(setups[0])], lambda: nonfinite_rows(setups[-1])]
        if request.ranks > 1:
            extra += [lambda: hang_rows(setups[1]), lambda: elastic_rows(setups[1])]
    total = request.kills + 2 * len(setups) + len(extra) + request.collection_kills + request.recipe_kills
    with progress(total, "verify faults") as advance, ThreadPoolExecutor(max_workers=len(setups)) as pool:
        chains = [
            pool.submit(_chain, setup, order, request=request, advance=advance)
            for setup, order in zip(setups, orders, strict=True)
        ]
        tallies = [chain.result() for chain in chains]
        found = list(_kill_rows(want, tallies))
        found += [row for setup, tally in zip(setups, tallies, strict=True) for row in _equal_rows(setup, tally)]
        for make in extra:
            found += make()
            advance("")
        for setup, kills in zip(setups, _collection_shares(request), strict=True):
            if kills:
                found += collection_rows(setup, kills=kills, seed=request.seed, advance=advance)
        if kills := request.recipe_kills:
            found += recipe_rows(
                runs / "recipe", recipe=request.recipe, kills=kills, seed=request.seed, advance=advance
            )
    return found


def _collection_shares(request: Request) -> list[int]:
    """Return the kills of RL runs by setup: all of one process, or two thirds of it and one of several ranks."""
    several = request.collection_kills // 3 if request.ranks > 1 else 0
    alone = request.collection_kills - several
    return [alone, several] if request.ranks > 1 else [alone]


def _draw_phases(want: dict[Phase, int], request: Request) -> tuple[list[Phase], list[Phase]]:
    """Return (phases of the kills in the single-process chain, in the multi-rank chain), in a seeded order."""
    stream = python_stream(request.seed, "verify.faults.order")
    together = [Phase.collective] * want[Phase.collective]
    alone = [phase for phase in (Phase.step, Phase.save, Phase.rename) for _ in range(want[phase])]
    stream.shuffle(alone)
    if request.ranks > 1:
        together += [alone.pop() for _ in range(len(alone) // 4)]
    stream.shuffle(together)
    return alone, together


def _repeats(attempts: int) -> int:
    """Return how many kills of a chain may be repeated because they happened in another phase than intended."""
    return 2 + attempts // 3


def _setup(folder: Path, request: Request, *, ranks: int, attempts: int) -> FaultSetup:
    steps = (2 * (attempts + _repeats(attempts)) + 4) * CHECKPOINT_EVERY  # an attempt completes at most two saves
    return FaultSetup(folder=folder, ranks=ranks, steps=steps, model=request.model, overrides=request.overrides)


def _chain(setup: FaultSetup, order: Sequence[Phase], *, request: Request, advance: Callable[[str], None]) -> Tally:
    """Run the undisturbed run and then the chain of kills; return the counts."""
    tally = Tally()
    whole = _finish(setup, "whole", planted="none", tally=tally)
    if tally.unexpected:
        raise ConfigError(f"the undisturbed run failed: {whole.output().splitlines()[-1]} (log: {whole.log})")
    advance("undisturbed run")
    stream = python_stream(request.seed, "verify.faults.kills", setup.ranks)
    damages = [damage for damage in Damage if damage is not Damage.none] if setup.ranks == 1 else []
    damage = Damage.none
    waiting = list(order)
    while waiting:
        phase = waiting.pop(0)
        attempt = _killed_attempt(setup, phase, planted=request.planted, stream=stream, tally=tally)
        _count_damage(attempt, damage, tally=tally)
        if not waiting and len(tally.evidence) < len(order) + _repeats(len(order)):
            # A kill meant for a step may happen during a save and counts there, so it is repeated.
            waiting += [Phase.step] * (order.count(Phase.step) > tally.num_killed[Phase.step])
        damage = Damage.none
        if damages and len(fault_runs.checkpoints(setup.stage("killed"))) > 1:
            damage = damages.pop()
            _apply_damage(fault_runs.checkpoints(setup.stage("killed"))[-1], damage, stream=stream)
            tally.num_damaged[damage] += 1
        advance(f"killed in {phase}")
    attempt = _finish(setup, "killed", planted=request.planted, tally=tally)
    _count_damage(attempt, damage, tally=tally)
    advance("last attempt")
    return tally


def _finish(setup: FaultSetup, name: str, *, planted: str, tally: Tally) -> Attempt:
    attempt = begin(setup, name, plan={"planted": planted})
    code = attempt.wait()
    if code != 0:
        tally.unexpected.append(f"{attempt.log}: exit code {code}")
    return attempt


def _killed_attempt(setup: FaultSetup, phase: Phase, *, planted: str, stream: random.Random, tally: Tally) -> Attempt:
    """Start an attempt, kill it in `phase`, and count the kill by the traces that it leaves."""
    stage = setup.stage("killed")
    rank = stream.randrange(setup.ranks)
    victim = stream.randrange(
        setup.ranks + (setup.ranks > 1)
    )  # equal to the number of ranks: the launcher and all ranks
    plan: dict[str, object] = {"planted": planted, "rank": rank}
    if phase is Phase.save:
        plan |= {"moment": "fsync", "number": stream.randint(1, _SAVE_FSYNCS if rank == 0 else 2)}
    elif phase is Phase.rename:
        plan |= {"moment": stream.choice(["before_rename", "after_rename"]), "number": stream.randint(1, 2), "rank": 0}
        rank = 0
    elif phase is Phase.collective:
        plan |= {"moment": "collective", "number": stream.randint(10, _MOST_COLLECTIVES)}
    lines, steps = fault_runs.num_lines(stage), stream.randint(1, 3)
    delay_s = stream.uniform(0.0, _LONGEST_DELAY_S)
    attempt = begin(setup, "killed", plan=plan)
    while not attempt.is_over():
        reached = attempt.gate(rank) if phase is not Phase.step else fault_runs.num_lines(stage) >= lines + steps
        if reached:
            break
        time.sleep(0.002)
    time.sleep(delay_s)
    while phase is Phase.step and fault_runs.partial_files(stage) and not attempt.is_over():
        time.sleep(0.001)  # saves run concurrently with steps
    if phase is Phase.collective:
        _await_others(attempt, rank, ranks=setup.ranks)
    gate, places = attempt.gate(rank), [attempt.place(other) for other in range(setup.ranks)]
    if attempt.is_over():
        tally.unexpected.append(
            f"{attempt.log}: ended with {attempt.process.returncode} before it was killed in {phase}"
        )
        return attempt
    if victim == setup.ranks:
        attempt.kill_all()
    else:
        attempt.kill(victim, ranks=setup.ranks)
    attempt.wait()
    actual = _phase_of_kill(stage, gate=gate, places=places)
    tally.num_killed[actual] += 1
    tally.evidence.append(f"{phase} -> {actual}: {gate or 'by the clock'}; {fault_runs.partial_files(stage)[-1:]}")
    return attempt


def _await_others(attempt: Attempt, rank: int, *, ranks: int) -> None:
    """Wait until every other rank waits in a collective for `rank`, at most two seconds."""
    deadline = time.monotonic() + 2.0
    while time.monotonic() < deadline:
        if all(attempt.place(other).startswith("in ") for other in range(ranks) if other != rank):
            return
        time.sleep(0.01)


def _phase_of_kill(stage: Path, *, gate: str, places: Sequence[str]) -> Phase:
    """Return the phase of a kill from its traces.

    gate: moment at which the rank stopped. places: the last collective of each rank. Partially written files show a
    save.
    """
    if gate.startswith(("before_rename", "after_rename")):
        return Phase.rename
    if gate.startswith("collective") and any(place.startswith("in ") for place in places):
        return Phase.collective  # a concurrent save does not matter
    if fault_runs.partial_files(stage) or gate.startswith("fsync"):
        return Phase.save
    return Phase.step


def _apply_damage(checkpoint: Path, damage: Damage, *, stream: random.Random) -> None:
    """Damage a file of a checkpoint."""
    files = sorted(checkpoint.glob("*.safetensors"))
    path = files[stream.randrange(len(files))]
    if damage is Damage.missing_shard:
        path.unlink()
        return
    content = bytearray(path.read_bytes())
    if damage is Damage.truncated_file:
        path.write_bytes(content[: stream.randrange(len(content))])
        return
    content[stream.randrange(len(content))] ^= 1 << stream.randrange(8)
    path.write_bytes(content)


def _count_damage(attempt: Attempt, damage: Damage, *, tally: Tally) -> None:
    if damage is not Damage.none and "falling back" in attempt.output():
        tally.num_fallen_back[damage] += 1


def _kill_rows(want: dict[Phase, int], tallies: Sequence[Tally]) -> list[Row]:
    num_killed = sum((tally.num_killed for tally in tallies), Counter[Phase]())
    evidence = {
        Phase.step: "killed after a delay, no partially written checkpoint present",
        Phase.collective: "a rank waited in a collective for a rank that had not entered it",
        Phase.save: "partially written files present",
        Phase.rename: "stopped just before or just after the rename",
    }
    rows = [
        Row(
            name=f"kills in a {phase} that did not land",
            value=max(0, want[phase] - num_killed[phase]),
            bound=0,
            note=f"{num_killed[phase]} landed, {want[phase]} wanted: {evidence[phase]}",
        )
        for phase in Phase
        if want[phase]
    ]
    total = sum(num_killed.values())
    rows.append(
        Row(name="kills missing", value=max(0, sum(want.values()) - total), bound=0, note=f"{total} landed in all")
    )
    for damage in Damage:
        num_damaged = sum(tally.num_damaged[damage] for tally in tallies)
        if num_damaged:
            passed = sum(tally.num_fallen_back[damage] for tally in tallies)
            note = f"in {passed} of {num_damaged} cases the next start fell back to an earlier checkpoint and logged it"
            rows.append(
                Row(name=f"{damage.replace('_', ' ')}: not detected", value=num_damaged - passed, bound=0, note=note)
            )
    return rows


def _equal_rows(setup: FaultSetup, tally: Tally) -> list[Row]:
    whole, killed = setup.stage("whole"), setup.stage("killed")
    ranks = "1 process" if setup.ranks == 1 else f"{setup.ranks} ranks"
    unexpected = Row(
        name=f"{ranks}: attempts that ended unexpectedly",
        value=len(tally.unexpected),
        bound=0,
        note="; ".join(tally.unexpected[:3]),
    )
    return [unexpected, *fault_runs.comparison_rows(ranks, whole=whole, other=killed)]
