"""MinHash keys, by which near-duplicate documents are found. Does not import torch.

Two documents are near duplicates when one of 14 bands of 8 MinHash values over word 5-grams is the same (Broder, 1997;
the bands and their number as in datatrove's default: a pair whose sets of 5-grams overlap by 0.8 is found with
probability 0.92, one at 0.5 with 0.05). The MinHash values come from the library `rensa`.
"""

import hashlib

from moetrain.data.prepare.contamination import words_of
from moetrain.errors import DataError

NUM_BANDS = 14
_HASHES_PER_BAND = 8
_WORDS = 5
_SEED = 0
"""Fixed, so that the same text has the same keys in every run."""


class Bands:
    """Computes the keys of documents."""

    def __init__(self) -> None:
        """Raises DataError when the library is not installed."""
        try:
            from rensa import RMinHash
        except ImportError as error:
            raise DataError(
                "prepare.near_duplicates requires the library rensa: pip install 'moetrain[dedup]', or set it to false"
            ) from error
        self._new = RMinHash

    def keys(self, text: str) -> list[int]:
        """Return the key of each band, 64 bits. Texts of fewer than 5 words are near duplicates if they are equal."""
        words = words_of(text)
        shingles = [" ".join(words[index : index + _WORDS]) for index in range(len(words) - _WORDS + 1)] or [text]
        minhash = self._new(num_perm=NUM_BANDS * _HASHES_PER_BAND, seed=_SEED)
        minhash.update(shingles)
        values = minhash.digest()
        bands = range(0, len(values), _HASHES_PER_BAND)
        return [_key(values[begin : begin + _HASHES_PER_BAND]) for begin in bands]


def _key(values: list[int]) -> int:
    data = b"".join(value.to_bytes(8, "little") for value in values)
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
