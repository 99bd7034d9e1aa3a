"""The conformance kit: subclass, give one fixture, and pytest runs every check a code or a neuron must pass.

    class TestMyCode(EncoderConformance):
        @pytest.fixture
        def encoder(self):
            return MyCode(steps=8)

A check cannot be overridden. One that does not apply is waived aloud, with a reason that pytest prints:
`waived = {"test_gradient_is_the_identity": "not differentiable by design"}`.
"""

from spikeplug.testing.encoder import EncoderConformance
from spikeplug.testing.neuron import NeuronConformance

__all__ = ["EncoderConformance", "NeuronConformance"]
