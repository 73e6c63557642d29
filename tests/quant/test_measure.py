"""Numbers for the log about quantised weights."""

import pytest
import torch

from moetrain.quant.config import GridName
from moetrain.quant.grids import Quantized, quantize
from moetrain.quant.measure import code_flip_rate, relative_rmse, scale_change_rate


def test_flip_and_change_rates_count_what_differs() -> None:
    before = quantize(torch.randn(4, 64), grid=GridName.kimi7, group_size=32)
    codes, scales = before.codes_XOI.clone(), before.scales_XOG.clone()
    codes[0, :8] += 1
    scales[0, 0] *= 2
    after = Quantized(codes_XOI=codes, scales_XOG=scales)
    assert code_flip_rate(before, after=before) == 0
    assert code_flip_rate(before, after=after) == 8 / 256
    assert scale_change_rate(before, after=after) == 1 / 8


def test_relative_rmse_of_gaussian_weights_is_that_of_the_grid() -> None:
    weight = 0.02 * torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    quantized = quantize(weight, grid=GridName.kimi7, group_size=32)
    assert relative_rmse(weight, quantized=quantized) == pytest.approx(0.0971, abs=0.002)
    assert relative_rmse(torch.zeros(64, 1024), quantized=quantized) == 0
