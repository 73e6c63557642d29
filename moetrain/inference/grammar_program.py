"""The program of `grammar_check`: compiles what it reads, a JSON object a line, and answers with its problem, or "".

It compiles in its own process, because nothing bounds the time and the memory that llguidance takes for a grammar.
Loads no torch.
"""

import json
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moetrain.runtime import die_with_parent

_MOST_BYTES = 4 << 30  # that grammars may take, besides what the libraries and the tokenizer have
_BEGINNING = '{"'
"""What is tried of a schema: some fail only where an object or a key begins."""


def main() -> None:
    """Answer requests until the input ends.

    The first line has the tokenizer and the id of the parent process; the first answer says that this one is ready.
    """
    import llguidance

    given = json.loads(sys.stdin.readline())
    die_with_parent(given["parent"])
    tokenizer = llguidance.LLTokenizer(given["tokenizer"], n_vocab=given["vocab_size"], eos_token=given["end_id"])
    _limit_memory()
    print(json.dumps(""), flush=True)
    begin = [tokenizer.tokenize_str(character) for character in _BEGINNING]
    for line in sys.stdin:
        request = json.loads(line)
        problems = (_schema_problem(llguidance, tokenizer, schema, begin=begin) for schema in request["schemas"])
        problem = next(filter(None, problems), "")
        if not problem and request["grammar"]:
            problem = llguidance.LLMatcher(tokenizer, request["grammar"], log_level=0).get_error()
        print(json.dumps(problem), flush=True)


def _limit_memory() -> None:
    """Bound the address space of this process on Linux; other systems do not tell its size."""
    statistics = Path("/proc/self/statm")
    if statistics.is_file():
        present = int(statistics.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (present + _MOST_BYTES, present + _MOST_BYTES))


def _schema_problem(library: Any, tokenizer: Any, schema: str, *, begin: Sequence[Sequence[int]]) -> str:
    """Return why a JSON schema cannot be used, or ""."""
    matcher = library.LLMatcher(tokenizer, f"%llguidance {{}}\nstart: %json {schema}\n", log_level=0)
    for character_ids in [*begin, []]:
        if not matcher.is_error():
            matcher.compute_bitmask()
        if matcher.is_error():
            return str(matcher.get_error())
        if matcher.validate_tokens(character_ids) < max(1, len(character_ids)):
            break
        matcher.consume_tokens(character_ids)
    return ""


if __name__ == "__main__":
    main()
