"""What became of every operation of a converted network, so that nothing is left dense unseen."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

from spikeplug.coding.types import Encoder

ROLES = {
    "spiking": "weighted layer on spikes: accumulates (AC) in place of multiply-accumulates (MAC)",
    "coded": "carried by spikes, no multiplication",
    "neuron": "absorbed into the next layer's neurons",
    "decoded": "product of two activations: both carried by spikes, decoded, multiplied as MACs",
    "folded": "merged into another layer",
    "approximated": "nonlinear operation in spikes",
    "dense": "floating point",
}


@dataclasses.dataclass(frozen=True)
class Op:
    """One operation.

    Attributes:
        name: path in the model.
        type: the dense operation, as its class is called.
        role: one of `ROLES`.
        macs: multiply-accumulates of the dense operation for one `unit`; None where it is not known.
        code: the code of its input, empty when it has none.
        note: what a reader should know.
        sites: names of the sites whose spikes it receives.
        elements: of its result for one `unit`, where it has no MACs.
        line: where in the source it stands, `file.py:12`; empty where that is not known.
    """

    name: str
    type: str
    role: str
    macs: int | None = 0
    code: str = ""
    note: str = ""
    sites: tuple[str, ...] = ()
    elements: int = 0
    line: str = ""


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """Every operation of a network and its role.

    Attributes:
        unit: what MACs are counted for: `token at context 512`, `sample`.
        delay: time steps from the input to the result along the longest path, where every window waits for the one
            before it; None where the order of the operations is not known.
    """

    recipe: str
    ops: tuple[Op, ...]
    unit: str
    delay: int | None = None

    def share(self, role: str = "spiking") -> float | None:
        """Share of the MACs that have that role; None where some MACs are not known."""
        if any(op.macs is None for op in self.ops):
            return None
        total = sum(op.macs or 0 for op in self.ops)
        return sum(op.macs or 0 for op in self.ops if op.role == role) / total if total else 0.0

    def counts(self) -> dict[str, int]:
        """Number of operations by role."""
        return dict(collections.Counter(op.role for op in self.ops))

    def summary(self) -> dict[str, Any]:
        """The figures without the list of operations."""
        notes = sorted({op.note for op in self.ops if op.note})
        shares = {role: self.share(role) for role in ROLES if any(op.role == role for op in self.ops)}
        return {
            "recipe": self.recipe,
            "unit": self.unit,
            "operations": self.counts(),
            "macs_share": shares,
            "delay": self.delay,
            "notes": notes,
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {**self.summary(), "ops": [dataclasses.asdict(op) for op in self.ops]}

    def __str__(self) -> str:
        share, decoded = self.share(), self.share("decoded")
        spiking = "unknown until a forward pass" if share is None or decoded is None else f"{share:.1%}"
        rows = [f"  {op.role:<12} {op.name} ({op.type}{', ' + op.code if op.code else ''})" for op in self.ops]
        extra = f", {decoded:.1%} decoded products" if decoded else ""
        extra += f"; {self.delay:,} steps to the result" if self.delay is not None else ""
        return "\n".join([f"recipe {self.recipe}: {spiking} of the MACs per {self.unit} are spiking{extra}", *rows])


def spiking_op(name: str, kind: str, macs: int | None, site: Any) -> Op:
    """The operation of a weighted layer that receives the spikes of a site."""
    return Op(name, kind, "spiking", macs, str(site.encoder), dynamic_note(site.encoder), (site.name,))


def dynamic_note(encoder: Encoder) -> str:
    """The warning that a code with scales found at run time must carry, or nothing."""
    if encoder.static:
        return ""
    return "scales are computed at run time, not calibrated: results may depend on how features are sharded"
