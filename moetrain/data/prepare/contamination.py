"""Finds documents that contain text of evaluation sets, by n-grams of words. Does not import torch.

Words are runs of letters and digits in lower case; in Chinese and Japanese, which write no spaces, each character is a
word. Special tokens are none. A document is contaminated when it contains n consecutive words of a record of an
evaluation set (Brown et al., arXiv:2005.14165, appendix C, with 13-grams). Records of fewer than n words are not looked
for; their number is logged.
"""

import hashlib
import logging
import re
from collections.abc import Mapping

import numpy as np

from moetrain.data.config import SourceConfig
from moetrain.data.sources import read_documents
from moetrain.errors import DataError
from moetrain.ops.splitmix import GOLDEN

_log = logging.getLogger(__name__)

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")


def words_of(text: str) -> list[str]:
    """Return the words of a text, in lower case."""
    return _WORD.findall(text.lower())


class EvaluationTexts:
    """The n-grams of evaluation sets. Hashes of 64 bits stand for n-grams."""

    def __init__(self, sets: Mapping[str, SourceConfig], *, ngram: int) -> None:
        """Read the sets. Raises DataError that names the set and the file when one cannot be read or has no n-gram."""
        self.names = list(sets)
        self._ngram = ngram
        self._numbers: dict[str, int] = {}  # of each word; 0 is any word that no set contains
        hashes, owners = [], []
        for owner, (name, source) in enumerate(sets.items()):
            try:
                texts = [document.words for document in read_documents(source, name=name)]
            except DataError as error:
                raise DataError(f"prepare.decontaminate.{name}: {error}") from error
            numbers = [self._numbered(text) for text in texts]
            found = [self._hashes(each) for each in numbers if len(each) >= ngram]
            if not found:
                raise DataError(
                    f"prepare.decontaminate.{name} has no record of {ngram} words: lower prepare.ngram, or remove it"
                )
            hashes += found
            owners += [np.full(len(each), owner, dtype=np.uint64) for each in found]
            if len(found) < len(texts):
                short = len(texts) - len(found)
                _log.info("prepare.decontaminate.%s: %d records are shorter than %d words", name, short, ngram)
        empty = np.zeros(0, dtype=np.uint64)
        self._known, firsts = np.unique(np.concatenate([empty, *hashes]), return_index=True)
        self._owners = np.concatenate([empty, *owners])[firsts]

    @property
    def digest(self) -> str:
        """Return the sha256 of the n-grams and of the sets that they come from."""
        return hashlib.sha256(self._known.tobytes() + self._owners.tobytes()).hexdigest()

    def found_in(self, text: str) -> str | None:
        """Return the name of a set that shares an n-gram with `text`, or None."""
        if not self.names:
            return None
        get = self._numbers.get
        numbers = np.array([get(word, 0) for word in words_of(text)], dtype=np.uint64)
        if len(numbers) < self._ngram:
            return None
        unknown = np.concatenate(([0], np.cumsum(numbers == 0)))
        is_known = unknown[self._ngram :] == unknown[: -self._ngram]
        if not is_known.any():
            return None
        hashes = self._hashes(numbers)[is_known]
        places = np.minimum(np.searchsorted(self._known, hashes), len(self._known) - 1)
        matches = np.flatnonzero(self._known[places] == hashes)
        return self.names[int(self._owners[places[matches[0]]])] if len(matches) else None

    def _numbered(self, text: str) -> np.ndarray:
        numbers = self._numbers
        words = words_of(text)
        return np.array([numbers.setdefault(word, len(numbers) + 1) for word in words], dtype=np.uint64)

    def _hashes(self, numbers: np.ndarray) -> np.ndarray:
        """Return a hash of each n-gram of word numbers, uint64 [words - n + 1]."""
        length = len(numbers) - self._ngram + 1
        total = np.zeros(length, dtype=np.uint64)
        for offset in range(self._ngram):
            total = (total ^ numbers[offset : offset + length]) * GOLDEN
            total ^= total >> np.uint64(29)
        return total
