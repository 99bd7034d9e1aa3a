"""The main verbs: convert a model, calibrate it, choose its execution, report on it."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor, nn

from spikeplug import plugins
from spikeplug.coding.listeners import Observation, listening
from spikeplug.coding.site import EXECUTIONS, Coder, Execution, evaluating, in_mode, sites
from spikeplug.coding.statistics import ActivationStats, Observer
from spikeplug.coding.types import Recipe
from spikeplug.config import ConversionConfig
from spikeplug.errors import CalibrationError, ConversionError, OptionError
from spikeplug.graph.capture import unwrapped
from spikeplug.graph.streaming import StreamingSite

from .architecture import Architecture, Watch, unwatched
from .plan import Plan, refuse_nonfinite
from .record import Conversion, conversion_of, refuse_replaced
from .report import ConversionReport
from .statistics_file import load_statistics, save_statistics
from .verify import verify_conversion


def architecture_of(model: nn.Module) -> Architecture:
    """The architecture that handles this model, converted or dense.

    Raises:
        UnknownNameError: the plugin that handles it is not installed.
    """
    conversion = getattr(model, "conversion", None)
    if isinstance(conversion, Conversion):
        name: str | None = conversion.architecture
    else:
        model = unwrapped(model)
        name = plugins.architecture_name(model)
        causal = type(model).__module__.startswith("transformers.") and type(model).__name__.endswith("ForCausalLM")
        if name is None and causal:
            plugins.registry().find("architecture", "transformers")  # its plugin brings cache and generation
    architecture: Architecture = plugins.get_class("architecture", name or "network")()
    return architecture


def _chosen(model: nn.Module, config: ConversionConfig) -> Architecture:
    """The architecture by which a dense model is converted."""
    architecture = architecture_of(model)
    if config.structure == "layers" and architecture.target == "module":
        layers: Architecture = plugins.get_class("architecture", "layers")()
        return layers
    return architecture


def convert(
    model: nn.Module,
    recipe: str | Recipe | ConversionConfig,
    *,
    calibration: Iterable[Any] | None = None,
    example: Any = None,
    statistics: str | os.PathLike[str] | None = None,
    inplace: bool = False,
    verify: bool = True,
    watch: Watch = unwatched,
    **options: Any,
) -> nn.Module:
    """A spiking network made of a dense model, which stays as it is; tensors that no rewrite changes are shared.

    Args:
        model: any PyTorch network, or a language model whose plugin is installed.
        recipe: name of a recipe (`spikeplug ls recipes`), or a whole configuration.
        calibration: batches: each a tensor, a tuple of inputs (labels behind them are left out) or a dict.
        example: a batch to capture the network on, where there is no calibration; else its first batch.
        statistics: file of what the sites see in the calibration data: read where it exists, else written, so that
            other recipes for this model need no second pass over the data.
        inplace: change the given language model, for one that does not fit twice.
        verify: compare the result with the dense model, codes left out, and stepped layers with fused ones.
        watch: called with the stage, the batches or sites done and their number.
        options: options of the recipe's code (`steps=8`) or keys of ConversionConfig (`exclude=["head"]`).

    Raises:
        UnknownNameError, OptionError: the recipe or an option is unknown or out of range; the batches do not fit.
        CalibrationError: the code needs calibration and none was given; it failed; the file is of other ones.
        BundleError: the file cannot be read or written.
        NonFiniteError: a weight is NaN or infinite; the message names it.
        ConversionError: the model cannot be converted; the message names every part that stands against it.
    """
    config = ConversionConfig.resolve(recipe, options)
    _require_dense(model)
    architecture = _chosen(model, config)
    refuse_target(recipe, architecture)
    _refuse_unfit(calibration, config)
    batches = None if calibration is None else _Batches(calibration, keep=bool(config.passes) or statistics is not None)
    if example is None and batches is not None:
        example = batches.first()
    given = list(batches) if batches is not None and batches.kept else [] if example is None else [example]
    spiking = architecture.prepare(model, config, given, inplace=inplace)
    if batches is not None:
        fit(spiking, _seen(spiking, batches, statistics, watch), watch=watch)
    spiking = set_execution(spiking, config.execution)
    if verify and example is not None:
        keeping = all(getattr(each, "keeps_function", True) for each in config.build_passes())
        verify_conversion(model, spiking, example, architecture, changed=inplace or not keeping)
    return spiking


class _Batches:
    """Calibration batches of which the first is looked at ahead of the others."""

    def __init__(self, batches: Iterable[Any], keep: bool) -> None:
        # Batches that are read twice are kept: by passes, or to know them again.
        self.kept = keep or isinstance(batches, Sequence)
        self._of = batches if isinstance(batches, Sequence) else list(batches) if keep else batches
        self._iterator: Iterator[Any] | None = None
        self._ahead: list[Any] = []

    def first(self) -> Any:
        """The first batch. Raises CalibrationError: there is none."""
        if self.kept:
            known: Any = self._of
            if not len(known):
                raise CalibrationError("there is no calibration batch: give at least one")
            return known[0]
        self._iterator = iter(self._of)
        for batch in self._iterator:
            self._ahead = [batch]
            return batch
        raise CalibrationError("there is no calibration batch: give at least one")

    def __len__(self) -> int:
        return len(self._of) if isinstance(self._of, Sized) else 0

    def __iter__(self) -> Iterator[Any]:
        if self._iterator is None:
            return iter(self._of)
        ahead, rest = self._ahead, self._iterator
        self._iterator = None
        return itertools.chain(ahead, rest)


def plan(model: nn.Module, recipe: str | Recipe | ConversionConfig, example: Any = None, **options: Any) -> Plan:
    """What `convert` would make of a network, and everything that speaks against it; nothing is changed.

    Args:
        example: a batch, as of `convert`; language models need none.

    Raises:
        UnknownNameError, OptionError, NonFiniteError, CalibrationError: as `convert`.
        ConversionError: the network cannot be captured.
    """
    config = ConversionConfig.resolve(recipe, options)
    _require_dense(model)
    architecture = _chosen(model, config)
    refuse_target(recipe, architecture)
    return architecture.plan(model, config, [] if example is None else [example])


def _require_dense(model: nn.Module) -> None:
    """Raises ConversionError where a model is converted already, NonFiniteError where it is damaged."""
    if not isinstance(model, nn.Module):
        raise OptionError(f"a model of type {type(model).__name__}: a torch.nn.Module is needed")
    if isinstance(getattr(model, "conversion", None), Conversion):
        raise ConversionError(
            f"{type(model).__name__} is a converted model already: convert a dense one; spikeplug.calibrate calibrates "
            "this one anew"
        )
    part = next((name for name, each in model.named_modules() if isinstance(each, Coder)), None)
    if part is not None:
        raise ConversionError(f"'{part}' in {type(model).__name__} is a part of a converted model: convert a dense one")
    refuse_nonfinite(model)


def _seen(
    model: nn.Module, batches: Iterable[Any], path: str | os.PathLike[str] | None, watch: Watch
) -> dict[str, ActivationStats]:
    if path is None:
        return observe(model, batches, watch=watch)
    if os.path.exists(path):
        return load_statistics(path, model, batches)
    found = observe(model, batches, watch=watch)
    save_statistics(found, path, model, batches)
    return found


def refuse_target(recipe: str | Recipe | ConversionConfig, architecture: Architecture) -> None:
    """Raise ConversionError where a recipe is not meant for such models."""
    preset = plugins.get_recipe(recipe) if isinstance(recipe, str) else recipe
    if isinstance(preset, Recipe) and architecture.target not in preset.targets:
        raise ConversionError(
            f"recipe '{preset.name}' is meant for {', '.join(sorted(preset.targets))}, not for '{architecture.target}'"
        )


def prepare(model: nn.Module, config: ConversionConfig, batches: Sequence[Any] = ()) -> nn.Module:
    """A model with the spiking modules of a configuration in place, without calibrating them. Raises as `convert`.

    Args:
        batches: calibration data, for passes that look for something in it, the first as the example.
    """
    _require_dense(model)
    return _chosen(model, config).prepare(model, config, batches)


def calibrate(model: nn.Module, batches: Iterable[Any], *, watch: Watch = unwatched) -> nn.Module:
    """Run batches through a converted model with its sites as observers, then fit and store every site's parameters.

    Batches and `watch` are those of `convert`. Memory is bounded by `samples` values per site, however many batches
    there are. Nothing that is fitted to them is stored unless every site can be fitted.

    Raises:
        CalibrationError: no batch, a site that no batch reached, or statistics that a code cannot be fitted to.
        NonFiniteError: a site saw NaN or infinity; the message names it.
    """
    return fit(model, observe(model, batches, watch=watch), watch=watch)


def fit(model: nn.Module, statistics: Mapping[str, ActivationStats], *, watch: Watch = unwatched) -> nn.Module:
    """Fit and store every site's parameters to statistics that `observe` gave, of this model or one with such sites.

    Raises:
        CalibrationError: a site has no statistics, or some that its code cannot be fitted to.
    """
    _fit_domains(model)
    waiting = {name: site for name, site in sites(model).items() if site.static and site.observes}
    for name in waiting:
        if name not in statistics:
            raise CalibrationError(f"there are no statistics of site '{name}': observe a model that has it")
    for name, params in _fit(waiting, statistics, watch).items():
        waiting[name].set_params(params)
    return model


def _fit_domains(model: nn.Module) -> None:
    for site in sites(model).values():
        if site.static and not site.observes and not site.calibrated:
            site.set_params({name: tensor.to(_device(model)) for name, tensor in site.fit(None).items()})


def observe(model: nn.Module, batches: Iterable[Any], *, watch: Watch = unwatched) -> dict[str, ActivationStats]:
    """Run batches through a converted model whose sites pass on what comes; return what every site saw, by its name.

    Operations that need no data for their fit are in spikes already.

    Raises:
        CalibrationError: no batch, or a site that no batch reached.
        NonFiniteError: a site saw NaN or infinity; the message names it.
    """
    config, architecture = conversion_of(model).config, architecture_of(model)
    _fit_domains(model)
    found = sites(model)
    passing = [site for site in found.values() if site.observes or not site.static]
    seen = {
        site: Observation(Observer(site.channels, config.samples, seed))
        for seed, site in enumerate(site for site in found.values() if site.static and site.observes)
    }
    with torch.no_grad(), evaluating(model), in_mode(passing, "dense"), listening(seen):
        for index, batch in enumerate(batches):
            watch("calibrating", index, (len(batches) or None) if isinstance(batches, Sized) else None)
            architecture.feed(model, batch)
    return {name: _stats(site, seen[site]) for name, site in found.items() if site in seen}


def _stats(site: Coder, seen: Observation) -> ActivationStats:
    try:
        return seen.observer.stats()
    except CalibrationError as error:
        raise CalibrationError(f"site '{site.name}': {error}") from None


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _fit(
    coders: dict[str, Coder], statistics: Mapping[str, ActivationStats], watch: Watch
) -> dict[str, Mapping[str, Tensor]]:
    """Parameters by name, on the device of what was observed; coders of one `batch` are fitted together."""
    batches: dict[Hashable, list[str]] = {}
    for name, coder in coders.items():
        batches.setdefault(coder.batch, []).append(name)
    fitted: dict[str, Mapping[str, Tensor]] = {}
    for names in batches.values():
        watch("fitting", len(fitted), len(coders))
        together = [coders[name] for name in names]
        try:
            found = together[0].fit_all(together, [_alive(statistics[name]) for name in names])
        except CalibrationError as error:
            raise CalibrationError(f"site '{together[error.index or 0].name}': {error}") from None
        for name, tensors in zip(names, found, strict=True):
            fitted[name] = {key: tensor.to(statistics[name].device) for key, tensor in tensors.items()}
    return fitted


def _alive(stats: ActivationStats) -> ActivationStats:
    """Statistics of a place that was never active as those of 0 .. 1: its code is 0, whatever the scheme."""
    if bool((stats.low != 0).any()) or bool((stats.high != 0).any()):
        return stats
    ends = {"high": torch.ones_like(stats.high)}
    for name in ("values", "rows"):
        sample = getattr(stats, name).clone()
        sample[sample.shape[0] // 2 :] = 1
        ends[name] = sample
    return dataclasses.replace(stats, **ends)  # type: ignore[arg-type]


def set_execution(model: nn.Module, execution: Execution) -> nn.Module:
    """Choose how a converted model runs, and return it.

    `fused`: the closed form of the code, one dense operation per layer. `stepped`: every spike of every step is made
    and passes through the weights. For codes that are `collapsible` both give the same codes, and the same
    outputs up to the rounding of the sums.

    Raises:
        OptionError: there is no such execution.
    """
    if execution not in EXECUTIONS:
        raise OptionError(f"execution='{execution}': choose one of {', '.join(EXECUTIONS)}")
    for site in sites(model).values():
        if isinstance(site, StreamingSite) and execution == "fused":
            raise OptionError(f"execution='fused': trains of '{site.encoder.name}' stream, they run stepped only")
        site.mode = execution
    for module in model.modules():
        conversion = getattr(module, "conversion", None)
        if isinstance(conversion, Conversion):
            conversion.config = conversion.config.model_copy(update={"execution": execution})
    return model


def _refuse_unfit(calibration: Iterable[Any] | None, config: ConversionConfig) -> None:
    """Raises CalibrationError where data is missing that the code needs, and OptionError where it is no batches."""
    encoder, _ = config.build()
    if calibration is None and (encoder.static or any(each.static for each in config.build_approximators().values())):
        raise CalibrationError(f"recipe '{config.recipe}' needs calibration data: convert(..., calibration=batches)")
    batches = isinstance(calibration, Iterable) and not isinstance(calibration, (Tensor, Mapping))
    if calibration is not None and not batches:
        raise OptionError(f"calibration is a {type(calibration).__name__}: give a list of batches, calibration=[batch]")


def report(model: nn.Module) -> ConversionReport:
    """What became of every operation of a converted model. Raises ConversionError when it is not converted."""
    refuse_replaced(model)
    return conversion_of(model).report
