"""Exporter `nir`: an integer network as a NIR graph, whose neurons readers that do not know them refuse.

NIR's own neurons are binary and reset to a constant: none of them is one of ours, and a stand-in would run, and be
wrong, without a word. So neurons are nodes of a type of their own, `SpikeplugNeurons`; the linear graph is NIR's.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import nn

from spikeplug.conversion.architecture import Watch, unwatched
from spikeplug.errors import BundleError, ConversionError
from spikeplug.files import draft_of
from spikeplug_lava_runtime import Bundle, FormatError
from spikeplug_lava_runtime.check import check, shape_after
from spikeplug_lava_runtime.format import SPEC

from .exporter import Lava

DESCRIPTION = "spikeplug"
"""Key of the graph's metadata: the graph of the integer network as JSON, whose arrays are those of the nodes."""


@dataclasses.dataclass(frozen=True)
class NIR:
    """NIR graph (HDF5) of the integer network that the exporter `lava` writes, without golden spikes.

    Readers that do not know the node type `SpikeplugNeurons` raise; `read_nir` gives the network back.

    Args:
        fitted, fraction: as of the exporter `lava`.
    """

    fitted: int = 128
    fraction: int | None = None

    name: ClassVar[str] = "nir"

    def __post_init__(self) -> None:
        Lava(0, self.fitted, self.fraction)

    def export(
        self, model: nn.Module, path: str | Path, samples: Sequence[Any] = (), *, watch: Watch = unwatched
    ) -> dict[str, Any]:
        """Write the file and return the report. Raises as `Lava.export`; ConversionError where nir is not installed."""
        _nir()
        network, report = Lava(0, self.fitted, self.fraction).measured(model, samples, watch)
        write_nir(network.bundle, path)
        return report


def write_nir(bundle: Bundle, path: str | Path) -> None:
    """Write an integer network as a NIR graph, whole or not at all.

    Raises:
        ConversionError: the network does not keep to the format's rules, or the package nir is missing.
        BundleError: the file cannot be written.
    """
    nir, graph = _nir(), to_nir(bundle)
    try:
        with draft_of(Path(path)) as draft:
            nir.write(draft, graph)
    except OSError as error:
        raise BundleError(f"cannot write {path}: {error.strerror or error}") from error


def to_nir(bundle: Bundle) -> Any:
    """The `nir.NIRGraph` of an integer network. Raises as `write_nir`."""
    nir = _nir()
    try:
        check(bundle)
    except FormatError as error:
        raise ConversionError(f"cannot be exported: {error}") from error
    shapes = {each["name"]: tuple(each["shape"]) for each in bundle.populations}
    nodes: dict[str, Any] = {}
    for index, population in enumerate(bundle.populations):
        name, shape = population["name"], shapes[population["name"]]
        if index == 0:
            nodes[name] = nir.Input(input_type={"input": np.array(shape)})
        else:
            named = {key: value for key, value in population.items() if isinstance(value, str)}
            parameters = {key: bundle.tensors[value] for key, value in named.items() if value in bundle.tensors}
            nodes[name] = _types()[0](population["kind"], bundle.code, np.array(shape), parameters)
        for number, edge in enumerate(population["edges"]):
            given = shapes[edge["from"]]
            for place, op in enumerate(edge["ops"]):
                shape = shape_after(op, given, bundle.tensors)
                nodes[_node(name, number, place)] = _linear(nir, bundle, op, given, shape)
                given = shape
    nodes["output"] = nir.Output(output_type={"output": np.array(shapes[bundle.populations[-1]["name"]])})
    graph = {**bundle.graph, "input_tensors": _as_lists(bundle)}
    return nir.NIRGraph(nodes, _links(bundle.graph), metadata={DESCRIPTION: json.dumps(graph)}, type_check=False)


def read_nir(path: str | Path) -> Bundle:
    """The integer network that `write_nir` wrote.

    Raises:
        ConversionError: the file is no such graph, is of a newer version, or the package nir is missing.
        OSError: it cannot be read.
    """
    nir = _nir()
    import h5py

    Path(path).open("rb").close()  # an OSError that says why
    try:
        with h5py.File(path, "r") as file:
            bundle = from_nir(nir.serialization.hdf2dict(file["node"]))
        check(bundle)
    except (FormatError, KeyError, ValueError, TypeError, AttributeError, OSError) as error:
        reason = str(error) if isinstance(error, FormatError) else f"{type(error).__name__}: {error}"
        raise ConversionError(f"{path} is no NIR graph of Spikeplug that can be read: {reason}") from error
    return bundle


def from_nir(graph: Mapping[str, Any]) -> Bundle:
    """The integer network of a graph as `nir` holds it in a dictionary. Raises FormatError, KeyError and the like."""
    described = json.loads(graph["metadata"][DESCRIPTION])
    if described["spec"] > SPEC:
        raise FormatError(f"it has version {described['spec']} of the format, this release reads up to {SPEC}: upgrade")
    links = {(_text(source), _text(target)) for source, target in graph["edges"]}
    if links != set(_links(described)):
        raise FormatError("its edges are not those of its description")
    nodes = graph["nodes"]
    tensors = {
        name: np.array(values, dtype).reshape(shape)
        for name, (dtype, shape, values) in described.pop("input_tensors").items()
    }
    for population in described["populations"]:
        for key, array in nodes[population["name"]].get("parameters", {}).items():
            tensors[population[key]] = array
        for number, edge in enumerate(population["edges"]):
            for place, op in enumerate(edge["ops"]):
                node = nodes[_node(population["name"], number, place)]
                for key in ("weight", "index"):
                    if key in op:
                        tensors[op[key]] = node["scale"].reshape(-1) if op["op"] == "scale" else node[key]
    return Bundle(described, tensors)


def _node(population: str, edge: int, place: int) -> str:
    return f"{population}:{edge}:{place}"


def _links(graph: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Edges between nodes."""
    found: list[tuple[str, str]] = []
    for population in graph["populations"]:
        for number, edge in enumerate(population["edges"]):
            names = [_node(population["name"], number, place) for place in range(len(edge["ops"]))]
            path = [edge["from"], *names, population["name"]]
            found += itertools.pairwise(path)
    return [*found, (graph["populations"][-1]["name"], "output")]


def _linear(nir: Any, bundle: Bundle, op: Mapping[str, Any], given: tuple[int, ...], shape: tuple[int, ...]) -> Any:
    """An operation as a node of NIR, or of ours where NIR has none; weights stay int8."""
    kind = op["op"]
    weight = bundle.tensors[op["weight"]] if "weight" in op else np.zeros(0)
    if kind == "linear":
        return nir.Linear(weight)
    if kind == "scale":
        return nir.Scale(weight.reshape(-1, *[1] * (len(given) - 1)))
    if kind == "conv" and len(given) in (2, 3):
        make, dims = (nir.Conv1d, 1) if len(given) == 2 else (nir.Conv2d, 2)
        size = given[1] if dims == 1 else given[1:]
        settings = [op[key][0] if dims == 1 else tuple(op[key]) for key in ("stride", "padding", "dilation")]
        return make(size, weight, *settings, op["groups"], np.zeros(shape[0], np.int32))
    if kind == "sum_pool" and len(given) == 3:
        return nir.SumPool2d(*(np.array(op[key]) for key in ("kernel", "stride", "padding")))
    if kind == "reshape" and len(shape) == 1:
        return nir.Flatten({"input": np.array(given)}, start_dim=0, end_dim=-1)
    if kind in ("reshape", "gather"):
        numbers = np.arange(1, math.prod(given) + 1, dtype=np.int32).reshape(shape) if kind == "reshape" else None
        index = bundle.tensors[op["index"]] if numbers is None else numbers
        return _types()[1](index, np.array(given), np.array(shape))
    raise ConversionError(f"'{kind}' of {len(given) - 1} dimensions has no node in NIR")


def _as_lists(bundle: Bundle) -> dict[str, Any]:
    """What the input's code was calibrated to: a few small tensors."""
    return {
        name: (array.dtype.str, list(array.shape), array.reshape(-1).tolist())
        for name, array in bundle.tensors.items()
        if name.startswith("input.")
    }


@functools.cache
def _types() -> tuple[Any, Any]:
    """Node types of ours."""
    from nir.ir.node import NIRNode

    @dataclasses.dataclass(eq=False)
    class SpikeplugNeurons(NIRNode):  # type: ignore[misc]
        """Neurons of a population: `code` says their rule, parameters are those of the integer network's format."""

        kind: str
        code: str
        shape: Any
        parameters: dict[str, Any]

        def __post_init__(self) -> None:
            self.input_type, self.output_type = {"input": self.shape}, {"output": self.shape}

    @dataclasses.dataclass(eq=False)
    class SpikeplugGather(NIRNode):  # type: ignore[misc]
        """Moves values: places of the result `[...]` hold which value comes there, counted from 1; 0: a zero."""

        index: Any
        source: Any
        shape: Any

        def __post_init__(self) -> None:
            self.input_type, self.output_type = {"input": self.source}, {"output": self.shape}

    return SpikeplugNeurons, SpikeplugGather


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _nir() -> Any:
    try:
        import nir
        import nir.serialization
    except ImportError as error:
        raise ConversionError("export to nir needs a package: pip install 'spikeplug-lava[nir]'") from error
    return nir
