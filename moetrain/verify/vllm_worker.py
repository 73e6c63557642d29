"""Runs one folder in vLLM on a CPU: `python vllm_worker.py REQUEST.json FOLDER`.

It runs in vLLM's environment and so imports nothing of this package. It writes the logits after each token but the last
of each row to FOLDER/logits.npy, and a greedy continuation to FOLDER/answer.json.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def main(request: dict[str, Any], folder: Path) -> None:
    """Answer a request."""
    # The environment of moetrain, which imports this module too, need not have vLLM.
    from vllm import LLM, SamplingParams, __version__

    llm = LLM(
        request["model"],
        dtype=request["dtype"],
        enforce_eager=True,
        max_model_len=request["context"],
        max_num_seqs=len(request["rows"]),
        max_logprobs=-1,
        logprobs_mode="raw_logits",
        enable_prefix_caching=False,
        disable_log_stats=True,
        seed=0,
        hf_overrides=request["hf_overrides"],
    )
    every = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1, flat_logprobs=True, detokenize=False)
    rows = [
        logits_of(output.prompt_logprobs, num_tokens=request["vocab_size"])
        for output in llm.generate([{"prompt_token_ids": ids} for ids in request["rows"]], every, use_tqdm=False)
    ]
    np.save(folder / "logits.npy", np.stack(rows))
    greedy = SamplingParams(temperature=0, max_tokens=request["new_tokens"], ignore_eos=True, detokenize=False)
    (continued,) = llm.generate([{"prompt_token_ids": request["prompt"]}], greedy, use_tqdm=False)
    answer = {"version": __version__, "greedy": list(continued.outputs[0].token_ids)}
    with (folder / "answer.json").open("w", encoding="utf-8") as file:
        json.dump(answer, file, allow_nan=False)


def logits_of(found: Any, *, num_tokens: int) -> Any:
    """Return float32 logits [T - 1, V] from vLLM's flat logprobs of a prompt of T tokens; the first token has none."""
    tokens, values = np.asarray(found.token_ids), np.asarray(found.logprobs, dtype=np.float32)
    rows = []
    for start, end in list(zip(found.start_indices, found.end_indices, strict=True))[1:]:
        row = np.full(num_tokens, np.nan, dtype=np.float32)
        row[tokens[start:end]] = values[start:end]
        rows.append(row)
    return np.stack(rows)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
