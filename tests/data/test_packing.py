import random
from collections import Counter

import numpy as np
import pytest
import torch

from moetrain.data.config import Overlong
from moetrain.data.fit import best_fit
from moetrain.data.packing import PackedRows, TokenizedDocument, pack

BOS, PAD = 0, 1


def document(tokens: list[int], learned: list[bool] | None = None) -> TokenizedDocument:
    mask = [True] * (len(tokens) + 1) if learned is None else [False, *learned]
    return TokenizedDocument(tokens=[BOS, *tokens], loss_mask=mask, source="x")


def random_documents(seed: int, *, number: int, longest: int) -> list[TokenizedDocument]:
    stream = random.Random(seed)
    return [document([stream.randrange(2, 1000) for _ in range(stream.randrange(1, longest))]) for _ in range(number)]


def packed(documents: list[TokenizedDocument], *, seq_len: int = 16, overlong: Overlong = Overlong.split) -> PackedRows:
    return pack(documents, seq_len=seq_len, overlong=overlong, bos_id=BOS)


def test_every_document_is_in_one_row_whole_and_once() -> None:
    documents = random_documents(0, number=60, longest=15)
    batch = (rows := packed(documents)).batch(range(rows.num_rows), pad_id=PAD)
    found = Counter()
    for tokens, segments in zip(batch.tokens_BT, batch.segments_BT, strict=True):
        for segment in range(1, int(segments.max()) + 1):
            found[tuple(tokens[segments == segment].tolist())] += 1
    assert found == Counter(tuple(item.tokens) for item in documents)


def test_segments_are_contiguous_and_positions_restart_in_each() -> None:
    rows = packed(random_documents(1, number=60, longest=40))
    batch = rows.batch(range(rows.num_rows), pad_id=PAD)
    for tokens, segments, positions in zip(batch.tokens_BT, batch.segments_BT, batch.positions_BT, strict=True):
        used = segments[segments > 0]
        assert (segments[: len(used)] == used).all()
        assert (used.diff() >= 0).all() and used[0] == 1
        assert (tokens[len(used) :] == PAD).all()
        for segment in range(1, int(segments.max()) + 1):
            assert positions[segments == segment].tolist() == list(range(int((segments == segment).sum())))
    starts = batch.positions_BT == 0
    assert (batch.tokens_BT[starts & (batch.segments_BT > 0)] == BOS).all()


def test_first_tokens_and_padding_are_never_predicted() -> None:
    rows = packed(random_documents(2, number=60, longest=40))
    batch = rows.batch(range(rows.num_rows), pad_id=PAD)
    assert not batch.loss_mask_BT[batch.positions_BT == 0].any()
    assert not batch.loss_mask_BT[batch.segments_BT == 0].any()
    assert batch.loss_mask_BT[(batch.positions_BT > 0) & (batch.segments_BT > 0)].all()
    assert (batch.target_weights() == 1).all() and batch.target_weights().dtype == torch.float32


def test_split_cuts_a_long_document_into_documents_of_their_own_and_loses_nothing() -> None:
    rows = packed([document(list(range(2, 42))), document([2, 3])])
    texts = [token for tokens, _ in rows.documents() for token in tokens[1:].tolist()]
    assert sorted(texts) == sorted([*range(2, 42), 2, 3])
    assert all(tokens[0] == BOS and len(tokens) <= 16 for tokens, _ in rows.documents())
    counts = rows.counts
    assert (counts.num_documents, counts.num_pieces, counts.num_split) == (2, 4, 1)
    assert (counts.num_truncated, counts.num_dropped) == (0, 0)


def test_truncate_keeps_the_beginning_and_counts() -> None:
    rows = packed([document(list(range(2, 42))), document([2, 3])], overlong=Overlong.truncate)
    assert sorted(len(tokens) for tokens, _ in rows.documents()) == [3, 16]
    assert max((tokens for tokens, _ in rows.documents()), key=len).tolist() == [BOS, *range(2, 17)]
    assert (rows.counts.num_truncated, rows.counts.num_split, rows.counts.num_dropped) == (1, 0, 0)


def test_drop_leaves_long_documents_out_and_counts() -> None:
    rows = packed([document(list(range(2, 42))), document([2, 3])], overlong=Overlong.drop)
    assert [tokens.tolist() for tokens, _ in rows.documents()] == [[BOS, 2, 3]]
    assert (rows.counts.num_dropped, rows.counts.num_documents, rows.counts.num_rows) == (1, 2, 1)


def test_parts_with_nothing_to_learn_are_left_out_and_counted() -> None:
    rows = packed([document(list(range(2, 42)), learned=[False] * 20 + [True] * 20), document([2], learned=[False])])
    assert rows.counts.num_dropped_untrainable == 2
    assert rows.counts.num_targets == 20


def test_counts_of_tokens_are_those_of_the_rows() -> None:
    rows = packed(random_documents(3, number=50, longest=50))
    batch = rows.batch(range(rows.num_rows), pad_id=PAD)
    assert (rows.counts.num_tokens, rows.counts.num_targets) == (batch.num_tokens, batch.num_targets)
    assert rows.counts.num_rows == rows.num_rows == len(batch.tokens_BT)


def test_best_fit_chooses_the_fullest_row_that_holds_the_item() -> None:
    assert best_fit([6, 5, 4, 3, 2, 10, 1], seq_len=10) == [[0, 2], [1, 3, 4], [5], [6]]


def test_rows_are_nearly_full_when_there_are_short_documents() -> None:
    stream = np.random.default_rng(0)
    lengths = stream.integers(10, 200, size=3000).tolist()
    rows = best_fit(lengths, seq_len=256)
    assert all(sum(lengths[index] for index in row) <= 256 for row in rows)
    assert sum(lengths) / (256 * len(rows)) > 0.95


def test_a_mask_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="3 tokens and 2 mask values"):
        packed([TokenizedDocument(tokens=[0, 1, 2], loss_mask=[False, True], source="x")])
