"""The file of an integer network: one safetensors file, whose metadata holds the graph and a digest of everything."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

FORMAT = "spikeplug-integer-network"
SPEC = 1
"""Version of the format that this release reads and writes."""

CODES = ("css", "bse", "phase", "ttfs", "rate")
WEIGHT_LIMIT = 127
STATE_BITS = 24
STATE_LIMIT = 2 ** (STATE_BITS - 1) - 1
"""Largest magnitude of a state, a bias or a threshold."""

PAYLOAD_LIMIT = 2**15

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


class FormatError(ValueError):
    """A file is no integer network of a version that this release reads, or it was changed; the message says which."""


@dataclass
class Bundle:
    """An integer network.

    Attributes:
        graph: see "Integer networks" in the documentation.
        tensors: what the graph names: int8 weights, int32 biases, thresholds, tables and indices, float32 scales of
            the readout; and `golden.NAME`, int8 spikes `[T, samples, ...]` of every population, and what the readout
            holds, int32.
    """

    graph: dict[str, Any]
    tensors: dict[str, NDArray[Any]] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """T, steps of a window."""
        return int(self.graph["steps"])

    @property
    def code(self) -> str:
        """The code of all populations, one of `CODES`."""
        return str(self.graph["code"])

    @property
    def populations(self) -> list[dict[str, Any]]:
        """Populations in order: every one comes after those whose spikes it receives."""
        found: list[dict[str, Any]] = self.graph["populations"]
        return found

    def payload(self, population: str) -> list[int] | None:
        """What spikes of every step of a population carry; None: they are 1 or -1."""
        found: list[int] | None = next(each for each in self.populations if each["name"] == population).get("payload")
        return found

    def tensor(self, name: str | None) -> NDArray[Any]:
        """A tensor by name; 0 where there is none."""
        return np.zeros((), np.int32) if name is None else self.tensors[name]

    def golden(self, population: str) -> NDArray[Any]:
        """Spikes `[T, samples, ...]` that were recorded of a population; of the readout, its states."""
        return self.tensors[f"golden.{population}"]

    @property
    def samples(self) -> int:
        """Samples with golden spikes."""
        return int(self.golden(self.populations[0]["name"]).shape[1])


def save(bundle: Bundle, path: str | os.PathLike[str]) -> None:
    """Write a network, whole or not at all.

    Raises:
        FormatError: it does not keep the format's rules.
        OSError: the file cannot be written.
    """
    check(bundle)
    graph = json.dumps(bundle.graph, sort_keys=True, separators=(",", ":"), allow_nan=False)
    arrays = {name: np.ascontiguousarray(array) for name, array in bundle.tensors.items()}
    metadata = {"format": FORMAT, "graph": graph, "sha256": _digest(graph, arrays)}
    write_file(Path(path), to_bytes(arrays, metadata=metadata))


def write_file(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all. Raises OSError."""
    target = path.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the last move stays within one file system and is atomic.
    handle, draft = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(draft, 0o666 & ~mask)
        os.replace(draft, target)
    finally:
        Path(draft).unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> Bundle:
    """Read a network.

    Raises:
        FormatError: the file is none, is of a newer version, was changed, or does not keep the rules.
        OSError: it cannot be read.
    """
    Path(path).open("rb").close()  # an OSError that says why
    with _one_reason(path):
        with safe_open(str(path), "numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise FormatError("it is no integer network of Spikeplug")
            graph = json.loads(metadata["graph"])
            spec = graph.get("spec")
            if not isinstance(spec, int) or isinstance(spec, bool):
                raise FormatError("it does not say which version of the format it has")
            if spec > SPEC:
                raise FormatError(f"it has version {spec} of the format, this release reads up to {SPEC}: upgrade it")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        if metadata.get("sha256") != _digest(metadata["graph"], tensors):
            raise FormatError("it was changed or damaged: its SHA-256 is not the one that it states")
        bundle = Bundle(graph, tensors)
        check(bundle)
    return bundle


@contextlib.contextmanager
def _one_reason(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None
    except (SafetensorError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise FormatError(f"{path}: it is damaged: {type(error).__name__}: {error}") from None


def _digest(graph: str, tensors: Mapping[str, NDArray[Any]]) -> str:
    """SHA-256 of the graph's text, then of every tensor in the order of names: name, dtype, shape, bytes."""
    whole = hashlib.sha256(graph.encode())
    for name in sorted(tensors):
        array = tensors[name]
        whole.update(f"{name} {array.dtype.str} {list(array.shape)}\n".encode())
        whole.update(np.ascontiguousarray(array).tobytes())
    return whole.hexdigest()


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
        shape = tuple(population["shape"])
        for edge in population["edges"]:
            if edge["from"] not in shapes:
                raise FormatError(f"population '{name}' receives from '{edge['from']}', which does not come before it")
            given = shapes[edge["from"]]
            for op in edge["ops"]:
                given = _check_op(bundle, name, op, given)
            if given != shape:
                raise FormatError(f"an edge of '{name}' gives {list(given)}, {list(shape)} is needed")
        shapes[name] = shape
        if f"golden.{name}" in bundle.tensors:
            _check_golden(bundle, population, shape)
    if not bundle.populations or bundle.populations[-1]["kind"] != "readout":
        raise FormatError("the last population must be a readout")


def _check_head(graph: Mapping[str, Any]) -> None:
    if graph["code"] not in CODES:
        raise FormatError(f"code '{graph['code']}': one of {', '.join(CODES)} is needed")
    _whole(graph, "steps", 1, 4096)
    if graph["code"] == "css":
        if graph.get("beta") not in ("3/2", "2"):
            raise FormatError(f"beta={graph.get('beta')!r}: '3/2' or '2' is needed")
        _whole(graph, "silent", 0, 16)


def _whole(found: Mapping[str, Any], key: str, least: int, most: int) -> None:
    value = found.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise FormatError(f"{key}={value!r}: a whole number from {least} to {most} is needed")


def _check_kind(population: Mapping[str, Any], first: bool, last: bool) -> None:
    """Its place in the order, its kind and its shape."""
    name, kind = population["name"], population["kind"]
    kinds = ("input",) if first else ("neurons", "readout")
    if kind not in kinds:
        raise FormatError(f"population '{name}' is of kind {kind!r}: {' or '.join(kinds)} is needed")
    if kind == "readout" and not last:
        raise FormatError(f"population '{name}' is a readout, which comes last")
    shape = population["shape"]
    if not shape or not all(isinstance(size, int) and 0 < size < 2**24 for size in shape):
        raise FormatError(f"population '{name}' has shape {shape!r}: positive sizes are needed")


def _check_params(bundle: Bundle, population: Mapping[str, Any]) -> None:
    name, kind, code = population["name"], population["kind"], bundle.code
    if code == "phase" and kind != "readout":
        _check_payload(name, population.get("payload"), bundle.steps)
    if kind == "input":
        return
    if code == "css":
        _whole(population, "fraction", 0, 16)
    keys = ["bias"] if population.get("bias") is not None else []
    if kind == "neurons":
        keys += [*_TENSORS[code], *(["ceiling"] if code == "css" and population.get("ceiling") is not None else [])]
    for key in keys:
        _check_integers(bundle, name, population[key], tuple(population["shape"]))
    if kind == "readout":
        _tensor(bundle, name, population["scale"], np.float32)
    elif (_tensor(bundle, name, population["threshold"], np.int32) < 1).any():
        raise FormatError(f"population '{name}' has a threshold below 1")


def _check_payload(name: str, payload: Any, steps: int) -> None:
    whole = isinstance(payload, list) and all(isinstance(each, int) and 0 <= each <= PAYLOAD_LIMIT for each in payload)
    if not whole or len(payload) != steps:
        raise FormatError(f"payload of '{name}' is {payload!r}: T whole numbers up to {PAYLOAD_LIMIT} are needed")


def _check_integers(bundle: Bundle, name: str, key: Any, shape: tuple[int, ...]) -> None:
    array = _tensor(bundle, name, key, np.int32)
    if np.abs(array.astype(np.int64)).max(initial=0) > STATE_LIMIT:
        raise FormatError(f"'{key}' of population '{name}' holds {_largest(array)}: {STATE_BITS} bits are there")
    try:
        fits = np.broadcast_shapes(array.shape[-len(shape) :], shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise FormatError(f"'{key}' of population '{name}' has shape {list(array.shape)} for {list(shape)}")


def _check_op(bundle: Bundle, name: str, op: Mapping[str, Any], given: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that an operation gives."""
    kind = op["op"]
    if kind not in _OPS:
        raise FormatError(f"population '{name}' has an edge of operation {kind!r}: one of {', '.join(_OPS)} is needed")
    missing = [key for key in _OPS[kind] if key not in op]
    if missing:
        raise FormatError(f"operation '{kind}' of population '{name}' lacks {missing[0]}")
    if "weight" in op:
        weight = _tensor(bundle, name, op["weight"], np.int8)
        if weight.size and int(weight.min()) < -WEIGHT_LIMIT:
            raise FormatError(f"weights '{op['weight']}' of population '{name}' hold -128: -127 to 127 is needed")
    shape = shape_after(op, given, bundle.tensors)
    if kind == "gather":
        index = _tensor(bundle, name, op["index"], np.int32)
        if index.min(initial=0) < 0 or index.max(initial=0) > math.prod(given):
            raise FormatError(f"an index of population '{name}' points outside of its source")
    return shape


def shape_after(op: Mapping[str, Any], given: tuple[int, ...], tensors: Mapping[str, NDArray[Any]]) -> tuple[int, ...]:
    """Shape of what a linear operation makes of something of a shape. Raises FormatError where it does not fit."""
    kind = op["op"]
    weight = tensors[op["weight"]] if "weight" in op else np.zeros(())
    fits = True
    shape: tuple[int, ...] = given
    if kind == "linear":
        fits, shape = given[-1:] == weight.shape[1:], (*given[:-1], weight.shape[0])
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
                given[1:], kernel, op["stride"], op["padding"], dilation, strict=True
            )
        ]
        fits = len(given) == len(kernel) + 1 and min(sizes, default=0) > 0 and min(op["stride"]) > 0
        if kind == "conv":
            groups = op["groups"]
            fits = fits and groups > 0 and given[0] == weight.shape[1] * groups and weight.shape[0] % groups == 0
        shape = (weight.shape[0] if kind == "conv" else given[0], *sizes)
    if not fits:
        raise FormatError(f"operation '{kind}' does not fit what it is given, {list(given)}")
    return shape


def _check_golden(bundle: Bundle, population: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    array = bundle.golden(population["name"])
    readout = population["kind"] == "readout"
    wanted = (*array.shape[:1], *shape) if readout else (bundle.steps, *array.shape[1:2], *shape)
    if array.shape != wanted or array.dtype != (np.int32 if readout else np.int8):
        raise FormatError(f"golden spikes of '{population['name']}' are {array.dtype} {list(array.shape)}")


def _tensor(bundle: Bundle, population: str, key: Any, dtype: Any) -> NDArray[Any]:
    array = bundle.tensors.get(key) if isinstance(key, str) else None
    if array is None:
        raise FormatError(f"population '{population}' names a tensor {key!r} that is not there")
    if array.dtype != dtype:
        raise FormatError(f"tensor '{key}' of population '{population}' is {array.dtype}, not {np.dtype(dtype)}")
    return array


def _largest(array: NDArray[Any]) -> int:
    return int(array.flat[int(np.abs(array.astype(np.int64)).argmax())])
