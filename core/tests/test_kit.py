"""The kit itself: it catches wrong codes, and cannot be weakened quietly."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from spikeplug.coding.rate import IF, Rate
from spikeplug.testing import EncoderConformance, NeuronConformance


class OffByOne(Rate):
    """fused differs from encode."""

    def fused(self, x, p):
        return super().fused(x, p) + p.scale


class Forgetful(Rate):
    """count misses a spike."""

    def count(self, x, p):
        return (super().count(x, p) - 1).clamp(min=0)


class Clipping(Rate):
    """Infinity becomes an ordinary number."""

    def quantize(self, x, p):
        return super().quantize(torch.nan_to_num(x, posinf=1e6, neginf=-1e6), p)


class Optimist(Rate):
    """Declares a bound that does not hold."""

    def error_bound(self, p):
        return p.scale / 10


@dataclasses.dataclass(frozen=True)
class Mutating(IF):
    """Changes the state it was given."""

    def step(self, x, state):
        spikes, after = super().step(x, state)
        state += 1
        return spikes, after


def _fails(kit, fixture, subject, check, *arguments):
    class Kit(kit):
        pass

    bound = getattr(Kit(), check)
    given = {
        "encoder": subject,
        "neuron": subject if fixture == "neuron" else None,
        "params": Kit._fit(subject, torch.randn(2, 50, 6)) if fixture == "encoder" else None,
        "currents": torch.randn(6, 4, 5),
    }
    names = bound.__code__.co_varnames[1 : bound.__code__.co_argcount]
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        bound(*[given[name] for name in names if name in given], *arguments)


@pytest.mark.parametrize(
    ("code", "check", "arguments"),
    [
        (OffByOne(), "test_fused_equals_decode_of_encode", ()),
        (Forgetful(), "test_count_equals_the_spikes_made", ()),
        (Clipping(), "test_nan_and_infinity_are_refused", ("fused", float("inf"))),
        (Optimist(), "test_error_is_within_the_declared_bound", ()),
    ],
    ids=["fused", "count", "infinity", "bound"],
)
def test_kit_catches_a_wrong_code(code, check, arguments):
    _fails(EncoderConformance, "encoder", code, check, *arguments)


def test_kit_catches_a_neuron_that_changes_its_state():
    _fails(NeuronConformance, "neuron", Mutating(), "test_step_changes_neither_input_nor_state")


def test_override_of_a_check_is_an_error():
    with pytest.raises(TypeError, match="overrides the check test_all_zero_stays_zero"):

        class Weak(EncoderConformance):
            def test_all_zero_stays_zero(self):
                pass


def test_override_by_a_mixin_or_of_a_helper_is_an_error():
    class Mixin:
        def test_all_zero_stays_zero(self):
            pass

    for bases, body in [((Mixin, EncoderConformance), {}), ((EncoderConformance,), {"_ulp": lambda *_: 1e9})]:
        with pytest.raises(TypeError, match="overrides the check"):
            type("Weak", bases, body)


@pytest.mark.parametrize("waived", [{"test_no_such": "why"}, {"test_all_zero_stays_zero": " "}], ids=["name", "reason"])
def test_waiver_needs_a_check_and_a_reason(waived):
    with pytest.raises(TypeError, match="name a check of the kit and give the reason"):
        type("Weak", (EncoderConformance,), {"waived": waived})


class TestWaivedCheckIsSkipped(NeuronConformance):
    waived = {"test_fires_spikes_of_the_shape_and_dtype_of_its_current": "shown here: waived aloud"}  # noqa: RUF012

    @pytest.fixture
    def neuron(self):
        return IF(threshold=1e9)
