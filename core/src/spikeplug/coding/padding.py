"""Padded positions of sequences, which are neither observed nor counted."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

from torch import Tensor

_REAL: contextvars.ContextVar[Tensor | None] = contextvars.ContextVar("spikeplug_real_positions", default=None)


@contextlib.contextmanager
def real_positions(mask: Tensor | None) -> Iterator[None]:
    """Inside, padded positions of sequences are neither observed nor counted.

    Args:
        mask: `[B, S]`, not 0 where a position is no padding; None: there is none.
    """
    before = _REAL.set(None if mask is None or bool(mask.bool().all()) else mask.bool())
    try:
        yield
    finally:
        _REAL.reset(before)


def without_padding(x: Tensor, sequence: int | None = -2) -> Tensor:
    """An activation without its padded positions, as one long sample: `[B, S, F]` to `[1, N, F]`.

    Args:
        sequence: the dimension of positions, counted from the end; None: it has none.
    """
    real = _real(x, sequence)
    if real is None or sequence is None:
        return x
    return x.movedim(sequence, 1)[real].unsqueeze(0).movedim(1, sequence)


def real_elements(x: Tensor, sequence: int | None = -2) -> Tensor | None:
    """Which elements of an activation stand at positions that are no padding, its shape; None: all do."""
    real = _real(x, sequence)
    if real is None or sequence is None:
        return None
    shape = [1] * x.ndim
    shape[0], shape[sequence] = real.shape
    return real.reshape(shape).expand(x.shape)


def _real(x: Tensor, sequence: int | None) -> Tensor | None:
    """The mask `[B, S]` of the positions of an activation; None where it has none that are padded."""
    mask = _REAL.get()
    if mask is None or sequence is None or not 1 <= x.ndim + sequence < x.ndim or len(x) != len(mask):
        return None
    length = x.shape[sequence]
    if length > mask.shape[1]:
        return None
    # The last positions of the mask are those of this call; earlier ones lie in a cache.
    return mask[:, mask.shape[1] - length :].to(x.device)
