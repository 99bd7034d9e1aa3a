"""The file of an integer network: one safetensors file, whose metadata holds the graph and a digest of everything."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from spikeplug_lava_runtime.check import check
from spikeplug_lava_runtime.format import FORMAT, SPEC, Bundle, FormatError


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
            if spec < 1:
                raise FormatError(f"it has version {spec} of the format, which there is not")
            if spec > SPEC:
                raise FormatError(f"it has version {spec} of the format, this release reads up to {SPEC}: upgrade it")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        if metadata.get("sha256") != _digest(metadata["graph"], tensors):
            raise FormatError("it was changed or damaged: its SHA-256 is not the one that it states")
        bundle = Bundle(graph, tensors)
        check(bundle)
    return bundle


_DAMAGED = (SafetensorError, LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError)


@contextlib.contextmanager
def _one_reason(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None
    except (
        SafetensorError,
        LookupError,
        TypeError,
        AttributeError,
        ValueError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise FormatError(f"{path}: it is damaged: {type(error).__name__}: {error}") from None


def _digest(graph: str, tensors: Mapping[str, NDArray[Any]]) -> str:
    """SHA-256 of the graph's text, then of every tensor in the order of names: name, dtype, shape, bytes."""
    whole = hashlib.sha256(graph.encode())
    for name in sorted(tensors):
        array = tensors[name]
        whole.update(f"{name} {array.dtype.str} {list(array.shape)}\n".encode())
        whole.update(np.ascontiguousarray(array).tobytes())
    return whole.hexdigest()
