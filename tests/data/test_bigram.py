import math
import random
from collections import Counter

import numpy as np
import pytest

from moetrain.data.bigram import batch_nats, bigram_baseline, fit_bigram
from moetrain.data.config import Overlong
from moetrain.data.packing import TokenizedDocument, ValidationRows, pack

VOCAB = 7


def documents_of(seed: int, number: int) -> list[TokenizedDocument]:
    stream = random.Random(seed)
    documents = []
    for _ in range(number):
        tokens = [0, *(min(stream.randrange(1, 8), stream.randrange(1, 7)) for _ in range(stream.randrange(1, 12)))]
        mask = [False, *(stream.random() < 0.8 for _ in tokens[1:])]
        documents.append(TokenizedDocument(tokens=tokens, loss_mask=mask, source="x"))
    return documents


def slow_probability(documents: list[TokenizedDocument], history: int, token: int) -> float:
    pairs = Counter(
        (document.tokens[place - 1], document.tokens[place])
        for document in documents
        for place in range(1, len(document.tokens))
        if document.loss_mask[place]
    )
    unigrams = Counter()
    for (_, second), count in pairs.items():
        unigrams[second] += count
    uniform = 1 / VOCAB
    p = (unigrams[token] + len(unigrams) * uniform) / (sum(unigrams.values()) + len(unigrams))
    after = {second: count for (first, second), count in pairs.items() if first == history}
    if not after:
        return p
    return (after.get(token, 0) + len(after) * p) / (sum(after.values()) + len(after))


def arrays(documents: list[TokenizedDocument]) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(np.array(document.tokens), np.array(document.loss_mask)) for document in documents]


def test_the_bigram_equals_the_slow_reference() -> None:
    documents = documents_of(0, 12)
    bigram = fit_bigram(arrays(documents), vocab_size=VOCAB)
    for history in range(VOCAB):
        for token in range(VOCAB):
            nats = bigram.nats(np.array([history]), np.array([token]))[0]
            assert nats == pytest.approx(-math.log(slow_probability(documents, history, token)), rel=1e-12)


def test_probabilities_after_any_history_sum_to_one() -> None:
    bigram = fit_bigram(arrays(documents_of(1, 3)), vocab_size=VOCAB)
    for history in range(VOCAB):
        nats = bigram.nats(np.full(VOCAB, history), np.arange(VOCAB))
        assert np.exp(-nats).sum() == pytest.approx(1.0, abs=1e-12)


def test_nats_a_character_are_those_of_the_predicted_tokens_alone() -> None:
    training, held_out = documents_of(2, 30), documents_of(3, 9)
    rows = pack(training, seq_len=16, overlong=Overlong.split, bos_id=0)
    packed = pack(held_out, seq_len=16, overlong=Overlong.split, bos_id=0)
    batch = packed.batch(range(packed.num_rows), pad_id=0)
    expected = sum(
        -math.log(slow_probability(training, document.tokens[place - 1], document.tokens[place]))
        for document in held_out
        for place in range(1, len(document.tokens))
        if document.loss_mask[place]
    )
    bigram = fit_bigram(rows.documents(), vocab_size=VOCAB)
    assert batch_nats(bigram, batch) == pytest.approx(expected, rel=1e-12)
    validation = ValidationRows(batch=batch, num_characters=50)
    baseline = bigram_baseline({"x": rows}, {"x": validation, "unread": validation}, vocab_size=VOCAB)
    assert baseline == {"x": pytest.approx(expected / 50, rel=1e-12)}
