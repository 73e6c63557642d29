"""Which programs compute an export as the model was trained, from its shape and its format. Does not import torch."""

from moetrain.export.config import ExportFormat
from moetrain.hf.consumers import obstacles
from moetrain.model.config import ModelConfig
from moetrain.quant.consumers import Consumer


def consumer_reasons(model: ModelConfig, format: ExportFormat) -> dict[Consumer, list[str]]:
    """Return for each consumer the reasons why it would not compute the export as trained; empty when it would.

    The reasons of a quantisation format are not among them (`quant.formats`).
    """
    reasons = {consumer: obstacles(model, consumer) for consumer in Consumer}
    is_gguf = format is ExportFormat.gguf
    for consumer in Consumer:
        if is_gguf and consumer not in (Consumer.llama_cpp, Consumer.moetrain):
            reasons[consumer].append(f"export.format={format}: it reads safetensors")
        if not is_gguf and consumer is Consumer.llama_cpp:
            reasons[consumer].append(f"export.format={format}: it reads GGUF only")
    return reasons
