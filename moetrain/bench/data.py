"""`moetrain bench data`: the speed of preparing tokens, compared with `datasets.map`, and of reading them.

The corpus is synthetic: documents of lines of the standard library, in random order, as JSONL. Each contestant is a
process of its own (`bench.data_worker`) that measures its time, its processor time and its resident memory. The
tokenizers of all use one core per process.
"""

import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from moetrain.commands.bench import BenchDataRun
from moetrain.data.stdlib import stdlib_code, stdlib_english
from moetrain.data.store.index import WORK
from moetrain.data.tokenizer import train_tokenizer
from moetrain.errors import MoetrainError
from moetrain.files import sha256_of

_LINES = (20, 120)
"""Shortest and longest line, in characters, that documents are made of."""
_LINES_PER_DOCUMENT = (4.0, 1.0)
"""Mean and deviation of the logarithm of the number of lines: about 90 lines on average."""
_TOKENIZER_CHARACTERS = 4_000_000
_POLL_S = 0.01


def bench_data(run: BenchDataRun, *, folder: Path) -> dict[str, Any]:
    """Return the report of all measurements; see `BenchDataRun`."""
    # What a run that was killed left is taken again only where it is the same.
    corpus, tokenizer = folder / f"corpus-{run.megabytes}-{run.files}-{run.run.seed}", folder / "tokenizer"
    tokens = folder / f"random-{run.tokens}-{run.vocab_size}"
    size = write_corpus(corpus, num_bytes=run.megabytes * 10**6, num_files=run.files, seed=run.run.seed)
    texts = _first_texts(corpus / "00000.jsonl", _TOKENIZER_CHARACTERS)
    train_tokenizer(texts, vocab_size=run.vocab_size).save(tokenizer)

    def prepared(name: str, workers: int) -> list[str]:
        return ["prepare", str(corpus), str(tokenizer), str(folder / name), str(workers), str(run.shard_bytes)]

    for name in ("one", "two", "killed"):
        shutil.rmtree(folder / name, ignore_errors=True)
    report: dict[str, Any] = {"bytes": size, "one worker": _measured(prepared("one", 1), folder)}
    peer_files = max(1, math.ceil(run.files * run.peer_megabytes / run.megabytes))
    report["datasets.map"] = _measured(["map", str(corpus), str(tokenizer), str(peer_files)], folder)
    report["two workers"] = _measured(prepared("two", 2), folder)
    report["kills"] = _killed(prepared("killed", 2), run, folder=folder)
    report["killed and resumed"] = _measured(prepared("killed", 2), folder)
    digests = {name: _digest(folder / name) for name in ("one", "two", "killed")}
    report["equal bytes"] = {"digests": digests, "are equal": len(set(digests.values())) == 1}
    reader = ["read", str(tokens), str(tokenizer), str(run.tokens), str(run.seq_len), str(run.read_seconds)]
    report["loader"] = _measured(reader, folder)
    if not run.keep:
        for path in (corpus, tokens, *(folder / name for name in ("one", "two", "killed", "cache"))):
            shutil.rmtree(path, ignore_errors=True)
    return report


def write_corpus(folder: Path, *, num_bytes: int, num_files: int, seed: int) -> int:
    """Write JSONL files of `num_bytes` bytes together, or take those that are there; return their bytes."""
    texts = [*stdlib_english().values(), *stdlib_code().values()]
    lines = [line for text in texts for line in text.splitlines(keepends=True) if _LINES[0] < len(line) < _LINES[1]]
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(num_files):
        path = folder / f"{number:05d}.jsonl"
        if path.is_file() and path.stat().st_size >= num_bytes // num_files:
            continue
        stream = random.Random(f"{seed} {number}")
        left = num_bytes // num_files
        with path.open("w", encoding="utf-8") as file:
            while left > 0:
                count = max(1, int(stream.lognormvariate(*_LINES_PER_DOCUMENT)))
                record = json.dumps({"text": "".join(stream.choices(lines, k=count))}) + "\n"
                left -= file.write(record)
    return sum(path.stat().st_size for path in folder.glob("*.jsonl"))


def _first_texts(path: Path, num_characters: int) -> list[str]:
    texts: list[str] = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            texts.append(json.loads(line)["text"])
            num_characters -= len(texts[-1])
            if num_characters < 0:
                break
    return texts


def _start(words: list[str], folder: Path) -> subprocess.Popen[str]:
    own = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    with (folder / "workers.log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "moetrain.bench.data_worker", *words],
            env={**os.environ, **own},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,  # so that its worker processes can be killed with it
        )


def _measured(words: list[str], folder: Path) -> dict[str, Any]:
    process = _start(words, folder)
    output, _ = process.communicate()
    if process.returncode:
        raise MoetrainError(f"bench data: the measurement {words[0]} failed; {folder / 'workers.log'} has its output")
    answer: dict[str, Any] = json.loads(output.splitlines()[-1])
    return answer


def _killed(words: list[str], run: BenchDataRun, *, folder: Path) -> int:
    """Start a preparation and kill it and its workers, several times; return the number of kills that met it alive.

    A kill comes when a drawn number of shards is done.
    """
    stream = random.Random(run.run.seed)
    num_shards = len(list((folder / "two" / "web").glob("tokens-*.bin")))
    num_killed = 0
    for number in range(run.kills):
        target = int(num_shards * (number + stream.random()) / run.kills)
        process = _start(words, folder)
        while process.poll() is None and _num_done(folder / "killed" / "web") < target:
            time.sleep(_POLL_S)
        if process.poll() is None:
            num_killed += 1
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    return num_killed


def _num_done(folder: Path) -> int:
    return len(list((folder / WORK).glob("?????.json")))


def _digest(folder: Path) -> str:
    """Return the sha256 over the names and contents of all files of a prepared folder."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"):
        digest.update(f"{path.relative_to(folder).as_posix()} {sha256_of(path)}\n".encode())
    return digest.hexdigest()


def render(report: Mapping[str, Any]) -> Iterable[Table]:
    """Return the tables for the terminal."""
    table = Table("", "tokens", "seconds", "tokens/s", "tokens per core second", "resident, largest process", box=None)
    for name in ("one worker", "two workers", "datasets.map"):
        row = report[name]
        table.add_row(
            name,
            f"{row['tokens']:,}",
            f"{row['seconds']:.1f}",
            f"{row['tokens'] / row['seconds']:,.0f}",
            f"{row['tokens'] / row['cpu_seconds']:,.0f}",
            f"{row['resident_bytes'] / 1e6:,.0f} MB",
        )
    yield table
    ours, peer = report["one worker"], report["datasets.map"]
    wall = ours["tokens"] / ours["seconds"] / (peer["tokens"] / peer["seconds"])
    core = ours["tokens"] / ours["cpu_seconds"] / (peer["tokens"] / peer["cpu_seconds"])
    loader = report["loader"]
    facts = Table("", "value", box=None)
    facts.add_row("one worker / datasets.map, by time", f"{wall:.2f} x")
    facts.add_row("one worker / datasets.map, by core second", f"{core:.2f} x")
    facts.add_row("kills that met a running preparation", str(report["kills"]))
    facts.add_row("1 worker = 2 workers = killed and resumed, byte by byte", str(report["equal bytes"]["are equal"]))
    facts.add_row("tokens of the folder that is read", f"{loader['tokens']:,}")
    facts.add_row("seconds to plan its rows", f"{loader['plan_seconds']:.1f}")
    facts.add_row("seconds to the first batch, planned before", f"{loader['start_seconds']:.2f}")
    facts.add_row("tokens/s of the loader", f"{loader['tokens_per_s']:,.0f}")
    facts.add_row("resident memory that reading adds", f"{loader['added_bytes'] / 1e6:,.0f} MB")
    yield facts
