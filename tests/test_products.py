"""Operations step by step sum to the fused result, and give at every step what the equations say."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import spikeplug
from spike_plugin_phase.encoder import Phase
from spikeplug import ActivationStats
from spikeplug.graph.products import accumulated, contributions, hadamard, matrix_product


@pytest.fixture(params=[{}, {"rounding": "floor"}, {"grains": 2, "rounds": 2, "samples": 300}], ids=str)
def coded(request):
    """Contributions and fused value of an activation."""
    code = Phase(steps=7, **request.param)

    def coded(*shape):
        x = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))
        p = code.fit(ActivationStats.of(x, ()))
        return list(contributions(code, p, code.encode(x, p))), code.fused(x, p)

    return coded


def test_contributions_sum_to_the_decoded_value(coded):
    steps, fused = coded(5, 6)
    assert len(steps) == 7
    torch.testing.assert_close(sum(steps), fused)


def test_matrix_product(coded):
    (q, fused_q), (k, fused_k) = coded(2, 5, 8), coded(2, 4, 8)
    steps = list(matrix_product(q, k))
    torch.testing.assert_close(sum(steps), fused_q @ fused_k.mT)
    # Up to any step the products so far are those of the sums so far.
    torch.testing.assert_close(sum(steps[:3]), sum(q[:3]) @ sum(k[:3]).mT)


def test_hadamard_is_equation_55(coded):
    (a, fused_a), (b, fused_b) = coded(3, 4), coded(3, 4)
    steps = list(hadamard(a, b))
    torch.testing.assert_close(sum(steps), fused_a * fused_b)
    for t in range(7):
        plain = a[t] * b[t] + sum((a[t] * b[i] + a[i] * b[t]) / 2 for i in range(7) if i != t)
        torch.testing.assert_close(steps[t], plain)


@pytest.mark.parametrize("function", [F.silu, lambda x: x.softmax(-1), lambda x: F.rms_norm(x, x.shape[-1:])])
def test_accumulated_differences(coded, function):
    x, fused = coded(3, 9)
    steps = list(accumulated(function, x))
    torch.testing.assert_close(sum(steps), function(fused))
    torch.testing.assert_close(sum(steps[:2]), function(x[0] + x[1]))


@pytest.mark.parametrize("approximator", ["asnc", "ttfs-kernels"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_an_approximated_softmax_gives_back_the_dtype_that_came(approximator, dtype):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Softmax(-1), torch.nn.Linear(6, 4)).to(dtype).eval()
    batch = torch.randn(16, 8).to(dtype)
    spiking = spikeplug.convert(net, "bse", calibration=[batch], approximators={"softmax": approximator})
    for mode in ("fused", "dense"):
        with torch.no_grad(), spikeplug.in_mode(spiking, mode):
            assert spiking(batch).dtype == dtype
            torch.testing.assert_close(spiking(batch).float(), net(batch).float(), rtol=0.05, atol=0.05)
