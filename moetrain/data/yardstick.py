"""Prints the table of the default data for the running Python: `python -m moetrain.data.yardstick`.

The table in docs/data.md is its output: documents, characters, tokens, characters per token and bigram loss of each
source of the default mixture. Runs do not use this module.
"""

import tempfile
from pathlib import Path

from moetrain.data.bigram import bigram_baseline
from moetrain.data.build import build_data
from moetrain.data.config import DataConfig, SourceConfig, SourceKind, TokenizerConfig
from moetrain.data.sources import read_documents


def main() -> None:
    """Print the table."""
    sources = {
        "code": SourceConfig(kind=SourceKind.stdlib_code, weight=0.45),
        "english": SourceConfig(kind=SourceKind.stdlib_english, weight=0.40),
        "maths": SourceConfig(kind=SourceKind.maths, weight=0.15),
    }
    config = DataConfig(sources=sources, validation_rows=64, tokenizer=TokenizerConfig(vocab_size=1024))
    with tempfile.TemporaryDirectory() as folder:
        data = build_data(config, 0, tokenizer_folder=Path(folder))
    baseline = bigram_baseline(data.in_memory(), data.validation, vocab_size=data.tokenizer.vocab_size)
    for name, source in sources.items():
        documents = read_documents(source, name=name)
        num_characters = sum(len(document.pieces[0].text) for document in documents)
        texts = [document.pieces[0].text for document in documents]
        num_tokens = sum(map(len, data.tokenizer.encode_batch(texts)))
        ratio, nats = num_characters / num_tokens, baseline[name]
        print(f"| {name} | {len(documents):,} | {num_characters:,} | {num_tokens:,} | {ratio:.2f} | {nats:.3f} |")


if __name__ == "__main__":
    main()
