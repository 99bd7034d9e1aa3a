"""Copies of models that share the memory of their tensors, and models that share it no longer."""

from __future__ import annotations

import copy
import itertools
from typing import Any

from torch import Tensor, nn


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of a model's modules around the memory of its tensors; changing a tensor's values changes both."""
    memo: dict[int, Any] = {}
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        own = tensor.detach()
        memo[id(tensor)] = nn.Parameter(own, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else own
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:  # a weight that was computed, as pruning does
                memo[id(value)] = value.detach()
    return copy.deepcopy(model, memo)


def own(model: nn.Module) -> nn.Module:
    """Give a model memory of its own for every parameter and buffer, before their values are changed; return it."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        tensor.data = tensor.data.clone()
    return model
