"""The Triton kernels of `int4`, which says what they compute. Importable only where Triton is installed.

A tile is `ROWS` sorted rows of one expert; a program computes `OUTPUTS` outputs of it, `INPUTS` inputs at a time. Sizes
of the model are constants of the compiled kernel. Matrices are contiguous.
"""

import triton
import triton.language as tl
from triton import knobs

_INTERPRETED = tl.constexpr(knobs.runtime.interpret)
"""Triton's interpreter truncates where a GPU rounds to bfloat16, and its `tl.dot` reads bfloat16 as integers."""


@triton.jit
def _narrow(x):
    """Return float32 numbers as bfloat16, rounded to nearest even."""
    if _INTERPRETED:
        bits = x.to(tl.uint32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(tl.bfloat16)


@triton.jit
def _operand(x):
    """Return bfloat16 numbers as `tl.dot` takes them."""
    if _INTERPRETED:
        return x.to(tl.float32)
    return x


@triton.jit
def _weights(
    words_ptr,
    scales_ptr,
    outputs,
    is_output,
    start,
    NUM_INPUTS: tl.constexpr,
    GROUP: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """Return the weights of some outputs for the inputs from `start` on; zeros outside of the matrix."""
    at = start // 8 + tl.arange(0, INPUTS // 8)
    is_inside = is_output[:, None] & (at < NUM_INPUTS // 8)[None, :]
    words = tl.load(words_ptr + outputs[:, None] * (NUM_INPUTS // 8) + at[None, :], mask=is_inside, other=0)
    groups = (at // (GROUP // 8))[None, :]
    scales = tl.load(scales_ptr + outputs[:, None] * (NUM_INPUTS // GROUP) + groups, mask=is_inside, other=0.0)
    scales = scales.to(tl.float32)[:, :, None]
    codes = (words[:, :, None] >> (4 * tl.arange(0, 8))[None, None, :]) & 0xF
    # 128 + (code + 8) as the bits of a float: integers convert slowly. No step before `_narrow` rounds.
    biased = ((codes << 16) | 0x43000000).to(tl.float32, bitcast=True)
    weights = _narrow(biased * scales - 136.0 * scales)
    return _operand(tl.reshape(weights, [words.shape[0], INPUTS]))


@triton.jit
def _rows(x_ptr, rows, is_row, start, NUM_INPUTS: tl.constexpr, INPUTS: tl.constexpr):
    """Return the inputs from `start` on of some rows, [INPUTS, rows]."""
    at = start + tl.arange(0, INPUTS)
    is_inside = (at < NUM_INPUTS)[:, None] & is_row[None, :]
    x = tl.load(x_ptr + rows.to(tl.int64)[None, :] * NUM_INPUTS + at[:, None], mask=is_inside, other=0.0)
    return _operand(x)


@triton.jit
def hidden_kernel(
    x_ptr,
    words_ptr,
    scales_ptr,
    order_ptr,
    experts_ptr,
    firsts_ptr,
    ends_ptr,
    out_ptr,
    NUM_INPUTS: tl.constexpr,
    NUM_OUTPUTS: tl.constexpr,
    NUM_CHOSEN: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """Write silu(gate x) * up x [S, F] of a tile of rows, rounded to bfloat16 where training rounds."""
    tile = tl.program_id(0)
    first, end = tl.load(firsts_ptr + tile), tl.load(ends_ptr + tile)
    if first >= end:
        return
    places = first + tl.arange(0, ROWS)
    is_row = places < end
    rows = tl.load(order_ptr + places, mask=is_row, other=0) // NUM_CHOSEN
    outputs = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_output = outputs < NUM_OUTPUTS
    of_expert = tl.load(experts_ptr + tile).to(tl.int64) * NUM_OUTPUTS * 2
    words_ptr += of_expert * (NUM_INPUTS // 8)
    scales_ptr += of_expert * (NUM_INPUTS // GROUP)
    gate = tl.full([OUTPUTS, ROWS], 0.0, tl.float32)
    up = tl.full([OUTPUTS, ROWS], 0.0, tl.float32)
    for start in range(0, NUM_INPUTS, INPUTS):
        x = _rows(x_ptr, rows, is_row, start, NUM_INPUTS, INPUTS)
        of_gate = _weights(words_ptr, scales_ptr, outputs, is_output, start, NUM_INPUTS, GROUP, INPUTS)
        gate = tl.dot(of_gate, x, gate)
        of_up = _weights(words_ptr, scales_ptr, outputs + NUM_OUTPUTS, is_output, start, NUM_INPUTS, GROUP, INPUTS)
        up = tl.dot(of_up, x, up)
    gate, up = _narrow(gate).to(tl.float32), _narrow(up).to(tl.float32)
    hidden = _narrow(_narrow(gate / (1.0 + tl.exp(-gate))).to(tl.float32) * up)
    at = places.to(tl.int64)[None, :] * NUM_OUTPUTS + outputs[:, None]
    tl.store(out_ptr + at, hidden, mask=is_output[:, None] & is_row[None, :])


@triton.jit
def down_kernel(
    hidden_ptr,
    words_ptr,
    scales_ptr,
    order_ptr,
    experts_ptr,
    firsts_ptr,
    ends_ptr,
    out_ptr,
    NUM_INPUTS: tl.constexpr,
    NUM_OUTPUTS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """Write the outputs [N * K, D] of a tile of rows, at the places that the rows had before they were sorted."""
    tile = tl.program_id(0)
    first, end = tl.load(firsts_ptr + tile), tl.load(ends_ptr + tile)
    if first >= end:
        return
    places = first + tl.arange(0, ROWS)
    is_row = places < end
    outputs = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_output = outputs < NUM_OUTPUTS
    of_expert = tl.load(experts_ptr + tile).to(tl.int64) * NUM_OUTPUTS
    words_ptr += of_expert * (NUM_INPUTS // 8)
    scales_ptr += of_expert * (NUM_INPUTS // GROUP)
    sums = tl.full([OUTPUTS, ROWS], 0.0, tl.float32)
    for start in range(0, NUM_INPUTS, INPUTS):
        x = _rows(hidden_ptr, places, is_row, start, NUM_INPUTS, INPUTS)
        weights = _weights(words_ptr, scales_ptr, outputs, is_output, start, NUM_INPUTS, GROUP, INPUTS)
        sums = tl.dot(weights, x, sums)
    rows = tl.load(order_ptr + places, mask=is_row, other=0)
    at = rows.to(tl.int64)[None, :] * NUM_OUTPUTS + outputs[:, None]
    tl.store(out_ptr + at, _narrow(sums), mask=is_output[:, None] & is_row[None, :])


@triton.jit
def combine_kernel(
    y_ptr, weights_ptr, out_ptr, NUM_COLUMNS: tl.constexpr, NUM_CHOSEN: tl.constexpr, COLUMNS: tl.constexpr
):
    """Write the weighted sum [N, D] of the outputs [N * K, D] of a token's experts, in the order of their choice."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = columns < NUM_COLUMNS
    sums = tl.full([COLUMNS], 0.0, tl.float32)
    for place in range(NUM_CHOSEN):
        row = token * NUM_CHOSEN + place
        y = tl.load(y_ptr + row * NUM_COLUMNS + columns, mask=is_column, other=0.0).to(tl.float32)
        sums += y * tl.load(weights_ptr + row)
    tl.store(out_ptr + token * NUM_COLUMNS + columns, _narrow(sums), mask=is_column)
