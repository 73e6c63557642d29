"""A token bigram model with Witten-Bell interpolation: the baseline for a trained model's validation loss.

It is fitted on the same training documents as the model, and evaluated on the same tokens. Witten and Bell, "The
zero-frequency problem", IEEE Trans. Inf. Theory 37 (1991), method C, interpolated as in Chen and Goodman (arXiv
cmp-lg/9606011, section 2.4). The history of a token is the previous token of the same document.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from moetrain.data.batch import TokenBatch
from moetrain.data.packing import PackedRows, ValidationRows


@dataclass(kw_only=True)
class Bigram:
    """Sparse counts of token pairs.

    pairs: int64, sorted codes `history * vocab_size + token`. pair_counts: int64, their counts. history_V: int64,
    occurrences of each history. types_V: int64, distinct tokens that follow each history. unigram_V: float64,
    interpolated unigram probabilities.
    """

    vocab_size: int
    pairs: np.ndarray
    pair_counts: np.ndarray
    history_V: np.ndarray
    types_V: np.ndarray
    unigram_V: np.ndarray

    def nats(self, histories_N: np.ndarray, tokens_N: np.ndarray) -> np.ndarray:
        """Return -log p(token | history) of each pair, float64 [N].

        p(w|h) = (c(h,w) + T(h) p(w)) / (c(h) + T(h)); for an unseen history it is p(w).
        """
        codes = histories_N.astype(np.int64) * self.vocab_size + tokens_N
        places = np.searchsorted(self.pairs, codes)
        places[places == len(self.pairs)] = 0
        counts_N = np.where(self.pairs[places] == codes, self.pair_counts[places], 0)
        totals_N, types_N = self.history_V[histories_N], self.types_V[histories_N]
        seen_N = totals_N > 0
        unigram_N = self.unigram_V[tokens_N]
        bigram_N = (counts_N + types_N * unigram_N) / np.where(seen_N, totals_N + types_N, 1)
        return np.asarray(-np.log(np.where(seen_N, bigram_N, unigram_N)))


def fit_bigram(documents: Iterable[tuple[np.ndarray, np.ndarray]], *, vocab_size: int) -> Bigram:
    """Return the bigram model of documents given as (tokens, loss mask).

    A pair counts when its second token is predicted. The unigram is interpolated with the uniform distribution, so that
    no token has probability zero.
    """
    codes = [_codes(tokens, loss_mask, vocab_size) for tokens, loss_mask in documents]
    pairs, pair_counts = np.unique(np.concatenate(codes), return_counts=True)
    histories, tokens = np.divmod(pairs, vocab_size)
    unigram_counts_V = np.bincount(tokens, weights=pair_counts, minlength=vocab_size)
    num_tokens, num_types = unigram_counts_V.sum(), np.count_nonzero(unigram_counts_V)
    return Bigram(
        vocab_size=vocab_size,
        pairs=pairs,
        pair_counts=pair_counts,
        history_V=np.bincount(histories, weights=pair_counts, minlength=vocab_size).astype(np.int64),
        types_V=np.bincount(histories, minlength=vocab_size),
        unigram_V=(unigram_counts_V + num_types / vocab_size) / (num_tokens + num_types),
    )


def bigram_baseline(
    training: Mapping[str, PackedRows], validation: Mapping[str, ValidationRows], *, vocab_size: int
) -> dict[str, float]:
    """Return nats per character by validation source, of a bigram model fitted on the source's training documents.

    One bigram model per source is a stronger baseline than one for all sources: it is given the source, which the
    trained model must infer. Sources that are validated but not trained on are left out.
    """
    nats = {}
    for name, held_out in validation.items():
        if name in training:
            bigram = fit_bigram(training[name].documents(), vocab_size=vocab_size)
            nats[name] = batch_nats(bigram, held_out.batch) / held_out.num_characters
    return nats


def batch_nats(bigram: Bigram, batch: TokenBatch) -> float:
    """Return the total nats of the predicted tokens of `batch`."""
    targets_BT = batch.loss_mask_BT[:, 1:].numpy()
    tokens_BT = batch.tokens_BT.numpy()
    return float(bigram.nats(tokens_BT[:, :-1][targets_BT], tokens_BT[:, 1:][targets_BT]).sum())


def _codes(tokens: np.ndarray, loss_mask: np.ndarray, vocab_size: int) -> np.ndarray:
    """Return the codes of the predicted pairs; the first token of a document has no history and is never predicted."""
    wide = tokens.astype(np.int64)
    codes: np.ndarray = (wide[:-1] * vocab_size + wide[1:])[loss_mask[1:]]
    return codes
