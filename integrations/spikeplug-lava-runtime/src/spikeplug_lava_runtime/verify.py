"""Verification: a back end runs the golden input of a file, and every spike is compared with the recorded one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from spikeplug_lava_runtime.format import Bundle, FormatError
from spikeplug_lava_runtime.interpreter import Result, run

BACKENDS = {"numpy": "numpy interpreter", "lava": "Lava CPU simulator"}

NOT_CHECKED = (
    "not checked: whether programs, cores and fan-in of a chip suffice; its rounding, latency and energy",
    "Not run on Loihi 2.",
)


@dataclass(frozen=True)
class Verdict:
    """What a verification found.

    Attributes:
        backend: `numpy` or `lava`.
        samples: that were run.
        compared: places of spikes that were compared: steps x samples x neurons.
        differing: of every population, how many of them differ; of the readout, how many states.
        overflowing: populations whose states did not fit 24 bits.
    """

    backend: str
    samples: int
    compared: int
    differing: dict[str, int]
    overflowing: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing differs and every state fits."""
        return not any(self.differing.values()) and not self.overflowing

    def __str__(self) -> str:
        wrong = sum(self.differing.values())
        head = f"{BACKENDS[self.backend]}, integer model: "
        head += "PASS" if self.passed else "FAIL"
        lines = [f"{head} {self.compared - wrong}/{self.compared} spikes and states, {self.samples} samples"]
        lines += [f"  {name}: {count} differ" for name, count in self.differing.items() if count]
        lines += [f"  {name}: a state needs more than 24 bits" for name in self.overflowing]
        if not any(self.differing.values()):
            lines.append("checked: every golden spike of every population, the readout's states, 24 bits of state")
        return "\n".join([*lines, *NOT_CHECKED])

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**vars(self), "passed": self.passed, "not_checked": list(NOT_CHECKED)}


def verify(bundle: Bundle, backend: str = "numpy", samples: int | None = None) -> Verdict:
    """Run the golden input and compare.

    Args:
        backend: `numpy` or `lava`.
        samples: only so many; None: all that the file has.

    Raises:
        FormatError: the file has no golden spikes.
        ValueError: there is no such back end.
        ImportError: the back end needs a package that is not installed.
    """
    populations = bundle.populations
    names = [each["name"] for each in populations]
    missing = [name for name in names if f"golden.{name}" not in bundle.tensors]
    if missing:
        raise FormatError(f"there are no golden spikes of '{missing[0]}': export with -s golden=4")
    count = bundle.samples if samples is None else min(samples, bundle.samples)
    if count < 1:
        raise ValueError(f"samples={count}: at least 1 is needed")
    given = bundle.golden(names[0])[:, :count]
    result = backend_of(backend)(bundle, given)
    differing = {
        name: int(np.count_nonzero(result.spikes[name] != bundle.golden(name)[:, :count])) for name in names[1:-1]
    }
    differing[names[-1]] = int(np.count_nonzero(result.readout != bundle.golden(names[-1])[:count]))
    compared = sum(result.spikes[name].size for name in names[1:-1]) + result.readout.size
    return Verdict(backend, count, compared, differing, tuple(result.overflowing))


def backend_of(name: str) -> Callable[[Bundle, Any], Result]:
    """What runs a bundle on spikes. Raises ValueError where there is none of that name."""
    if name == "numpy":
        return run
    if name == "lava":
        from spikeplug_lava_runtime.on_lava.simulate import run_on_lava

        return run_on_lava
    raise ValueError(f"backend '{name}': one of {', '.join(BACKENDS)} is needed")
