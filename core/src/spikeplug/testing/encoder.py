"""What every code must do."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any, cast

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spikeplug.coding.layers import SpikingLinear, make_spiking
from spikeplug.coding.site import Site
from spikeplug.coding.statistics import ActivationStats
from spikeplug.coding.types import CodeParams, Encoder, Neuron
from spikeplug.errors import NonFiniteError
from spikeplug.testing.guard import Guarded

CHANNELS = 6
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "transposed", "strided", "expanded", "requires_grad"]


def activations(dtype: torch.dtype = torch.float64) -> Tensor:
    """`[2, 50, 6]`: normal values, one wide channel, exact zeros."""
    x = torch.randn(2, 50, CHANNELS, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    x[..., 0] *= 20
    x[0, :3] = 0
    return x.to(dtype)


class EncoderConformance(Guarded):
    """Checks of an Encoder. Give the fixture `encoder`; `neuron` too where a neuron fires the code's spikes."""

    @pytest.fixture
    def encoder(self) -> Encoder:
        """The code under test."""
        pytest.fail("give the fixture `encoder`")

    @pytest.fixture
    def neuron(self) -> Neuron | None:
        """The neuron that fires the code's spikes when it is driven by `encoder.drive`, if there is one."""
        return None

    @pytest.fixture
    def params(self, encoder: Encoder) -> CodeParams:
        """Parameters for `activations()`."""
        return self._fit(encoder, activations())

    @staticmethod
    def _fit(encoder: Encoder, x: Tensor) -> CodeParams:
        one = CodeParams(torch.ones(()), torch.zeros(()))
        return encoder.params(x, encoder.fit(ActivationStats.of(x)) if encoder.static else one)

    @staticmethod
    def _sweep(encoder: Encoder, p: CodeParams) -> Tensor:
        """Values `[201, 6]` from the low to the high end of every channel's span."""
        low, high = (end.double().reshape(-1, p.scale.shape[-1] if p.scale.ndim else 1)[0] for end in encoder.span(p))
        grid = torch.linspace(0, 1, 201, dtype=torch.float64).unsqueeze(1)
        return (low + (high - low) * grid).expand(201, CHANNELS).clone()

    @staticmethod
    def _ulp(encoder: Encoder, p: CodeParams, dtype: torch.dtype) -> Tensor:
        """What rounding to `dtype`, and to the dtype of the parameters, can add to an error."""
        low, high = encoder.span(p)
        return 4 * torch.maximum(low.abs(), high.abs()).double() * max(torch.finfo(d).eps for d in (dtype, low.dtype))

    def test_is_a_frozen_dataclass_with_plain_options(self, encoder: Encoder) -> None:
        assert hasattr(encoder, "__dataclass_fields__")
        options = dataclasses.asdict(cast(Any, encoder))
        assert type(encoder)(**json.loads(json.dumps(options))) == encoder
        with pytest.raises(dataclasses.FrozenInstanceError):
            encoder.steps = encoder.steps + 1

    def test_window_has_the_declared_steps(self, encoder: Encoder, params: CodeParams) -> None:
        x = activations()
        s = encoder.encode(x, params)
        assert encoder.weights(params).shape == (encoder.steps,)
        assert s.shape == (encoder.steps, *x.shape)
        assert s.dtype == x.dtype

    def test_spikes_are_zero_one_or_minus_one(self, encoder: Encoder, params: CodeParams) -> None:
        allowed = {-1.0, 0.0, 1.0} if encoder.signed else {0.0, 1.0}
        assert set(encoder.encode(activations(), params).flatten().tolist()) <= allowed

    def test_error_is_within_the_declared_bound(self, encoder: Encoder, params: CodeParams) -> None:
        x = self._sweep(encoder, params) if encoder.static else activations()
        error = (encoder.fused(x, params) - x).abs()
        assert (error <= encoder.error_bound(params) + self._ulp(encoder, params, x.dtype)).all()

    def test_error_bound_holds_for_any_value(self, encoder: Encoder, params: CodeParams) -> None:
        if not encoder.static:
            pytest.skip("a dynamic code's span is that of the activation itself")
        low, high = encoder.span(params)

        @settings(max_examples=50, deadline=None, derandomize=True, database=None)
        @given(st.lists(st.floats(0, 1), min_size=CHANNELS, max_size=CHANNELS))
        def holds(values: list[float]) -> None:
            x = low.double() + (high - low).double() * torch.tensor(values, dtype=torch.float64)
            error = (encoder.decode(encoder.encode(x, params), params) - x).abs()
            assert (error <= encoder.error_bound(params) + self._ulp(encoder, params, x.dtype)).all()

        holds()

    def test_values_outside_the_span_give_its_ends(self, encoder: Encoder, params: CodeParams) -> None:
        if not encoder.static:
            pytest.skip("a dynamic code's span is that of the activation itself")
        low, high = (end.double().expand(CHANNELS) for end in encoder.span(params))
        width = high - low
        ulp = self._ulp(encoder, params, torch.float64)
        bound = encoder.error_bound(params).double() + ulp
        assert ((encoder.fused(high + 3 * width, params) - high).abs() <= bound).all()
        assert ((encoder.fused(low - 3 * width, params) - low).abs() <= bound).all()

    def test_fused_equals_decode_of_encode(self, encoder: Encoder, params: CodeParams) -> None:
        for dtype in DTYPES:
            x = activations(dtype)
            fused, stepped = encoder.fused(x, params), encoder.decode(encoder.encode(x, params), params)
            if encoder.collapsible:
                assert torch.equal(fused, stepped), dtype
            else:
                bound = encoder.error_bound(params) + self._ulp(encoder, params, dtype)
                assert ((fused - stepped).abs() <= 2 * bound).all(), dtype

    def test_grid_points_are_kept(self, encoder: Encoder, params: CodeParams) -> None:
        grid = encoder.fused(self._sweep(encoder, params) if encoder.static else activations(), params)
        assert torch.equal(encoder.fused(grid, params), grid)

    def test_ties_go_to_a_neighbour(self, encoder: Encoder, params: CodeParams) -> None:
        if not encoder.static:
            pytest.skip("a dynamic code's span is that of the activation itself")
        grid = encoder.fused(self._sweep(encoder, params), params).sort(dim=0).values
        lower, upper = grid[:-1], grid[1:]
        middle = (lower + upper) / 2
        got = encoder.decode(encoder.encode(middle, params), params)
        assert torch.equal(got, encoder.fused(middle, params)) or not encoder.collapsible
        ulp = self._ulp(encoder, params, torch.float64)
        assert (got >= lower - ulp).all()
        assert (got <= upper + ulp).all()

    def test_neuron_fires_the_code(self, encoder: Encoder, neuron: Neuron | None, params: CodeParams) -> None:
        if neuron is None:
            pytest.skip("no neuron was given: spikes come from `encode`")
        for dtype in DTYPES:
            x = activations(dtype)
            fired = torch.stack(list(neuron.bind(params).stream(encoder.drive(x, params))))
            assert torch.equal(fired.to(dtype), encoder.encode(x, params)), dtype

    def test_count_equals_the_spikes_made(self, encoder: Encoder, params: CodeParams) -> None:
        x = activations()
        made = encoder.encode(x, params).abs().sum(0)
        counted = encoder.count(x, params)
        assert not counted.is_floating_point()
        assert torch.equal(counted.to(torch.int64), made.to(torch.int64))

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_dtype_and_layout_change_no_code(
        self, encoder: Encoder, params: CodeParams, dtype: torch.dtype, layout: str
    ) -> None:
        x = activations(dtype)
        made = {
            "contiguous": x,
            "transposed": x.transpose(0, 1).contiguous().transpose(0, 1),
            "strided": torch.stack([x, x], dim=-1)[..., 0],
            "expanded": x[:1].expand(2, -1, -1),
            "requires_grad": x.clone().requires_grad_(),
        }[layout]
        wide = torch.promote_types(dtype, torch.float32)
        reference = encoder.encode(made.detach().contiguous().to(wide), params)
        got = encoder.encode(made, params)
        assert got.dtype == dtype
        assert torch.equal(got.to(wide).detach(), reference)
        assert encoder.fused(made, params).dtype == dtype

    def test_single_number(self, encoder: Encoder) -> None:
        x = torch.tensor(0.75)
        p = self._fit(encoder, x)
        assert encoder.encode(x, p).shape == (encoder.steps,)
        assert torch.equal(encoder.fused(x, p), encoder.decode(encoder.encode(x, p), p))

    def test_empty_activation(self, encoder: Encoder, params: CodeParams) -> None:
        x = activations()[:, :0]
        p = params if encoder.static else self._fit(encoder, x)
        assert encoder.encode(x, p).shape == (encoder.steps, *x.shape)
        assert encoder.fused(x, p).shape == x.shape
        assert encoder.count(x, p).shape == x.shape

    def test_all_zero_stays_zero(self, encoder: Encoder) -> None:
        x = torch.zeros(4, CHANNELS)
        p = self._fit(encoder, x)
        assert torch.isfinite(p.scale).all()
        assert torch.equal(encoder.fused(x, p), x)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("method", ["encode", "fused", "count"])
    def test_nan_and_infinity_are_refused(
        self, encoder: Encoder, params: CodeParams, method: str, value: float
    ) -> None:
        x = activations()
        x[1, 2, 3] = value
        with pytest.raises(NonFiniteError):
            getattr(encoder, method)(x, params)

    def test_is_deterministic_and_leaves_its_input(self, encoder: Encoder, params: CodeParams) -> None:
        x = activations()
        before = x.clone()
        kept = copy.deepcopy(params)
        for method in (encoder.encode, encoder.fused, encoder.count):
            assert torch.equal(method(x, params), method(x, params))
        assert torch.equal(x, before)
        assert torch.equal(params.scale, kept.scale)
        assert torch.equal(params.offset, kept.offset)

    def test_gradient_is_the_identity(self, encoder: Encoder, params: CodeParams) -> None:
        x = activations().requires_grad_()
        seed = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
        (gradient,) = torch.autograd.grad(encoder.fused(x, params), x, seed)
        assert torch.equal(gradient, seed)

    def test_params_survive_save_and_load(self, encoder: Encoder, params: CodeParams, tmp_path: Path) -> None:
        safetensors.torch.save_file(params.tensors(), tmp_path / "params.safetensors")
        loaded = CodeParams.from_tensors(safetensors.torch.load_file(tmp_path / "params.safetensors"))
        x = activations()
        assert torch.equal(encoder.fused(x, loaded), encoder.fused(x, params))
        assert torch.equal(encoder.encode(x, loaded), encoder.encode(x, params))

    def test_layer_stepped_equals_fused_and_differs_from_dense(self, encoder: Encoder, neuron: Neuron | None) -> None:
        x = activations()
        torch.manual_seed(0)
        layer = torch.nn.Linear(CHANNELS, 5, dtype=torch.float64).requires_grad_(False)
        dense = layer(x)
        site = Site("layer", "input", encoder, neuron)
        make_spiking(layer, site)
        assert isinstance(layer, SpikingLinear)
        if encoder.static:
            site.set_params(self._fit(encoder, x).tensors())
        fused = layer(x)
        site.mode = "stepped"
        stepped = layer(x)
        bound = encoder.error_bound(site.params(x)).double()
        if encoder.collapsible:
            torch.testing.assert_close(stepped, fused, rtol=1e-9, atol=1e-9 + float(1e-9 * dense.abs().max()))
        reach = layer.weight.abs().sum(1).max() * bound.max()
        assert (stepped - dense).abs().max() <= 1.01 * reach + 1e-6
        assert not torch.equal(stepped, dense)
