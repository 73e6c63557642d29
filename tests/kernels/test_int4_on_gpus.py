"""The Triton kernels for INT4 experts, run by Triton's interpreter, and compiled for GPUs that this machine lacks.

`launch/test.sh` installs Triton into TRITON_FOLDER.
"""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from moetrain.inference.experts import sums_from_codes
from moetrain.inference.weights import PackedInt4, packed
from moetrain.kernels.gpu import int4
from moetrain.quant.grids import Quantized
from moetrain.verify.gpu_operations import Experts, int4_rows
from moetrain.verify.table import check_rows
from tests.inference.test_experts import by_formula, error, experts, rows

if folder := os.environ.get("TRITON_FOLDER"):
    sys.path.append(str(Path(folder).absolute()))
triton = pytest.importorskip("triton", reason="Triton is not installed: run launch/test.sh, or pip install triton")

from triton import knobs  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def interpreted() -> Iterator[None]:
    """Triton chooses its interpreter when the kernels are imported, and when they are first called."""
    with knobs.runtime.scope():
        knobs.runtime.interpret = True
        importlib.import_module("moetrain.kernels.gpu.triton_int4")
        yield


def codes(weight: Quantized) -> int4.Codes:
    small = packed(weight)
    assert isinstance(small, PackedInt4)
    return int4.Codes(words=small.words_XOW, scales=small.scales_XOG)


def sums(
    drawn: tuple[torch.Tensor, ...], weights: tuple[Quantized, Quantized], *, rows_per_tile: int | None = None
) -> torch.Tensor:
    x_ND, ids_NK, weights_NK = drawn
    gate_up, down = (codes(weight) for weight in weights)
    tile = {"rows_per_tile": rows_per_tile}
    return int4.expert_sums(x_ND, ids_NK, weights_NK=weights_NK, gate_up=gate_up, down=down, **tile)


@pytest.mark.parametrize(
    ("num_tokens", "hidden", "width"), [(1, 64, 32), (19, 160, 96)], ids=["a token", "tokens, and parts of tiles"]
)
def test_the_kernels_equal_the_formula_within_bfloat16(num_tokens: int, hidden: int, width: int) -> None:
    weights = experts(5, hidden, width)
    drawn = rows(num_tokens, hidden, num_experts=5, num_chosen=2)
    expected = by_formula(drawn[0], drawn[1], weights_NK=drawn[2], gate_up=weights[0], down=weights[1])
    small = [packed(weight) for weight in weights]
    assert isinstance(small[0], PackedInt4) and isinstance(small[1], PackedInt4)
    found = sums_from_codes(drawn[0], drawn[1], weights_NK=drawn[2], gate_up=small[0], down=small[1])
    assert error(found, expected) < 1e-2


def test_a_row_has_the_same_bits_alone_in_any_company_and_tile() -> None:
    weights = experts(3, 96, 32)
    drawn = rows(40, 96, num_experts=3, num_chosen=2)  # more than a small tile holds, for each expert
    together = sums(drawn, weights, rows_per_tile=64)
    assert torch.equal(sums(drawn, weights, rows_per_tile=16), together)
    for token in (0, 39):
        assert torch.equal(sums(tuple(part[token : token + 1] for part in drawn), weights), together[token : token + 1])


def test_the_comparison_that_a_gpu_makes_holds_in_the_interpreter() -> None:
    """Among it: every code is multiplied with every mantissa as training rounds it."""
    check_rows(
        list(int4_rows(torch.device("cpu"), shape=Experts(num=3, chosen=2, hidden=64, width=32, tokens=(1, 20))))
    )


def compiled_module() -> ModuleType:
    """Return the kernels' module once more, for the compiler."""
    spec = importlib.util.find_spec("moetrain.kernels.gpu.triton_int4")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("capability", "rows_per_tile", "product"), [(80, 16, "mma.sync"), (90, 64, "wgmma.mma")])
def test_the_kernels_compile_for_gpus_and_keep_their_sums_in_registers(
    capability: int, rows_per_tile: int, product: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the widths of Kimi K2: gate and up have the most sums of a program."""
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    kernel = compiled_module().hidden_kernel
    pointers = {"x_ptr": "*bf16", "words_ptr": "*i32", "scales_ptr": "*bf16", "out_ptr": "*bf16"}
    pointers |= dict.fromkeys(("order_ptr", "experts_ptr", "firsts_ptr", "ends_ptr"), "*i64")
    sizes = {"NUM_INPUTS": 7168, "NUM_OUTPUTS": 2048, "NUM_CHOSEN": 8, "GROUP": 32}
    sizes |= {"ROWS": rows_per_tile, "OUTPUTS": int4.OUTPUTS, "INPUTS": int4.INPUTS}
    places = {name: (place,) for place, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel,
        signature={name: pointers.get(name, "constexpr") for name in kernel.arg_names},
        constexprs={places[name]: size for name, size in sizes.items()},
        attrs={places[name]: [["tt.divisibility", 16]] for name in pointers},
    )
    with knobs.cache.scope():
        knobs.cache.dir = str(tmp_path)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert product in made.asm["ptx"], "the tensor cores multiply"
    assert re.search(r"cvt\.rn\.bf16(x2)?\.f32", made.asm["ptx"]), "weights are rounded to nearest even"
    (tmp_path / "kernel.cubin").write_bytes(made.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([tool, "-res-usage", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True)
    assert "STACK:0" in usage.stdout and "LOCAL:0" in usage.stdout, usage.stdout
