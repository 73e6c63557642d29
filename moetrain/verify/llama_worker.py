"""Runs one GGUF file in llama.cpp: `python llama_worker.py REQUEST.json FOLDER`.

It runs in the environment of llama-cpp-python and so imports nothing of this package. It writes the logits of each row
of tokens to FOLDER/logits.npy, and the tokens of each text and of a greedy continuation to FOLDER/answer.json.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def main(request: dict[str, Any], folder: Path) -> None:
    """Answer a request."""
    # The environment of moetrain, which imports this module too, need not have llama-cpp-python.
    from llama_cpp import GGML_TYPE_F32, Llama, __version__

    llama = Llama(
        model_path=request["model"],
        n_ctx=request["context"],
        n_threads=request["threads"],
        n_threads_batch=request["threads"],
        n_gpu_layers=0,
        logits_all=True,
        type_k=GGML_TYPE_F32,
        type_v=GGML_TYPE_F32,
        # -1: the values that llama.cpp itself takes; the package would replace them by its own.
        yarn_beta_fast=-1.0,
        yarn_beta_slow=-1.0,
        yarn_attn_factor=-1.0,
        verbose=False,
    )
    rows = []
    for ids in request["rows"]:
        llama.reset()
        llama.eval(ids)
        rows.append(llama.scores[: len(ids)].copy())
    np.save(folder / "logits.npy", np.stack(rows).astype(np.float32))
    llama.reset()
    llama.eval(request["prompt"])
    greedy: list[int] = []
    for _ in range(request["new_tokens"]):
        greedy.append(int(np.argmax(llama.scores[llama.n_tokens - 1])))
        llama.eval(greedy[-1:])
    texts = [llama.tokenize(text.encode(), add_bos=False, special=False) for text in request["texts"]]
    answer = {"version": __version__, "texts": texts, "greedy": greedy}
    with (folder / "answer.json").open("w", encoding="utf-8") as file:
        json.dump(answer, file, allow_nan=False)
    llama.close()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
