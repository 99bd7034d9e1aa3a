"""Edges as matrices of synapses: what a chip holds, one weight for every pair of neurons that are connected."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from spikeplug_lava_runtime.check import shape_after
from spikeplug_lava_runtime.format import Bundle

Array = Any


def matrix(bundle: Bundle, edge: Mapping[str, Any]) -> Any:
    """An edge as a scipy CSR matrix `[neurons, source's neurons]`, int32. Needs scipy."""
    from scipy.sparse import csr_matrix, identity

    given = tuple(next(each for each in bundle.populations if each["name"] == edge["from"])["shape"])
    whole = identity(math.prod(given), dtype=np.int32, format="csr")
    for op in edge["ops"]:
        rows, columns, values = _entries(op, given, bundle.tensors)
        shape = shape_after(op, given, bundle.tensors)
        step = csr_matrix((values, (rows, columns)), (math.prod(shape), math.prod(given)), dtype=np.int32)
        whole, given = (step @ whole).tocsr(), shape
    whole.eliminate_zeros()
    return whole


def _entries(op: Mapping[str, Any], given: tuple[int, ...], tensors: Mapping[str, Array]) -> tuple[Array, Array, Array]:
    """Rows, columns and values of one operation on something of a shape."""
    kind, size = op["op"], math.prod(given)
    columns = np.arange(size)
    if kind == "reshape":
        return columns, columns, np.ones(size, np.int32)
    if kind == "scale":
        weight = tensors[op["weight"]].astype(np.int32)
        return columns, columns, np.repeat(np.broadcast_to(weight, given[:1]), size // given[0])
    if kind == "gather":
        index = tensors[op["index"]].reshape(-1)
        rows = np.flatnonzero(index)
        return rows, index[rows] - 1, np.ones(len(rows), np.int32)
    if kind == "linear":
        weight = tensors[op["weight"]].astype(np.int32)
        rows, columns = np.nonzero(weight)
        return rows, columns, weight[rows, columns]
    return _sliding(op, given, tensors)


def _sliding(op: Mapping[str, Any], given: tuple[int, ...], tensors: Mapping[str, Array]) -> tuple[Array, Array, Array]:
    """Entries of a convolution or of a pooling: one kernel place after the other."""
    shape = shape_after(op, given, tensors)
    dims, channels = len(given) - 1, given[0]
    if op["op"] == "conv":
        weight, groups, dilation = tensors[op["weight"]].astype(np.int32), op["groups"], op["dilation"]
    else:
        weight, groups, dilation = np.ones((channels, 1, *op["kernel"]), np.int32), channels, [1] * dims
    numbers = np.arange(math.prod(given)).reshape(given)
    places = np.indices(shape[1:])  # [dims, places...]
    results = np.arange(math.prod(shape)).reshape(shape)
    per_in, per_out = channels // groups, shape[0] // groups
    found: list[tuple[Array, Array, Array]] = []
    for place in np.ndindex(*weight.shape[2:]):
        at = [
            places[d] * op["stride"][d] - op["padding"][d] + place[d] * dilation[d] for d in range(dims)
        ]  # where this kernel place lies
        inside = np.logical_and.reduce([(at[d] >= 0) & (at[d] < given[1 + d]) for d in range(dims)])
        where = tuple(each[inside] for each in at)
        for out in range(shape[0]):
            first = out // per_out * per_in
            for each in range(per_in):
                value = weight[(out, each, *place)]
                if value:
                    columns = numbers[first + each][where]
                    found.append((results[out][inside], columns, np.full(len(columns), value, np.int32)))
    if not found:
        return (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int32))
    rows, columns, values = (np.concatenate(each) for each in zip(*found, strict=True))
    return rows, columns, values
