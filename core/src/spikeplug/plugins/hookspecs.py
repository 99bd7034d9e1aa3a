"""The hooks: what a plugin may bring, and in which shape.

Every hook returns a mapping of name to import path (`{"bse": "spike_plugin_bse.encoder:BSE"}`), so that listing
and looking up names imports nothing heavy; the object is imported at its first use. A plugin is a module (or any
object) named by an entry point of the group `spikeplug`, with an attribute `spikeplug_api` that says which version
of these hooks it was written for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    import torch

PROJECT = "spikeplug"
"""Name of the pluggy project, of the entry-point group and of the hook prefix."""

API_VERSION = 1
"""Version of the hooks below; raised when a plugin written for the old ones would break."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def spikeplug_encoders() -> dict[str, str]:  # type: ignore[empty-body]
    """Codes: subclasses of `spikeplug.Encoder`, frozen dataclasses whose fields are their options."""


@hookspec
def spikeplug_neurons() -> dict[str, str]:  # type: ignore[empty-body]
    """Neurons: subclasses of `spikeplug.Neuron`, frozen dataclasses whose fields are their options."""


@hookspec
def spikeplug_approximators() -> dict[str, str]:  # type: ignore[empty-body]
    """Approximators of nonlinear operations: classes with `build(op, original, name)`, as `types.Approximator`."""


@hookspec
def spikeplug_passes() -> dict[str, str]:  # type: ignore[empty-body]
    """Rewrites before conversion that keep the function: classes with `apply(model)`, `spikeplug.coding.types.Pass`."""


@hookspec
def spikeplug_trainers() -> dict[str, str]:  # type: ignore[empty-body]
    """Trainers of a converted model: classes with one verb, as `spikeplug.coding.types.Trainer`."""


@hookspec
def spikeplug_exporters() -> dict[str, str]:  # type: ignore[empty-body]
    """Exporters of a converted model: classes with one verb, as `spikeplug.coding.types.Exporter`."""


@hookspec
def spikeplug_frameworks() -> dict[str, str]:  # type: ignore[empty-body]
    """Other spiking frameworks: classes with one verb, as `spikeplug.coding.types.Framework`."""


@hookspec
def spikeplug_recipes() -> dict[str, str]:  # type: ignore[empty-body]
    """Recipes: instances of `spikeplug.Recipe`, the named presets of `spikeplug.convert`."""


@hookspec
def spikeplug_operations() -> dict[str, str]:  # type: ignore[empty-body]
    """Operations of captured networks: PyTorch's name of an operation (`aten.relu.default`) to a rule.

    A rule is a `spikeplug.graph.operations.Kind`, which says how the operation acts on activations, or a function that
    gives one for an operation of the graph. Operations of `torch.library` are named as they are there
    (`mine.thing.default`).
    """


@hookspec
def spikeplug_architectures() -> dict[str, str]:  # type: ignore[empty-body]
    """Ways to convert, calibrate, save and load one kind of model: subclasses of `spikeplug.Architecture`."""


@hookspec(firstresult=True)
def spikeplug_architecture_of(model: torch.nn.Module) -> str | None:
    """The name of the architecture of one's own that handles a dense model, or None.

    It is asked for every model that is converted, so it must be quick and import nothing heavy. What nobody claims is
    captured as a graph.
    """


@hookspec
def spikeplug_commands() -> dict[str, str]:  # type: ignore[empty-body]
    """Commands of the CLI: a function, which becomes `spikeplug NAME`, or a `typer.Typer`, which becomes a group."""


@hookspec
def spikeplug_engines() -> dict[str, str]:  # type: ignore[empty-body]
    """Where cells of the benchmark runner are run: subclasses of `spikeplug_bench.engines.Engine`."""
