"""What the pages say is there: links, paths, commands and metric names."""

import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moetrain.cli.command_line import composed, split_command
from moetrain.compose import compose
from moetrain.log import read_metrics
from moetrain.model.config import BalanceConfig, ModelConfig
from moetrain.model.transformer import Transformer, initialize
from moetrain.rl.columns import Row, micro_batches
from moetrain.rl.config import BalanceLosses, RlConfig
from moetrain.rl.loss import SUM_PREFIX, rl_objective
from moetrain.rl.metrics import rollout_metrics
from moetrain.rl.protocol import Algorithm
from moetrain.rl.registry import build, registered
from moetrain.rollout.types import Ending, Segment, Trajectory
from moetrain.run import recipe
from moetrain.tasks.protocol import Grade
from moetrain.train.loss import GlobalCounts
from tests.cli.command import ROOT, moetrain

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
RECIPE_PAGES = [page.relative_to(ROOT).as_posix() for page in sorted((ROOT / "recipes").rglob("README.md"))]
MAX_LINE = 120
WHOLE_LINE = re.compile(r"\|.*|`[^`]+`[.,:]?")
"""A row of a table, or one command: neither can be broken."""
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([\w-]+))?\)")
SPAN = re.compile(r"`([^`\n]+)`")
STARTS = ("moetrain ", "bash launch/torchrun.sh ", "bash launch/deepspeed.sh ", "sbatch launch/slurm.sbatch ")
FOLLOWED = ("add-a-model.md", "add-data.md", "add-an-environment.md", "add-an-rl-loss.md")
"""Guides whose commands `test_guides.py` runs, on files that the guides make."""
PLACEHOLDER = re.compile(r"\.\.\.|<|\b[A-Z]{2,}\b|my_|path/to")

TRAJECTORY = Trajectory(
    task=0,
    sample=0,
    num_calls_needed=2,
    segments=[Segment(tokens=[1, 2], is_sampled=[False, True], logprobs=[0.0, -1.0], versions=[0, 0], temperature=1.0)],
    grade=Grade(reward=1.0, reason="right"),
    ending=Ending.answered,
    num_turns=3,
    num_calls=3,
    num_errors=1,
    num_transient_errors=1,
)


def commands(page: Path) -> Iterator[list[str]]:
    """Yield the words after `moetrain` of every command line on a page, without those that have placeholders."""
    text = page.read_text(encoding="utf-8")
    lines = [] if page.name in FOLLOWED else [line for _, block in BLOCK.findall(text) for line in block.splitlines()]
    for line in [*lines, *SPAN.findall(BLOCK.sub("", text))]:
        line = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", line)
        if not line.startswith(STARTS) or PLACEHOLDER.search(line) or (page.name in FOLLOWED and "recipe=" in line):
            continue
        words = shlex.split(line, comments=True)
        skipped = {"moetrain": 1, "bash": 3, "sbatch": 2}[words[0]]
        if words[skipped:]:
            yield words[skipped:]


@pytest.mark.parametrize("name", [*NAMES, *RECIPE_PAGES])
def test_lines_of_prose_have_at_most_120_characters(name: str) -> None:
    prose = BLOCK.sub("", (ROOT / name).read_text(encoding="utf-8")).splitlines()
    long = [line for line in prose if len(line) > MAX_LINE and not WHOLE_LINE.fullmatch(line)]
    assert not long, f"{name}: break these lines (only tables, blocks and commands may be longer): {long}"


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        path = page.parent / target if target else page
        assert path.exists(), f"{name}: {target}"
        titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        assert not anchor or anchor in [title.lower().replace(" ", "-") for title in titles], f"{name}: #{anchor}"


@pytest.mark.parametrize("name", NAMES)
def test_paths_in_the_repository_exist_and_have_what_is_named(name: str) -> None:
    tops = [path.name for path in (ROOT / "moetrain").iterdir() if path.is_dir()]
    for span in SPAN.findall((ROOT / name).read_text(encoding="utf-8")):
        match = re.fullmatch(r"([\w.-]+(?:/[\w.-]+)+/?)(?:::(\w+))?", span)
        if match is None:
            continue
        path, symbol = match.groups()
        top = path.split("/")[0]
        if top in ("moetrain", "tests", "docs", "launch", "recipes") or (top in tops and path.endswith(".py")):
            found = ROOT / path if (ROOT / path).exists() else ROOT / "moetrain" / path
            assert found.exists(), f"{name}: {span}"
            assert not symbol or symbol in found.read_text(encoding="utf-8"), f"{name}: {span}"


@pytest.mark.parametrize("name", NAMES)
def test_every_command_line_is_one_that_its_command_takes(name: str) -> None:
    for words in commands(ROOT / name):
        assert is_taken(*words)


@functools.cache  # the same line stands on several pages
def is_taken(*words: str) -> bool:
    if any(word in ("-h", "--help", "help") for word in words):
        return True
    command, rest = split_command(words[1:] if words[0] == "check" and len(words) > 1 else words)
    if command == "check":
        return True
    if command != "run":
        return composed(command, rest) is not None
    own, of_stages = recipe.split_overrides(rest)
    run = compose("run", own)
    return len(recipe.compose_stages(recipe.load(run.recipe), run, overrides=of_stages)) > 0


def test_every_metric_of_a_run_stands_in_the_vocabulary(tmp_path: Path) -> None:
    table = (ROOT / "docs" / "vocabulary.md").read_text(encoding="utf-8").split("## Metrics")[1]
    firsts = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    spans = [SPAN.findall(first) for first in firsts]
    full = [span if "/" in span else f"{first[0].rpartition('/')[0]}/{span}" for first in spans for span in first]
    full += [span for first in spans for span in first]
    patterns = [re.compile(re.sub(r"<\w+>", "[^ ]+", name)) for name in full]
    words = ["model=k2_nano_test", "data=test", "train.rows_per_step=2", "train.rows_per_micro_batch=2"]
    words += ["~data.sources.english", "data.sources.dialogues.num_documents=16", "run.wandb.mode=disabled"]
    sft = moetrain("sft", *words, "train.steps=1", "parallel.engine=torch", folder=tmp_path)
    assert sft.returncode == 0, sft.stderr[-2000:]
    written = {key for row in read_metrics(tmp_path / "runs/default/sft/metrics.jsonl") for key in row} - {"step"}
    written |= rollout_metrics([[TRAJECTORY]]).keys()
    for name, algorithm in registered().items():
        explained = set(SPAN.findall(algorithm.__doc__ or ""))  # an algorithm may explain its sums itself
        written |= _metrics_of_an_update(build(RlConfig(algorithm=name))) - explained
    assert {"entropy", "logprob_gap", "trained_tokens", "balance_loss"} <= written
    unknown = [name for name in written if not any(pattern.fullmatch(name) for pattern in patterns)]
    assert not unknown


def _metrics_of_an_update(algorithm: Algorithm) -> set[str]:
    """Return the names of the metrics of an RL objective on one small trajectory."""
    balance = BalanceConfig(sequence_loss=0.1, global_loss=0.2, z_loss=0.05)
    model = Transformer(ModelConfig(num_layers=2, balance=balance), compute_dtype=torch.float32)
    initialize(model, 0)
    row = Row(trajectory=TRAJECTORY, segment=TRAJECTORY.segments[0], advantages=[1.0, 1.0], trajectory_id=0)
    (batch,) = micro_batches([row], columns=algorithm.columns, max_tokens=64, pad_id=0, rank=0, world_size=1)
    counts = GlobalCounts(tokens=batch.num_tokens, targets=batch.num_targets, target_weight=1.0)
    objective = rl_objective(algorithm, divisor=1.0, counts=counts, balance=balance, balance_losses=BalanceLosses.model)
    return {name.removeprefix(SUM_PREFIX) for name in objective(model, batch).metrics}
