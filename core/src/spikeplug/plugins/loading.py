"""Finds the installed plugins, keeps broken ones from breaking the rest, and looks their parts up by name.

Loading is ours and not `pluggy.load_setuptools_entrypoints`, which lets one bad plugin end the host: here a plugin
that raises, exits, lacks a dependency or has a wrong hook is listed as broken with the reason. What runs inside
this process cannot be stopped from ending it (`os._exit`, a crash in C) or from hanging; `probe` imports each plugin
in a process of its own with a time limit, and SPIKEPLUG_DISABLE=name,name leaves plugins out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.metadata
import inspect
import os
import subprocess
import sys
import time
import typing
import warnings
from typing import Any

import pluggy

from spikeplug.errors import OptionError, PluginError, UnknownNameError, listed, nearest

from . import builtin, hookspecs
from .hookspecs import API_VERSION, PROJECT

KINDS = {
    "encoder": "spikeplug_encoders",
    "neuron": "spikeplug_neurons",
    "approximator": "spikeplug_approximators",
    "operation": "spikeplug_operations",
    "pass": "spikeplug_passes",
    "trainer": "spikeplug_trainers",
    "exporter": "spikeplug_exporters",
    "framework": "spikeplug_frameworks",
    "recipe": "spikeplug_recipes",
    "architecture": "spikeplug_architectures",
    "command": "spikeplug_commands",
    "engine": "spikeplug_engines",
}
"""Kind of part, as the CLI and the messages call it, and the hook that brings it."""

CHOOSER = "spikeplug_architecture_of"
"""The hook that names the architecture of a model, and brings no part."""

FIRST_PARTY = {
    ("encoder", "bse"): "spike-plugin-bse",
    ("neuron", "bse-if"): "spike-plugin-bse",
    ("neuron", "asnc-if"): "spike-plugin-bse",
    ("approximator", "asnc"): "spike-plugin-bse",
    ("trainer", "ste"): "spike-plugin-bse",
    ("recipe", "bse"): "spike-plugin-bse",
    ("recipe", "laser"): "spike-plugin-bse",
    ("encoder", "phase"): "spike-plugin-phase",
    ("neuron", "phase-if"): "spike-plugin-phase",
    ("trainer", "mgpc"): "spike-plugin-phase",
    **{
        ("recipe", name): "spike-plugin-phase"
        for name in ("las", "base2-round", "phase", "mgpc", "single-spike", "two-spike")
    },
    ("encoder", "ttfs"): "spike-plugin-ttfs",
    ("encoder", "ttfs-continuous"): "spike-plugin-ttfs",
    ("neuron", "ttfs-if"): "spike-plugin-ttfs",
    ("approximator", "ttfs-kernels"): "spike-plugin-ttfs",
    **{("recipe", name): "spike-plugin-ttfs" for name in ("ttfs", "qc-a2s", "ttfs-continuous")},
    ("command", "explain"): "spike-plugin-ttfs",
    ("exporter", "lava"): "spikeplug-lava",
    ("exporter", "nir"): "spikeplug-lava",
    ("architecture", "transformers"): "spikeplug-transformers",
    ("pass", "rotate"): "spikeplug-transformers",
    ("pass", "prefix"): "spikeplug-transformers",
    ("pass", "quantize-weights"): "spikeplug-transformers",
    ("pass", "defer-softmax"): "spikeplug-transformers",
    ("command", "demo"): "spikeplug-transformers",
    ("encoder", "css"): "spike-plugin-css",
    **{("neuron", name): "spike-plugin-css" for name in ("tsa", "tsa-relu")},
    ("trainer", "css-adjust"): "spike-plugin-css",
    **{("recipe", name): "spike-plugin-css" for name in ("css", "css-q")},
    ("framework", "spikingjelly"): "spikeplug-spikingjelly",
    ("framework", "snntorch"): "spikeplug-snntorch",
    ("architecture", "vision"): "spikeplug-vision",
    ("command", "diagnose"): "spikeplug-vision",
    ("command", "bench"): "spikeplug-bench",
    **{("engine", name): "spikeplug-bench" for name in ("local", "processes", "ray", "slurm")},
}
"""What a distribution of this project would bring; an unknown-name error turns it into a pip line."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One thing a plugin brings: its kind, its name, its import path `module:object`, and whose it is."""

    kind: str
    name: str
    path: str
    plugin: str

    def load(self) -> Any:
        """Import and return the object.

        Raises:
            PluginError: the module cannot be imported, or has no such object, or one that is no such part.
        """
        module, _, attribute = self.path.partition(":")
        try:
            # What a module prints at import is no result of ours.
            with contextlib.redirect_stdout(sys.stderr):
                found = getattr(importlib.import_module(module), attribute)
        except (Exception, SystemExit) as error:
            raise PluginError(
                f"{self.kind} '{self.name}' of plugin '{self.plugin}' cannot be imported from '{self.path}': "
                f"{_reason(error)}"
            ) from error
        wrong = _misfit(self.kind, found)
        if wrong:
            raise PluginError(f"{self.kind} '{self.name}' of plugin '{self.plugin}': '{self.path}' is {wrong}")
        return found


def _misfit(kind: str, found: object) -> str | None:
    """What is wrong with an object as a part of that kind, or None."""
    if kind == "command":
        return None if callable(found) else f"{found!r}, which cannot be called"
    if kind == "recipe":
        from spikeplug.coding.types import Recipe

        return None if isinstance(found, Recipe) else f"{found!r}, no Recipe"
    if kind == "operation":
        from spikeplug.graph.operations import Kind

        return None if isinstance(found, Kind) or callable(found) else f"{found!r}, no Kind and no function of a node"
    if not isinstance(found, type):
        return f"{found!r}, no class"
    if kind not in ("encoder", "neuron", "architecture"):
        return None
    home = "spikeplug.conversion.architecture" if kind == "architecture" else "spikeplug.coding.types"
    base = getattr(importlib.import_module(home), kind.capitalize())
    return None if issubclass(found, base) else f"a class that is no {base.__name__}"


@dataclasses.dataclass(frozen=True)
class PluginInfo:
    """What is known of one plugin: where it comes from, what it brings, and what is wrong with it, if anything."""

    name: str
    dist: str
    version: str
    api: int | None
    parts: tuple[Part, ...]
    broken: str | None
    import_ms: float

    @property
    def hooks(self) -> list[str]:
        """Kinds of part that the plugin brings."""
        return sorted({part.kind for part in self.parts})


@dataclasses.dataclass(frozen=True)
class Registry:
    """Every plugin found, sound or broken."""

    plugins: tuple[PluginInfo, ...]
    manager: pluggy.PluginManager

    @functools.cached_property
    def parts(self) -> dict[tuple[str, str], list[Part]]:
        """(kind, name) -> the parts that claim it; more than one is an error at the look-up."""
        found: dict[tuple[str, str], list[Part]] = {}
        for plugin in self.plugins:
            for part in plugin.parts:
                found.setdefault((part.kind, part.name), []).append(part)
        return found

    def names(self, kind: str) -> list[str]:
        """Sorted names of all parts of a kind.

        Raises:
            OptionError: there is no such kind.
        """
        if kind not in KINDS:
            raise OptionError(f"unknown kind of part '{kind}'{nearest(kind, KINDS)} kinds: {listed(KINDS)}")
        return sorted(name for found, name in self.parts if found == kind)

    def find(self, kind: str, name: str) -> Part:
        """The one part of that kind and name.

        Raises:
            UnknownNameError: none has the name; the message says the installed names, the nearest and the pip line.
            PluginError: two plugins claim the name.
        """
        known = self.names(kind)
        claims = self.parts.get((kind, name), [])
        if len(claims) > 1:
            owners = " and ".join(f"plugin '{part.plugin}' ({part.path})" for part in claims)
            raise PluginError(f"{kind} '{name}' is claimed by {owners}: uninstall one, or set SPIKEPLUG_DISABLE to it")
        if claims:
            return claims[0]
        raise UnknownNameError(self._unknown(kind, name, known))

    def _unknown(self, kind: str, name: str, known: list[str]) -> str:
        text = f"unknown {kind} '{name}'{nearest(name, known)} Installed: {listed(known)}."
        dist = FIRST_PARTY.get((kind, name))
        if dist and dist not in {plugin.dist for plugin in self.plugins}:
            text += f" To get it: pip install {dist}."
        broken = [plugin.name for plugin in self.plugins if plugin.broken]
        return text + (f" Broken plugins, see `spikeplug plugins`: {listed(broken)}." if broken else "")


@functools.cache
def registry() -> Registry:
    """The plugins of this process, found once. `registry.cache_clear()` makes the next call look again."""
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    core = importlib.metadata.version("spikeplug")
    found = [_load(manager, "core", "spikeplug", core, lambda: builtin)]
    disabled = {name.strip() for name in os.environ.get("SPIKEPLUG_DISABLE", "").split(",") if name.strip()}
    for point in sorted(importlib.metadata.entry_points(group=PROJECT), key=lambda point: point.name):
        if point.name in disabled:
            continue
        dist = point.dist
        name, version = (dist.name, dist.version) if dist else ("?", "?")
        found.append(_load(manager, point.name, name, version, point.load))
    return Registry(tuple(found), manager)


def architecture_name(model: Any) -> str | None:
    """The architecture that a plugin names for a dense model; None: no plugin claims it."""
    name: str | None = registry().manager.hook.spikeplug_architecture_of(model=model)
    return name


def get_class(kind: str, name: str) -> Any:
    """The class, instance or function registered under a name, imported but not called."""
    return registry().find(kind, name).load()


def _instance(kind: str, name: str, options: dict[str, Any]) -> Any:
    cls = get_class(kind, name)
    known = {field.name for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
    for option in options:
        if option not in known:
            raise OptionError(
                f"unknown option '{option}' of {kind} '{name}'{nearest(option, known)} Options: {listed(known)}."
            )
    hints = typing.get_type_hints(cls)
    return cls(**{option: _checked(option, value, hints[option]) for option, value in options.items()})


def _checked(option: str, value: object, wanted: Any) -> Any:
    """The value of an option if it has the wanted type; JSON's lists stand for tuples."""
    from pydantic import TypeAdapter, ValidationError  # as heavy as the rest of this module, and seldom needed

    try:
        return TypeAdapter(wanted).validate_python(tuple(value) if isinstance(value, list) else value, strict=True)
    except ValidationError as error:
        raise OptionError(f"{option}={value!r}: {error.errors()[0]['msg']}") from None


def get_encoder(name: str, **options: Any) -> Any:
    """A built encoder: `get_encoder("bse", steps=8)`.

    Raises:
        UnknownNameError: no encoder of that name is installed.
        OptionError: an option is unknown or out of range.
    """
    return _instance("encoder", name, options)


def get_neuron(name: str, **options: Any) -> Any:
    """A built neuron: `get_neuron("if", threshold=8)`. Raises as `get_encoder`."""
    return _instance("neuron", name, options)


def get_approximator(name: str, **options: Any) -> Any:
    """A built approximator: `get_approximator("exact")`. Raises as `get_encoder`."""
    return _instance("approximator", name, options)


def get_pass(name: str, **options: Any) -> Any:
    """A built pass: `get_pass("rotate")`. Raises as `get_encoder`."""
    return _instance("pass", name, options)


def get_trainer(name: str, **options: Any) -> Any:
    """A built trainer: `get_trainer("ste", steps=100)`. Raises as `get_encoder`."""
    return _instance("trainer", name, options)


def get_exporter(name: str, **options: Any) -> Any:
    """A built exporter: `get_exporter("lava", golden=8)`. Raises as `get_encoder`."""
    return _instance("exporter", name, options)


def get_recipe(name: str) -> Any:
    """The recipe of that name. Raises UnknownNameError."""
    return get_class("recipe", name)


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}" if str(error) else type(error).__name__


def _load(manager: pluggy.PluginManager, name: str, dist: str, version: str, load: Any) -> PluginInfo:
    start = time.perf_counter()
    api: int | None = None
    parts: tuple[Part, ...] = ()
    broken: str | None = None
    try:
        with contextlib.redirect_stdout(sys.stderr):
            plugin = load()
        api = getattr(plugin, "spikeplug_api", None)
        parts = _parts(manager, name, plugin, api)
    # SystemExit is no Exception, and a plugin that exits at import must not take the host with it.
    except (Exception, SystemExit) as error:
        broken = str(error) if isinstance(error, PluginError) else _reason(error)
    return PluginInfo(name, dist, version, api, parts, broken, 1e3 * (time.perf_counter() - start))


def _parts(manager: pluggy.PluginManager, name: str, plugin: object, api: int | None) -> tuple[Part, ...]:
    """Check the plugin's API version and hooks, and ask every hook what it brings."""
    if api != API_VERSION:
        stated = "states no `spikeplug_api`" if api is None else f"was written for API {api}"
        raise PluginError(f"plugin {stated}, this spikeplug has API {API_VERSION}: install a matching release")
    hooks = {*KINDS.values(), CHOOSER}
    for attribute in dir(plugin):
        implements = getattr(getattr(plugin, attribute, None), f"{PROJECT}_impl", None) is not None
        if implements and attribute not in hooks:
            raise PluginError(f"unknown hook '{attribute}'{nearest(attribute, hooks)} hooks: {listed(hooks)}")
    with warnings.catch_warnings():
        warnings.simplefilter("error", pluggy.PluggyWarning)
        manager.register(plugin, name)
    try:
        return tuple(part for kind, hook in KINDS.items() for part in _ask(name, plugin, kind, hook))
    except (Exception, SystemExit):
        manager.unregister(plugin)
        raise


def _ask(plugin_name: str, plugin: object, kind: str, hook: str) -> list[Part]:
    function = getattr(plugin, hook, None)
    if function is None or getattr(function, f"{PROJECT}_impl", None) is None:
        return []
    if inspect.signature(function).parameters:
        raise PluginError(f"hook '{hook}' takes no argument")
    brought = function()
    if not isinstance(brought, dict) or not all(
        isinstance(key, str) and isinstance(value, str) and value.count(":") == 1 for key, value in brought.items()
    ):
        raise PluginError(f"hook '{hook}' must return a dict of name to 'module:object', got {brought!r}")
    return [Part(kind, key, value, plugin_name) for key, value in brought.items()]


_PROBE = "import sys; from spikeplug.plugins import probe_here; sys.exit(probe_here(sys.argv[1]))"


def probe(plugin: PluginInfo, seconds: float = 120.0) -> str | None:
    """Import everything a plugin brings in a process of its own; return what went wrong, or None."""
    if plugin.broken:
        return plugin.broken
    command = [sys.executable, "-c", _PROBE, plugin.name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return f"not imported after {seconds:g} s"
    if done.returncode == 0:
        return None
    last = (done.stderr.strip() or "no message").splitlines()[-1]
    return f"exit status {done.returncode}: {last}"


def probe_here(name: str) -> int:
    """Import everything that the plugin of that name brings; the exit status of `probe`'s process."""
    for plugin in registry().plugins:
        if plugin.name == name:
            for part in plugin.parts:
                part.load()
            if plugin.broken:
                sys.stderr.write(plugin.broken)
            return int(plugin.broken is not None)
    sys.stderr.write(f"no plugin '{name}'")
    return 1
