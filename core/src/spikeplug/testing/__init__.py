"""The conformance kit: subclass, give its fixtures, and pytest runs every check that such a part must pass.

    class TestMyCode(EncoderConformance):
        @pytest.fixture
        def encoder(self):
            return MyCode(steps=8)

A check cannot be overridden. One that does not apply is waived aloud, with a reason that pytest prints:
`waived = {"test_gradient_is_the_identity": "not differentiable by design"}`.
"""

from spikeplug.testing.encoder import EncoderConformance
from spikeplug.testing.neuron import NeuronConformance
from spikeplug.testing.parts import (
    ApproximatorConformance,
    ExporterConformance,
    OperationConformance,
    PassConformance,
    TrainerConformance,
)

__all__ = [
    "ApproximatorConformance",
    "EncoderConformance",
    "ExporterConformance",
    "NeuronConformance",
    "OperationConformance",
    "PassConformance",
    "TrainerConformance",
]
