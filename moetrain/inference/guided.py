"""Constraints of generation from grammars, by the optional library llguidance.

A constraint allows the tokens after which the text can still match the grammar, and the end token where it does.
"""

import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from moetrain.data.tokenizer import Tokenizer
from moetrain.errors import ConfigError
from moetrain.inference.sampling import Allowed

_NUM_KEPT = 64  # compiled grammars
_LONGEST_REASON = 300  # characters
_LISTING = re.compile(r" \d+ \| %llguidance .*")
"""The grammar with line numbers, in an error of llguidance."""


class Guide:
    """Makes constraints for one tokenizer. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer, *, end_id: int) -> None:
        """Prepare the tokenizer. end_id: the token that ends a sequence. Raises ConfigError without llguidance."""
        try:
            import llguidance
        except ImportError as error:
            raise ConfigError(
                "constrained tool calls require llguidance, which is not installed: "
                "install it with pip install 'moetrain[serve]'"
            ) from error
        self._library = llguidance
        self._end_id = end_id
        self._vocab_size = tokenizer.vocab_size
        self._tokenizer = llguidance.LLTokenizer(tokenizer.to_json(), n_vocab=tokenizer.vocab_size, eos_token=end_id)
        self._compiled = functools.lru_cache(maxsize=_NUM_KEPT)(self._compile)

    def constraint(self, grammar: str) -> "GuidedConstraint":
        """Return a constraint at its beginning. Raises ConfigError with the reason when the grammar cannot be used."""
        return GuidedConstraint(self._compiled(grammar).deep_copy(), vocab_size=self._vocab_size, end_id=self._end_id)

    def _compile(self, grammar: str) -> Any:
        matcher = self._library.LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise ConfigError(reason(matcher.get_error()))
        return matcher


class GuidedConstraint:
    """Implements `inference.sampling.Constraint`.

    problem: why the matcher gave up, after which only the end token may follow; "" while it has not.
    """

    def __init__(self, matcher: Any, *, vocab_size: int, end_id: int) -> None:
        """Take over `matcher`."""
        self.problem = ""
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._end_id = end_id

    def allowed(self) -> Allowed:
        """Return which tokens may follow; only the end token once the matcher has given up."""
        allowed_V = self._mask(self._matcher)
        if allowed_V is not None:
            return allowed_V
        self.problem = reason(self._matcher.get_error() or "no token may follow")
        only_end_V: Allowed = np.arange(self._vocab_size) == self._end_id
        return only_end_V

    def expected(self) -> list[int]:
        """Return the tokens of the text that must follow."""
        return [] if self._matcher.is_error() else list(self._matcher.compute_ff_tokens())

    def allowed_after(self, tokens: Sequence[int]) -> Iterator[Allowed]:
        """Yield which tokens may follow after the first of `tokens`, after the first two, and so on."""
        ahead = self._matcher.deep_copy()
        for token in tokens:
            if ahead.is_error() or not ahead.consume_token(token):
                return
            allowed_V = self._mask(ahead)
            if allowed_V is None:
                return
            yield allowed_V

    def _mask(self, matcher: Any) -> Allowed | None:
        """Return which tokens a matcher allows; None if it has given up."""
        if matcher.is_error():
            return None
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        allowed_V: Allowed = np.unpackbits(bits, count=self._vocab_size, bitorder="little").astype(np.bool_)
        return allowed_V if not matcher.is_error() and allowed_V.any() else None

    def advance(self, token: int) -> None:
        """Take note of the token that was drawn."""
        if not self._matcher.is_error():
            self._matcher.consume_token(token)


def reason(text: str) -> str:
    """Return an error of llguidance in one line, without the place in the grammar."""
    line = " ".join(text.split())
    if "panic" in line:
        return "it is too large, or it has a part that is not supported"
    found = line.split("failed to compile JSON schema: ")[-1].split(" <state>")[0]
    return _LISTING.sub("", found)[:_LONGEST_REASON]
