"""The sections of a small run on the text of the golden losses, in float32 on the plain engine."""

from pathlib import Path

from moetrain.chat.templates.kimi_k2 import KIMI_K2
from moetrain.data.build import prepare_tokenizer
from moetrain.data.config import DataConfig, SourceConfig, SourceKind, TokenizerConfig
from moetrain.model.config import ModelConfig
from moetrain.optim.config import OptimConfig
from moetrain.parallel.config import EngineName, ParallelConfig
from moetrain.quant.config import QuantConfig
from moetrain.train.config import ComputeDtype, DocumentTrainConfig
from moetrain.train.stages import Sections

TEXT = Path(__file__).parents[1] / "golden" / "text.jsonl"
VOCAB_SIZE = 256 + len(KIMI_K2.special_tokens) + 64


def text_sections(tokenizer: Path, *, model: ModelConfig, optim: OptimConfig, steps: int, rows: int) -> Sections:
    """Return sections whose tokenizer is trained and lies in `tokenizer`."""
    data = DataConfig(
        seq_len=64,
        sources={"text": SourceConfig(kind=SourceKind.jsonl, path=str(TEXT))},
        tokenizer=TokenizerConfig(vocab_size=VOCAB_SIZE),
        validation_fraction=0.1,
    )
    prepare_tokenizer(data, folder=tokenizer)
    return Sections(
        model=model,
        data=data,
        optim=optim,
        train=DocumentTrainConfig(
            steps=steps, rows_per_step=rows, rows_per_micro_batch=4, compute_dtype=ComputeDtype.float32
        ),
        parallel=ParallelConfig(engine=EngineName.torch),
        quant=QuantConfig(),
        seed=0,
    )
