"""The rules of the format: what a network must keep to before anything is made of it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spikeplug_lava_runtime.format import (
    CODES,
    MOST,
    PAYLOAD_LIMIT,
    STATE_BITS,
    STATE_LIMIT,
    WEIGHT_LIMIT,
    Bundle,
    FormatError,
)

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_\-]*(\.[A-Za-z0-9_][A-Za-z0-9_\-]*)*")
_OPS: dict[str, tuple[str, ...]] = {
    "conv": ("weight", "stride", "padding", "dilation", "groups"),
    "linear": ("weight",),
    "scale": ("weight",),
    "sum_pool": ("kernel", "stride", "padding"),
    "reshape": ("shape",),
    "gather": ("index", "shape"),
}
"""Linear operations of an edge, and what each has."""

_TENSORS: dict[str, tuple[str, ...]] = {
    "css": ("threshold",),
    "bse": ("threshold",),
    "phase": ("threshold", "reset", "ceiling"),
    "ttfs": ("threshold",),
    "rate": ("threshold",),
}


def check(bundle: Bundle) -> None:
    """Hold a network to the rules of the format.

    Raises:
        FormatError: the message names the population and the rule.
    """
    _check_head(bundle.graph)
    shapes: dict[str, tuple[int, ...]] = {}
    for index, population in enumerate(bundle.populations):
        name = population["name"]
        if not isinstance(name, str) or not _NAME.fullmatch(name) or len(name) > 200:
            raise FormatError(f"population {name!r}: a name of letters, digits, '_', '-' and single dots is needed")
        if name in shapes:
            raise FormatError(f"population '{name}' is there twice")
        _check_kind(population, first=index == 0, last=index == len(bundle.populations) - 1)
        _check_params(bundle, population)
        _check_edges(bundle, population, shapes)
        shapes[name] = tuple(population["shape"])
    if not bundle.populations or bundle.populations[-1]["kind"] != "readout":
        raise FormatError("the last population must be a readout")
    _check_golden(bundle)


def _check_edges(bundle: Bundle, population: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    name, edges, shape = population["name"], population["edges"], tuple(population["shape"])
    if bool(edges) == (population["kind"] == "input"):
        raise FormatError(f"population '{name}' has {len(edges)} edges: the input has none, others have some")
    for edge in edges:
        if edge["from"] not in shapes:
            raise FormatError(f"population '{name}' receives from '{edge['from']}', which does not come before it")
        given = shapes[edge["from"]]
        for op in edge["ops"]:
            given = _check_op(bundle, name, op, given)
        if given != shape:
            raise FormatError(f"an edge of '{name}' gives {list(given)}, {list(shape)} is needed")


def _check_head(graph: Mapping[str, Any]) -> None:
    if graph["code"] not in CODES:
        raise FormatError(f"code '{graph['code']}': one of {', '.join(CODES)} is needed")
    _whole(graph, "steps", 1, STATE_BITS if graph["code"] == "bse" else 4096)
    if graph["code"] == "css":
        if graph.get("beta") not in ("3/2", "2"):
            raise FormatError(f"beta={graph.get('beta')!r}: '3/2' or '2' is needed")
        _whole(graph, "silent", 0, 16)


def _is_whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _whole(found: Mapping[str, Any], key: str, least: int, most: int) -> None:
    if not _is_whole(found.get(key), least, most):
        raise FormatError(f"{key}={found.get(key)!r}: a whole number from {least} to {most} is needed")


def _check_kind(population: Mapping[str, Any], first: bool, last: bool) -> None:
    """Its place in the order, its kind and its shape."""
    name, kind = population["name"], population["kind"]
    kinds = ("input",) if first else ("neurons", "readout")
    if kind not in kinds:
        raise FormatError(f"population '{name}' is of kind {kind!r}: {' or '.join(kinds)} is needed")
    if kind == "readout" and not last:
        raise FormatError(f"population '{name}' is a readout, which comes last")
    shape = population["shape"]
    if not isinstance(shape, list) or not shape or not _is_size(shape):
        raise FormatError(f"population '{name}' has shape {shape!r}: positive sizes, up to {MOST} neurons, are needed")


def _is_size(shape: Sequence[Any]) -> bool:
    return all(_is_whole(size, 1, MOST) for size in shape) and math.prod(shape) <= MOST


def _check_params(bundle: Bundle, population: Mapping[str, Any]) -> None:
    name, kind, code = population["name"], population["kind"], bundle.code
    if code == "phase" and kind != "readout":
        _check_payload(name, population.get("payload"), bundle.steps)
    elif population.get("payload") is not None:
        raise FormatError(f"population '{name}' has a payload, which only spikes of 'phase' carry")
    for key in ("rectify", "negative"):
        if not isinstance(population.get(key, False), bool):
            raise FormatError(f"population '{name}' has {key}={population[key]!r}: true or false is needed")
    if kind == "input":
        return
    if code == "css":
        _whole(population, "fraction", 0, 16)
    if population.get("bias") is not None:
        _check_integers(bundle, population, "bias")
    if kind == "readout":
        _fits(population, "scale", _tensor(bundle, name, population["scale"], np.float32).shape, ())
    else:
        _check_neurons(bundle, population)


def _check_neurons(bundle: Bundle, population: Mapping[str, Any]) -> None:
    name, code, steps = population["name"], bundle.code, bundle.steps
    optional = ("ceiling",) if code == "css" and population.get("ceiling") is not None else ()
    for key in (*_TENSORS[code], *optional):
        _check_integers(bundle, population, key)
    threshold = bundle.tensors[population["threshold"]].astype(np.int64)
    if (threshold < 1).any():
        raise FormatError(f"population '{name}' has a threshold below 1")
    # What an emitting potential is compared with, or grows to.
    times = {"bse": 2 ** (steps - 1), "rate": 2 * steps, "ttfs": steps - 1, "css": 2}.get(code, 1)
    if int(threshold.max()) * times > STATE_LIMIT:
        raise FormatError(f"population '{name}' has a threshold of {threshold.max()}: {STATE_BITS} bits are there")


def _check_payload(name: str, payload: Any, steps: int) -> None:
    whole = isinstance(payload, list) and all(isinstance(each, int) and 0 <= each <= PAYLOAD_LIMIT for each in payload)
    if not whole or len(payload) != steps:
        raise FormatError(f"payload of '{name}' is {payload!r}: T whole numbers up to {PAYLOAD_LIMIT} are needed")


def _check_integers(bundle: Bundle, population: Mapping[str, Any], key: str) -> None:
    name = population["name"]
    array = _tensor(bundle, name, population[key], np.int32)
    if np.abs(array.astype(np.int64)).max(initial=0) > STATE_LIMIT:
        raise FormatError(f"'{key}' of population '{name}' holds {_largest(array)}: {STATE_BITS} bits are there")
    by_step = (bundle.code == "phase" and key in ("threshold", "reset")) or (bundle.code == "css" and key == "ceiling")
    _fits(population, key, array.shape, (bundle.steps,) if by_step else ())


def _fits(population: Mapping[str, Any], key: str, given: tuple[int, ...], ahead: tuple[int, ...]) -> None:
    """Refuse a parameter that does not broadcast against the population's shape, behind dimensions of its own."""
    shape = tuple(population["shape"])
    try:
        whole = np.broadcast_shapes(given[len(ahead) :], shape) == shape
    except ValueError:
        whole = False
    if not whole or given[: len(ahead)] != ahead:
        wanted = [*ahead, *shape]
        raise FormatError(f"'{key}' of population '{population['name']}' has shape {list(given)} for {wanted}")


def _check_op(bundle: Bundle, name: str, op: Mapping[str, Any], given: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that an operation gives."""
    kind = op["op"]
    if kind not in _OPS:
        raise FormatError(f"population '{name}' has an edge of operation {kind!r}: one of {', '.join(_OPS)} is needed")
    for key in _OPS[kind]:
        if key not in op:
            raise FormatError(f"operation '{kind}' of population '{name}' lacks {key}")
        if not _is_setting(key, op[key], given):
            raise FormatError(f"operation '{kind}' of population '{name}' has {key}={op[key]!r} for {list(given)}")
    if "weight" in op:
        weight = _tensor(bundle, name, op["weight"], np.int8)
        if weight.size and int(weight.min()) < -WEIGHT_LIMIT:
            raise FormatError(f"weights '{op['weight']}' of population '{name}' hold -128: -127 to 127 is needed")
    if kind == "gather":
        index = _tensor(bundle, name, op["index"], np.int32)
        if index.min(initial=0) < 0 or index.max(initial=0) > math.prod(given):
            raise FormatError(f"an index of population '{name}' points outside of its source")
    shape = shape_after(op, given, bundle.tensors)
    if not _is_size(shape):
        raise FormatError(f"operation '{kind}' of population '{name}' gives {list(shape)}: more than {MOST} values")
    return shape


def _is_setting(key: str, value: Any, given: tuple[int, ...]) -> bool:
    """Whether an operation may have a setting, on something of a shape."""
    if key in ("weight", "index"):
        return isinstance(value, str)
    if key == "groups":
        return _is_whole(value, 1, given[0])
    if key == "shape":
        return isinstance(value, list) and _is_size(value)
    least = 0 if key == "padding" else 1
    sized = isinstance(value, list) and len(value) == len(given) - 1
    return sized and all(_is_whole(each, least, 4096) for each in value)


def shape_after(op: Mapping[str, Any], given: tuple[int, ...], tensors: Mapping[str, NDArray[Any]]) -> tuple[int, ...]:
    """Shape of what a linear operation makes of something of a shape. Raises FormatError where it does not fit."""
    kind = op["op"]
    weight = tensors[op["weight"]] if "weight" in op else np.zeros(())
    fits = True
    shape: tuple[int, ...] = given
    if kind == "linear":
        fits, shape = given == weight.shape[1:], weight.shape[:1]
    elif kind == "scale":
        fits = weight.ndim == 1 and weight.shape[0] in (1, given[0])
    elif kind in ("reshape", "gather"):
        shape = tuple(op["shape"])
        fits = math.prod(shape) == (math.prod(given) if kind == "reshape" else tensors[op["index"]].size)
    else:
        kernel = weight.shape[2:] if kind == "conv" else tuple(op["kernel"])
        dilation = op["dilation"] if kind == "conv" else [1] * len(kernel)
        sizes = [
            (size + 2 * pad - wide * (each - 1) - 1) // stride + 1
            for size, each, stride, pad, wide in zip(
                given[1:], kernel, op["stride"], op["padding"], dilation, strict=False
            )
        ]
        fits = len(given) == len(kernel) + 1 and min(sizes, default=0) > 0
        if kind == "conv":
            groups = op["groups"]
            fits = fits and groups > 0 and given[0] == weight.shape[1] * groups and weight.shape[0] % groups == 0
        shape = (weight.shape[0] if kind == "conv" else given[0], *sizes)
    if not fits:
        raise FormatError(f"operation '{kind}' does not fit what it is given, {list(given)}")
    return shape


def _check_golden(bundle: Bundle) -> None:
    samples = set()
    for population in bundle.populations:
        name, shape, readout = population["name"], tuple(population["shape"]), population["kind"] == "readout"
        if f"golden.{name}" not in bundle.tensors:
            continue
        array = bundle.golden(name)
        wanted = (*array.shape[:1], *shape) if readout else (bundle.steps, *array.shape[1:2], *shape)
        if array.shape != wanted or array.dtype != (np.int32 if readout else np.int8):
            raise FormatError(f"golden spikes of '{name}' are {array.dtype} {list(array.shape)}")
        if not readout and np.abs(array.astype(np.int16)).max(initial=0) > 1:
            raise FormatError(f"golden spikes of '{name}' are -1, 0 or 1, not {_largest(array)}")
        samples.add(array.shape[0 if readout else 1])
    if len(samples) > 1:
        raise FormatError(f"golden spikes are of {sorted(samples)} samples: as many of every population are needed")


def _tensor(bundle: Bundle, population: str, key: Any, dtype: Any) -> NDArray[Any]:
    array = bundle.tensors.get(key) if isinstance(key, str) else None
    if array is None:
        raise FormatError(f"population '{population}' names a tensor {key!r} that is not there")
    if array.dtype != dtype:
        raise FormatError(f"tensor '{key}' of population '{population}' is {array.dtype}, not {np.dtype(dtype)}")
    return array


def _largest(array: NDArray[Any]) -> int:
    return int(array.flat[int(np.abs(array.astype(np.int64)).argmax())])
