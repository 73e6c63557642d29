"""Rows of a prepared folder as a source of training. A process reads only the rows that it asks for.

B rows of a batch, T tokens per row.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from moetrain.data.batch import TokenBatch
from moetrain.data.config import DataConfig
from moetrain.data.fit import PackingCounts
from moetrain.data.order import Permutation
from moetrain.data.store.index import (
    TOKENIZER,
    Index,
    Part,
    check_sizes,
    index_digest,
    prepared_folders,
    read_index,
)
from moetrain.data.store.plan import PIECES, ROWS, Plan, PlanRequest, cure, plan_of
from moetrain.data.store.tokens import TokenStore
from moetrain.data.tokenizer import Tokenizer
from moetrain.errors import DataError
from moetrain.runtime import seed_of


class PreparedRows:
    """The rows of a plan. Only maps of files are held."""

    def __init__(self, store: TokenStore, plan: Plan, *, seq_len: int, tokenizer: Tokenizer) -> None:
        self.seq_len = seq_len
        self.counts: PackingCounts = plan.counts
        self._store = store
        self._plan = plan
        self._tokenizer = tokenizer

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return self.counts.num_rows

    def order(self, name: str, *, seed: int, epoch: int) -> Callable[[int], int]:
        """Return the function from a place in pass `epoch` to the row there."""
        return Permutation(self.num_rows, key=seed_of(seed, f"data/{name}", epoch))

    def sample(self, count: int, *, seed: int) -> list[int]:
        """Return the numbers of at most `count` rows, spread over all rows, sorted."""
        if self.num_rows == 0:
            return []
        order = self.order("validation", seed=seed, epoch=0)
        return sorted(order(place) for place in range(min(count, self.num_rows)))

    def batch(self, rows: Sequence[int], *, pad_id: int) -> TokenBatch:
        """Return the rows with these numbers as a batch.

        Raises DataError that names the file when a token is not in the tokenizer's vocabulary, or a row of the plan is
        impossible.
        """
        shape = (len(rows), self.seq_len)
        tokens_BT = np.full(shape, pad_id, dtype=np.int64)
        segments_BT, positions_BT = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        loss_mask_BT = np.zeros(shape, dtype=bool)
        for index, row in enumerate(rows):
            column = 0
            for segment, (start, length) in enumerate(self._pieces(row), start=1):
                is_first, length = length > 0, abs(length)
                span = slice(column, column + length)
                # A continuation begins with [BOS], which is not in the file; no first token is learned.
                inner = span if is_first else slice(column + 1, column + length)
                tokens_BT[index, inner], loss_mask_BT[index, inner] = self._read(start, length - (not is_first))
                if not is_first:
                    tokens_BT[index, column] = self._tokenizer.bos_id
                loss_mask_BT[index, column] = False
                segments_BT[index, span] = segment
                positions_BT[index, span] = np.arange(length)
                column += length
        self._store.maps.release()
        return TokenBatch(
            tokens_BT=torch.from_numpy(tokens_BT),
            segments_BT=torch.from_numpy(segments_BT),
            positions_BT=torch.from_numpy(positions_BT),
            loss_mask_BT=torch.from_numpy(loss_mask_BT),
        )

    def _pieces(self, row: int) -> list[tuple[int, int]]:
        """Return start and length of the pieces of a row, as in the plan."""
        maps, plan = self._store.maps, self._plan
        first, last = maps.array(plan.rows, ROWS)[row : row + 2].tolist()
        pieces: list[tuple[int, int]] = []
        if 0 <= first < last <= self.counts.num_pieces:
            pieces = maps.array(plan.pieces, PIECES)[first:last].tolist()
        lengths = [abs(length) for _, length in pieces]
        ends = [start + abs(length) - (length < 0) for start, length in pieces]
        is_possible = all(lengths) and 0 < sum(lengths) <= self.seq_len
        if not (is_possible and min(pieces)[0] >= 0 and max(ends) <= self._store.num_tokens):
            raise DataError(f"row {row} of {plan.rows} or {plan.pieces} is impossible: {cure(plan.described)}")
        return pieces

    def _read(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        tokens_N, mask_N = self._store.read(start, length)
        if len(tokens_N) < length:
            raise DataError(f"{self._plan.pieces} crosses the end of a file: {cure(self._plan.described)}")
        is_known = (tokens_N >= 0) & (tokens_N < self._tokenizer.vocab_size)
        if not is_known.all():
            first = int(np.argmin(is_known))
            raise DataError(
                f"{self._store.place(start + first)} is {int(tokens_N[first])}, and the tokenizer has "
                f"{self._tokenizer.vocab_size} tokens: the file is damaged or made with another tokenizer"
            )
        return tokens_N, mask_N


class PreparedSource:
    """A prepared folder that is opened for training. Files are opened, and their sizes compared, when they are read."""

    def __init__(self, folder: Path, *, name: str, config: DataConfig, tokenizer: Tokenizer) -> None:
        """Open the folder of the source `name`. Raises DataError when a file or the tokenizer does not fit."""
        self.folder = folder
        self._seq_len = config.seq_len
        self._overlong = config.sources[name].overlong or config.overlong
        self._tokenizer = tokenizer
        self.index: Index = read_index(folder)
        _check_tokenizer(self.index, tokenizer, name=name, folder=folder)
        self.digest = index_digest(folder)
        self._store = TokenStore(folder, self.index)

    def rows(self, part: Part) -> PreparedRows:
        """Return the rows of a part; they are planned first if they were not before."""
        request = PlanRequest(seq_len=self._seq_len, overlong=self._overlong, part=part)
        plan = plan_of(self.folder, self.index, request=request)
        return PreparedRows(self._store, plan, seq_len=self._seq_len, tokenizer=self._tokenizer)


def check_prepared_with(folders: Mapping[str, Path], tokenizer: Tokenizer) -> None:
    """Raise DataError if one of the prepared folders, by source, was prepared with another tokenizer."""
    for name, folder in folders.items():
        _check_tokenizer(read_index(folder), tokenizer, name=name, folder=folder)


def _check_tokenizer(index: Index, tokenizer: Tokenizer, *, name: str, folder: Path) -> None:
    if index.tokenizer != tokenizer.digest:
        raise DataError(
            f"data.sources.{name}: {folder} was prepared with another tokenizer (sha256 {index.tokenizer[:12]}) than "
            f"that of the stage ({tokenizer.digest[:12]}): give data.tokenizer.path={folder / TOKENIZER} without "
            "another data.tokenizer.template, or prepare the data with the data.tokenizer.path and "
            "data.tokenizer.template of the stage"
        )


def prepared_sources(config: DataConfig, tokenizer: Tokenizer) -> dict[str, PreparedSource]:
    """Open the prepared sources. Raises DataError that names the first file or tokenizer that does not fit."""
    return {
        name: PreparedSource(folder, name=name, config=config, tokenizer=tokenizer)
        for name, folder in prepared_folders(config).items()
    }


def plan_sources(config: DataConfig, tokenizer: Tokenizer) -> None:
    """Compare the sizes of all files of the prepared sources, and write the packing plans that are not there yet.

    One rank does this for all. Raises DataError that names the first file that does not fit.
    """
    for source in prepared_sources(config, tokenizer).values():
        check_sizes(source.folder, source.index)
        for part in (Part.training, Part.held_out):
            source.rows(part)
