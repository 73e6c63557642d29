"""Worker of `bench decode` and `bench rollout`: `python -m moetrain.bench.generation_worker ENGINE WEIGHTS SETTINGS`.

It also runs in the environments of llama.cpp and vLLM. SETTINGS are those of `EngineSettings`, as JSON. Its commands
are JSON objects with the name of a method of `Engine` in `do`. It answers with the seconds that the method took.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moetrain.bench.engines.protocol import Engine, EngineSettings, Episode, read_episodes
from moetrain.bench.process import commands


def build(name: str, weights: Path, *, settings: EngineSettings) -> Engine:
    """Return an engine with its weights loaded. Its imports take seconds, and only its environment has its packages."""
    if name == "moetrain":
        from moetrain.bench.engines.ours import Ours

        return Ours(weights, settings)
    if name == "transformers":
        from moetrain.bench.engines.hf import Transformers

        return Transformers(weights, settings)
    if name == "llama":
        from moetrain.bench.engines.llama import LlamaCpp

        return LlamaCpp(weights, settings)
    from moetrain.bench.engines.vllm import Vllm

    return Vllm(weights, settings)


def call_of(engine: Engine, command: dict[str, Any]) -> Callable[[], None]:
    """Return the call that a command asks for, with its input read."""
    do = command["do"]
    if do == "decode":
        return lambda: engine.decode(command["steps"])
    if do == "end":
        return engine.end
    if do in ("choose", "begin"):
        act = engine.choose if do == "choose" else engine.begin
        return lambda: act(command["prompts"], limit=command["limit"])
    episodes = read_episodes(Path(command["episodes"]))
    if do == "choose_for_replay":
        return lambda: engine.choose_for_replay(episodes)
    return lambda: _replay(engine, episodes)


def _replay(engine: Engine, episodes: list[Episode]) -> None:
    wanted = sum(turn.num_new for episode in episodes for turn in episode)
    made = engine.replay(episodes)
    if made != wanted:
        raise RuntimeError(f"it generated {made} tokens instead of {wanted}")


def main() -> None:
    """Answer the commands on standard input until it ends."""
    name, weights, settings = sys.argv[1:]
    engine: Engine | None = None
    for line, answers in commands():
        engine = engine or build(name, Path(weights), settings=EngineSettings(**json.loads(settings)))
        call = call_of(engine, json.loads(line))
        start = time.perf_counter()
        call()
        answer = {"seconds": time.perf_counter() - start, "setting": engine.setting}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
