"""Documents to tokens and loss masks. Does not import torch.

N tokens of a document.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from moetrain.chat.pieces import EOS, Piece, pieces_to_tokens, with_bos
from moetrain.data.formats import Document
from moetrain.data.tokenizer import Tokenizer


def tokenize(
    documents: Sequence[Document], tokenizer: Tokenizer, *, max_characters: int | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield tokens (int32 [N]) and loss mask (bool [N]) of each document; all documents are encoded in one call.

    A document starts with `[BOS]` or its own special token. max_characters: longer texts are encoded in parts, cut at a
    line break where there is one, because the time of some tokenizers grows with the square of the length. Raises
    DataError when the tokenizer lacks a special token of a document.
    """
    rendered = [document.rendered(tokenizer.template_or_none) for document in documents]
    texts = dict.fromkeys(piece.text for pieces in rendered for piece in pieces if not piece.is_special)
    short = [text for text in texts if max_characters is None or len(text) <= max_characters]
    encoded = dict(zip(short, tokenizer.encode_batch(short), strict=True))

    def ids_of(text: str) -> Sequence[int] | np.ndarray:
        if text in encoded:
            return encoded[text]
        parts = _parts(text, max_characters or len(text))  # one at a time: ids as a list take much memory
        return np.concatenate([np.array(tokenizer.encode(part), dtype=np.int32) for part in parts])

    for pieces in rendered:
        if (text := _plain_text(pieces)) is not None:
            ids = ids_of(text)
            tokens_N = np.empty(len(ids) + 2, dtype=np.int32)
            tokens_N[0], tokens_N[1:-1], tokens_N[-1] = tokenizer.bos_id, ids, tokenizer.eos_id
            mask_N = np.ones(len(tokens_N), dtype=np.bool_)
            mask_N[0] = False
            yield tokens_N, mask_N
            continue
        tokens, mask = pieces_to_tokens(
            with_bos(pieces), encode=lambda text: list(ids_of(text)), special_ids=tokenizer.special_ids
        )
        yield np.asarray(tokens, dtype=np.int32), np.asarray(mask, dtype=np.bool_)


def _plain_text(pieces: Sequence[Piece]) -> str | None:
    """Return the text of a document of text (`formats.text_document`), the common case; None for others."""
    match pieces:
        case (Piece(text=text, is_special=False, is_sampled=True), Piece(text=end, is_special=True, is_sampled=True)):
            return text if end == EOS else None
    return None


def _parts(text: str, max_characters: int) -> list[str]:
    parts = []
    begin = 0
    while len(text) - begin > max_characters:
        end = text.rfind("\n", begin, begin + max_characters) + 1
        end = end if end > begin else begin + max_characters
        parts.append(text[begin:end])
        begin = end
    return [*parts, text[begin:]]
