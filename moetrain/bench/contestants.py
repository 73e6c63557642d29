"""The contestants of `bench decode` and `bench rollout`: which are installed, how each is started, and its process.

Each contestant is one process (`bench.generation_worker`) that reads the same weights in its own format. llama.cpp and
vLLM run in environments of their own, which see of moetrain only its folder.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.text import Text

from moetrain.bench.engines.protocol import EngineSettings
from moetrain.bench.process import Process
from moetrain.bench.spread import spread
from moetrain.commands.bench_generation import GenerationPeer
from moetrain.errors import MoetrainError
from moetrain.export.config import ExportFormat
from moetrain.export.write import export_reasons
from moetrain.hf.shape import vllm_overrides
from moetrain.interpreters import ForeignProgram, find_interpreter, vllm_variables
from moetrain.model.config import ModelConfig
from moetrain.quant.config import QuantConfig
from moetrain.quant.consumers import Consumer

PACKAGE = Path(__file__).resolve().parents[1]
_BYTES_BF16 = 2
_CACHE_MARGIN = 1.25
"""vLLM's cache over what the sequences need, since its blocks are not all full."""
_SPIN_S = 0.05
"""Time in which the threads of a contestant stop spinning after its turn."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One contestant, and how its process is started."""

    name: str
    engine: str
    """Its name in `generation_worker`."""
    consumer: Consumer = Consumer.moetrain
    format: ExportFormat = ExportFormat.bf16_dequantized
    """Format of the weights that it reads."""
    mode: str = ""
    """See `EngineSettings`, as `overrides`."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    python: str = sys.executable
    env: Mapping[str, str] = field(default_factory=dict)
    """Additional environment variables."""
    absent: str = ""
    """Why it cannot take part, "" if it can."""


OURS = "moetrain int4"
OURS_BF16 = "moetrain bf16"


def entries(
    peers: Sequence[GenerationPeer],
    *,
    model: ModelConfig,
    quant: QuantConfig,
    settings: EngineSettings,
    num_cached: int,
    llama_python: str | None,
    vllm_python: str | None,
) -> list[Entry]:
    """Return the contestants, moetrain with INT4 experts first.

    num_cached: most tokens of all sequences together. llama_python, vllm_python: see `GenerationBenchRun`. Raises
    ConfigError for an interpreter that does not have the program.
    """
    found = [
        Entry(name=OURS, engine="moetrain", format=ExportFormat.quantized),
        Entry(name=OURS_BF16, engine="moetrain"),
    ]
    for peer in dict.fromkeys(peers):
        match peer:
            case GenerationPeer.transformers:
                found.append(Entry(name="transformers bf16", engine="transformers", consumer=Consumer.transformers))
            case GenerationPeer.llama:
                found.append(_llama(llama_python))
            case GenerationPeer.vllm | GenerationPeer.vllm_compiled:
                mode = "torch.compile" if peer is GenerationPeer.vllm_compiled else "eager"
                found.append(
                    _vllm(mode, given=vllm_python, model=model, threads=settings.threads, num_cached=num_cached)
                )
    return [_checked(entry, model=model, quant=quant) for entry in found]


def _checked(entry: Entry, *, model: ModelConfig, quant: QuantConfig) -> Entry:
    """Return the contestant, as one that cannot take part if it would not compute the model as it was trained."""
    reasons = export_reasons(model, quant, format=entry.format)[entry.consumer]
    if entry.absent or not reasons:
        return entry
    return replace(entry, absent=f"not measured, since it would not compute this model ({'; '.join(reasons)})")


def _llama(given: str | None) -> Entry:
    entry = Entry(name="llama.cpp Q4_0", engine="llama", consumer=Consumer.llama_cpp, format=ExportFormat.gguf)
    python = find_interpreter(ForeignProgram.llama, given)
    if python is None:
        return replace(entry, absent=f"not installed: {ForeignProgram.llama.cure}")
    if find_spec("gguf") is None:
        return replace(entry, absent="not measured, since its file cannot be written: pip install 'moetrain[gguf]'")
    return replace(entry, python=python)


def _vllm(mode: str, *, given: str | None, model: ModelConfig, threads: int, num_cached: int) -> Entry:
    entry = Entry(name=f"vllm bf16, {mode}", engine="vllm", consumer=Consumer.vllm, mode=mode)
    python = find_interpreter(ForeignProgram.vllm, given)
    if python is None:
        return replace(entry, absent=f"not installed: {ForeignProgram.vllm.cure}")
    # On a CPU vLLM has no absorbed attention, so its cache holds keys and values of every head.
    per_token = 2 * model.num_layers * model.num_heads * max(model.qk_head_dim, model.v_head_dim) * _BYTES_BF16
    cache_gib = 1 + int(num_cached * per_token * _CACHE_MARGIN / (1 << 30))
    env = vllm_variables(python, threads=threads, cache_gib=cache_gib)
    return replace(entry, python=python, overrides=vllm_overrides(model), env=env)


class Contestant:
    """A running contestant. After a failure, `failure` holds the reason and `ask` returns None."""

    def __init__(self, entry: Entry, *, weights: Path, settings: EngineSettings, log: Path, package_path: Path) -> None:
        """Start its process. package_path: folder that contains this package and nothing else."""
        self.name = entry.name
        self.setting = ""
        self.failure: str | None = None
        own = asdict(replace(settings, mode=entry.mode, overrides=dict(entry.overrides)))
        words = [entry.python, "-P", "-m", "moetrain.bench.generation_worker", entry.engine, str(weights)]
        env = {"OMP_NUM_THREADS": str(settings.threads), **entry.env}
        if entry.python != sys.executable:
            env["PYTHONPATH"] = str(package_path)
        self._process = Process([*words, json.dumps(own)], env=env, log=log)

    def ask(self, **command: Any) -> float | None:
        """Run one command of `generation_worker`; return its seconds."""
        if self.failure is not None:
            return None
        try:
            self._process.send(json.dumps(command))
            answer = self._process.receive()
        except (BrokenPipeError, EOFError):
            self.failure = self._process.last_words()
            return None
        self.setting = answer["setting"]
        return float(answer["seconds"])

    def close(self) -> None:
        """End the process."""
        self._process.close()


@contextmanager
def started(
    found: Sequence[Entry], *, folder: Path, weights: Mapping[ExportFormat, Path], settings: EngineSettings
) -> Iterator[list[Contestant]]:
    """Yield the contestants that can take part, each in a process that ends with the context.

    weights: folder of the weights by format. One log file per contestant is written to `folder`.
    """
    running: list[Contestant] = []
    with TemporaryDirectory() as temporary:
        package_path = Path(temporary)
        (package_path / PACKAGE.name).symlink_to(PACKAGE, target_is_directory=True)
        try:
            for entry in found:
                if not entry.absent:
                    log = folder / f"{entry.name.replace(', ', '_').replace(' ', '_')}.log"
                    running.append(
                        Contestant(
                            entry,
                            weights=weights[entry.format],
                            settings=settings,
                            log=log,
                            package_path=package_path,
                        )
                    )
            yield running
        finally:
            for contestant in running:
                contestant.close()


def take_turns(
    contestants: Sequence[Contestant],
    command: Mapping[str, Any],
    *,
    repetitions: int,
    before_turn: Callable[[], None] = lambda: None,
    advance: Callable[[str], None],
) -> dict[str, list[float]]:
    """Give one command to all contestants, one after the other, `repetitions` times; return their seconds by name.

    The first contestant of a turn is another one each time. before_turn: called before each turn. advance: called with
    the name of each contestant that has finished.
    """
    seconds: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for turn in range(repetitions):
        before_turn()
        start = turn % len(contestants)
        for contestant in [*contestants[start:], *contestants[:start]]:
            time.sleep(_SPIN_S)
            answer = contestant.ask(**command)
            if answer is not None:
                seconds[contestant.name].append(answer)
            advance(contestant.name)
    return seconds


def notes(rows: Iterable[Mapping[str, Any]], *, absent: Mapping[str, str]) -> Iterator[Text]:
    """Yield one line per contestant that failed or could not take part, with the reason."""
    failures = {row["name"]: row["failure"] for row in rows if row["failure"] is not None}
    for name, failure in failures.items():
        yield Text(f"{name} failed: {failure}")
    for name, reason in absent.items():
        yield Text(f"{name} is {reason}")


def summary(
    contestants: Sequence[Contestant], seconds: Mapping[str, Sequence[float]], *, amount: float
) -> list[dict[str, Any]]:
    """Return one row per contestant: its times, its rate, and its time divided by that of moetrain, per turn.

    amount: what one turn makes, such as a number of tokens. Raises `MoetrainError` when the first contestant, moetrain,
    failed.
    """
    ours = contestants[0]
    if ours.failure is not None:
        raise MoetrainError(f"{ours.name} failed: {ours.failure}")
    rows = []
    for contestant in contestants:
        taken = seconds[contestant.name] if contestant.failure is None else []
        rows.append(
            {
                "name": contestant.name,
                "setting": contestant.setting,
                "failure": contestant.failure,
                "seconds": taken,
                "median_s": statistics.median(taken) if taken else None,
                "rate": spread([amount / each for each in taken]) if taken else None,
                "ours_over_it": spread([a / b for a, b in zip(taken, seconds[ours.name], strict=True)])
                if taken
                else None,
            }
        )
    return rows
