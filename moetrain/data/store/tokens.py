"""Reads tokens and loss masks of prepared documents from memory-mapped files. Does not import torch.

Positions are counted over all token files of the folder. N tokens of a piece of a document.
"""

import mmap
import os
from collections import OrderedDict
from pathlib import Path

import numpy as np

from moetrain.data.store.index import RUNS, Index, TokenFile
from moetrain.errors import DataError

_MAX_MAPS = 64
"""Files that are mapped at a time. A process may have about 65,000 maps; 1,000 open files is a usual limit."""


class Maps:
    """Memory-mapped files, opened when they are first read; the least recently read are closed."""

    def __init__(self) -> None:
        self._maps: OrderedDict[Path, mmap.mmap] = OrderedDict()

    def array(self, path: Path, dtype: np.dtype, *, size: int | None = None) -> np.ndarray:
        """Return the content of a file as an array that is read on access.

        size: bytes that the file should have. Raises DataError that names the file when it cannot be read, or has
        another size.
        """
        if path not in self._maps:
            try:
                with path.open("rb") as file:
                    found = os.fstat(file.fileno()).st_size
                    if size is not None and found != size:
                        raise DataError(f"{path} has {found} bytes, and should have {size}: copy it again")
                    if found == 0:
                        return np.zeros(0, dtype=dtype)
                    self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except OSError as error:
                raise DataError(f"{path} cannot be read: {error}") from error
            if len(self._maps) > _MAX_MAPS:
                self._maps.popitem(last=False)  # unmapped once the last array on it is gone
        self._maps.move_to_end(path)
        return np.frombuffer(self._maps[path], dtype=dtype)

    def release(self) -> None:
        """Give the pages that were read back to the page cache; resident memory stays small however much is read."""
        for mapped in self._maps.values():
            mapped.madvise(mmap.MADV_DONTNEED)


class TokenStore:
    """The tokens of a prepared folder."""

    def __init__(self, folder: Path, index: Index) -> None:
        self._folder = folder
        self._files = index.files
        self._ends = np.cumsum([file.num_tokens for file in index.files], dtype=np.int64)
        self.maps = Maps()

    @property
    def num_tokens(self) -> int:
        """Number of tokens in all files."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens ([N], dtype of the file) and loss mask (bool [N]) of a piece of one document."""
        number = int(np.searchsorted(self._ends, start, side="right"))
        file = self._files[number]
        start -= self._begin(number)
        tokens = self.maps.array(self._folder / file.name, np.dtype(file.dtype), size=file.bytes)
        tokens_N = tokens[start : start + length]
        mask_N = np.ones(length, dtype=np.bool_)
        if file.mask is not None:
            mask_N[:] = False
            starts, lengths = self._runs(file)
            first = max(0, int(np.searchsorted(starts, start, side="right")) - 1)
            last = int(np.searchsorted(starts, start + length))
            for begin, size in zip(starts[first:last].tolist(), lengths[first:last].tolist(), strict=True):
                mask_N[max(0, begin - start) : max(0, begin + size - start)] = True
        return tokens_N, mask_N

    def num_learned(self, starts: np.ndarray, lengths: np.ndarray, *, is_first: np.ndarray) -> np.ndarray:
        """Return the number of learned tokens of each piece, int64.

        starts, lengths: int64, sorted by start. is_first: bool, whether the piece begins a document; the first token
        of a document is not learned.
        """
        learned: np.ndarray = lengths - is_first
        numbers = np.searchsorted(self._ends, starts, side="right")
        for number in np.unique(numbers).tolist():
            file = self._files[number]
            if file.mask is not None:
                chosen = numbers == number
                begins = starts[chosen] - self._begin(number)
                learned[chosen] = self._learned_in(file, begins + lengths[chosen]) - self._learned_in(file, begins)
        return learned

    def place(self, position: int) -> str:
        """Return the file and the token of a position, for messages."""
        number = int(np.searchsorted(self._ends, position, side="right"))
        return f"{self._folder / self._files[number].name} token {position - self._begin(number)}"

    def _begin(self, number: int) -> int:
        return int(self._ends[number - 1]) if number else 0

    def _runs(self, file: TokenFile) -> tuple[np.ndarray, np.ndarray]:
        assert file.mask is not None
        runs = self.maps.array(self._folder / file.mask.name, RUNS, size=file.mask.bytes).reshape(-1, 2)
        return runs[:, 0], runs[:, 1]

    def _learned_in(self, file: TokenFile, ends: np.ndarray) -> np.ndarray:
        """Return the number of learned tokens of a file before each of `ends`."""
        starts, lengths = self._runs(file)
        before = np.concatenate(([0], np.cumsum(lengths)))
        runs = np.searchsorted(starts, ends)  # runs that start before the end
        last = np.maximum(runs - 1, 0)
        inside = np.minimum(ends - starts[last], lengths[last]) if len(starts) else np.zeros_like(ends)
        learned: np.ndarray = np.where(runs > 0, before[last] + inside, 0)
        return learned
