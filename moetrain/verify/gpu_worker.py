"""Worker of `verify gpu`: `python -m moetrain.verify.gpu_worker PART FILE` writes the rows of a part as JSON.

The file is written after each row, so that the rows before a failure are kept.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from moetrain.commands.verify import GpuPart
from moetrain.runtime import default_device
from moetrain.verify.gpu_models import decode_rows, training_rows
from moetrain.verify.gpu_operations import flash_rows, grouped_rows, int4_rows
from moetrain.verify.table import Row, write_rows

_PARTS: Mapping[GpuPart, Callable[[torch.device], Iterator[Row]]] = {
    GpuPart.training: training_rows,
    GpuPart.flash_attention: flash_rows,
    GpuPart.grouped_products: grouped_rows,
    GpuPart.int4_kernel: int4_rows,
    GpuPart.decode: decode_rows,
}


def main() -> None:
    """Run the part on this machine's GPU."""
    part, path = GpuPart(sys.argv[1]), Path(sys.argv[2])
    rows: list[Row] = []
    for row in _PARTS[part](default_device()):
        rows.append(row)
        write_rows(path, rows=rows, context={"part": part.value})


if __name__ == "__main__":
    main()
