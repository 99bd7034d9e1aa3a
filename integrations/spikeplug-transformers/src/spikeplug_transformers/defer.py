"""The pass `defer-softmax`: the division of softmax moves behind the product with v, and the function stays.

What spikes carry is then `exp(score - largest score of the row)` in place of the probabilities: every row fills the
code's range, however evenly it spreads its attention. The sum that divides is that of the *coded* values, so that what
a code loses of a row's small probabilities is not lost of its whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

from .attention import DIVISION, IMPLEMENTATION, Division, plain_softmax
from .family import attention_blocks, refuse_strangers


@dataclasses.dataclass(frozen=True)
class DeferSoftmax:
    """Codes unnormalized attention weights, `[0, 1]` in every row, and divides the output of attention by their sum."""

    name: ClassVar[str] = "defer-softmax"

    def apply(self, model: Any, batches: Sequence[Any] = ()) -> dict[str, Any]:
        """Change every attention block in place. Raises ConversionError as other passes do."""
        refuse_strangers(model)
        self.skeleton(model)
        model.set_attn_implementation(IMPLEMENTATION)
        return {}

    def skeleton(self, model: Any) -> None:
        """The same on a model whose weights are not there yet."""
        for _, block in attention_blocks(model):
            setattr(block, DIVISION, Division())
            plain_softmax(block)
