"""A measurement of `bench data` in a process of its own: `python -m moetrain.bench.data_worker WHAT ...`.

Prints one JSON object. `prepare` and `map` tokenize the corpus; `read` writes random tokens as a prepared folder, if it
is not there, and reads rows of it in their order.
"""

import hashlib
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from moetrain.data.config import DataConfig, SourceConfig, SourceKind
from moetrain.data.prepare.config import PrepareConfig
from moetrain.data.prepare.finish import Origin, hold_out, write_folder
from moetrain.data.prepare.run import prepare
from moetrain.data.store.index import INDEX, SPLIT, Counts, TokenFile
from moetrain.data.tokenizer import Tokenizer
from moetrain.files import to_json
from moetrain.runtime import resident_bytes

_FILE_TOKENS = 1 << 27
_LENGTHS = (6.5, 1.0)
"""Mean and deviation of the logarithm of the tokens per document: about 1,100 tokens on average."""
_ROWS_PER_BATCH = 16
_SEED = 0


def main(words: list[str]) -> None:
    """Measure what the first word names, and print the figures."""
    measures: dict[str, Callable[..., dict[str, Any]]] = {"prepare": _prepare, "map": _map, "read": _read}
    print(to_json(measures[words[0]](*words[1:])))


def _prepare(corpus: str, tokenizer: str, folder: str, workers: str, shard_bytes: str) -> dict[str, Any]:
    data = DataConfig(sources={"web": SourceConfig(kind=SourceKind.jsonl, path=corpus)}, seq_len=2048)
    config = PrepareConfig(workers=int(workers), shard_bytes=int(shard_bytes))
    loaded = Tokenizer.load(Path(tokenizer))
    before, started = _cpu_seconds(), time.perf_counter()
    counts = prepare(data, config, folder=Path(folder), tokenizer=loaded)["web"].counts
    seconds, cpu_seconds = time.perf_counter() - started, _cpu_seconds() - before
    return _figures(counts.num_tokens + counts.num_tokens_held_out, seconds=seconds, cpu_seconds=cpu_seconds)


def _map(corpus: str, tokenizer: str, num_files: str) -> dict[str, Any]:
    import datasets
    import tokenizers

    inner = tokenizers.Tokenizer.from_file(str(Path(tokenizer) / "tokenizer.json"))
    files = sorted(map(str, Path(corpus).glob("*.jsonl")))[: int(num_files)]
    texts = datasets.load_dataset("json", data_files=files, split="train")
    before, started = _cpu_seconds(), time.perf_counter()
    mapped = texts.map(
        lambda batch: {"input_ids": [each.ids for each in inner.encode_batch_fast(batch["text"])]},
        batched=True,
        remove_columns=["text"],
        load_from_cache_file=False,
    )
    seconds, cpu_seconds = time.perf_counter() - started, _cpu_seconds() - before
    num_tokens = sum(len(ids) for batch in mapped.iter(1000) for ids in batch["input_ids"])
    return _figures(num_tokens, seconds=seconds, cpu_seconds=cpu_seconds)


def _read(folder: str, tokenizer: str, num_tokens: str, seq_len: str, read_seconds: str) -> dict[str, Any]:
    from moetrain.data.loader import Loader, Mix  # loads torch
    from moetrain.data.store.index import Part
    from moetrain.data.store.rows import plan_sources, prepared_sources

    loaded = Tokenizer.load(Path(tokenizer))
    if not (Path(folder) / INDEX).is_file():
        _write_random(Path(folder), tokenizer=loaded, num_tokens=int(num_tokens))
    source = SourceConfig(kind=SourceKind.prepared, path=folder)
    config = DataConfig(sources={"web": source}, seq_len=int(seq_len))
    started = time.perf_counter()
    plan_sources(config, loaded)
    plan_seconds = time.perf_counter() - started
    before = resident_bytes()
    started = time.perf_counter()
    rows = {name: each.rows(Part.training) for name, each in prepared_sources(config, loaded).items()}
    loader = Loader(rows, mixes=[Mix(first_row=0, weights={"web": 1.0})], seed=_SEED, pad_id=loaded.pad_id)
    loader.batch(0, _ROWS_PER_BATCH)
    start_seconds = time.perf_counter() - started
    step = read = 0
    started = time.perf_counter()
    while time.perf_counter() - started < float(read_seconds):
        step += 1
        read += loader.batch(step, _ROWS_PER_BATCH).num_tokens
    return {
        "tokens": int(num_tokens),
        "plan_seconds": plan_seconds,
        "start_seconds": start_seconds,
        "tokens_per_s": read / (time.perf_counter() - started),
        "added_bytes": resident_bytes() - before,
    }


def _write_random(folder: Path, *, tokenizer: Tokenizer, num_tokens: int) -> None:
    """Write a prepared folder of random tokens."""
    stream = np.random.default_rng(_SEED)
    folder.mkdir(parents=True, exist_ok=True)
    files, lengths = [], []
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    for number, begin in enumerate(range(0, num_tokens, _FILE_TOKENS)):
        size = min(_FILE_TOKENS, num_tokens - begin)
        data = stream.integers(0, tokenizer.vocab_size, size, dtype=dtype.type).tobytes()
        path = folder / f"tokens-{number:05d}.bin"
        path.write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        files.append(TokenFile(name=path.name, bytes=len(data), sha256=digest, num_tokens=size, dtype=dtype.str))
        drawn = np.maximum(2, stream.lognormal(*_LENGTHS, size // 512).astype(np.int64))
        ends = np.cumsum(drawn)
        kept = drawn[: int(np.searchsorted(ends, size - 1))]
        lengths.append(np.append(kept, size - kept.sum()))
    num_documents = sum(map(len, lengths))
    parts = np.zeros(num_documents, dtype=np.uint8)
    lone = hold_out(parts, iter([stream.random(num_documents)]), fraction=0.001)
    (folder / SPLIT).write_bytes(parts.tobytes())
    origin = Origin(
        name="random", tokenizer=tokenizer, source={"kind": "random"}, fraction=0.001, inputs={"files": 0, "bytes": 0}
    )
    counts = Counts(num_read=num_documents, num_training=num_documents, num_tokens=num_tokens)
    write_folder(folder, files=files, lengths=iter(lengths), counts=counts, origin=origin, lone=lone)


def _cpu_seconds() -> float:
    """Return the processor time of this process and its ended children."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def _figures(num_tokens: int, *, seconds: float, cpu_seconds: float) -> dict[str, Any]:
    largest = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {
        "tokens": num_tokens,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "resident_bytes": largest * 1024,
    }


if __name__ == "__main__":
    main(sys.argv[1:])
