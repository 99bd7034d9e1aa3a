"""The main verbs: convert a model, calibrate it, choose its execution, count its spikes, report on it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor, nn

from spikeplug import plugins
from spikeplug.architecture import Architecture, Watch, unwatched
from spikeplug.config import ConversionConfig, config_of
from spikeplug.coverage import ConversionReport
from spikeplug.errors import CalibrationError, ConversionError, NonFiniteError, OptionError, UnknownNameError
from spikeplug.flow import FlowLayer, FlowSite
from spikeplug.observed import load_observed, save_observed
from spikeplug.site import EXECUTIONS, Coder, Execution, SpikeCount, sites
from spikeplug.stats import ActivationStats, Observer
from spikeplug.types import Recipe


def architecture_of(model: nn.Module) -> Architecture:
    """The architecture that handles this model: that of the most derived class a plugin knows the package of.

    Raises:
        UnknownNameError: the model's package has a plugin that is not installed.
    """
    known = plugins.registry().names("architecture")
    for cls in type(model).__mro__:
        package = cls.__module__.partition(".")[0]
        if package in known:
            architecture: Architecture = plugins.get_class("architecture", package)()
            return architecture
        if ("architecture", package) in plugins.FIRST_PARTY:
            plugins.registry().find("architecture", package)
    raise UnknownNameError(f"{type(model).__name__} is no model of a known kind; kinds: {', '.join(known)}")


def convert(
    model: nn.Module,
    recipe: str | Recipe | ConversionConfig,
    *,
    calibration: Iterable[Any] | None = None,
    observed: str | os.PathLike[str] | None = None,
    watch: Watch = unwatched,
    **options: Any,
) -> nn.Module:
    """Turn a dense model into a spiking one, in place, and return it; a traced one is a new module around its layers.

    Args:
        model: what to convert: a plain PyTorch model, or one of a kind whose plugin is installed.
        recipe: name of a recipe (`spikeplug ls recipes`), or a whole configuration.
        calibration: batches as the model takes them: a tensor, a tuple of arguments, or a dict of named ones.
        observed: file of what the sites see in the calibration data: read where it exists, else written, so that other
            recipes for this model need no second pass over the data.
        watch: called with the stage, the batches or sites done and their number, to show progress.
        options: options of the recipe's code (`steps=8`) or keys of ConversionConfig (`exclude=["head"]`).

    Raises:
        UnknownNameError, OptionError: the recipe or an option is not known or out of range.
        CalibrationError: the code needs calibration and none was given; or calibration failed, and the model is left
            with sites that wait for `spikeplug.calibrate`; or the file is of another model or other data.
        BundleError: the file cannot be read or written.
        NonFiniteError: a weight is NaN or infinite; the message names it.
        ConversionError: the model cannot be converted; the message names the part.
    """
    config = ConversionConfig.resolve(recipe, options)
    encoder, _ = config.build()
    refuse_target(recipe, architecture_of(model))
    if calibration is None and (encoder.static or any(each.static for each in config.build_approximators().values())):
        raise CalibrationError(f"recipe '{config.recipe}' needs calibration data: convert(..., calibration=batches)")
    if any(isinstance(module, (Coder, FlowLayer)) for module in model.modules()):
        raise ConversionError(
            f"{type(model).__name__} is a converted model already: convert a dense one; if its calibration failed, "
            "call spikeplug.calibrate(model, batches)"
        )
    _refuse_nonfinite(model)
    if calibration is not None and (config.passes or observed is not None):
        calibration = list(calibration)  # read twice: by the passes or to know them again, and to calibrate
        model = prepare(model, config, calibration)
    else:
        model = prepare(model, config)
    if calibration is not None:
        fit(model, _seen(model, calibration, observed, watch), watch=watch)
    return set_execution(model, config.execution)


def _seen(
    model: nn.Module, batches: Iterable[Any], path: str | os.PathLike[str] | None, watch: Watch
) -> dict[str, ActivationStats]:
    if path is None:
        return observe(model, batches, watch=watch)
    if os.path.exists(path):
        return load_observed(path, model, batches)
    found = observe(model, batches, watch=watch)
    save_observed(found, path, model, batches)
    return found


def refuse_target(recipe: str | Recipe | ConversionConfig, architecture: Architecture) -> None:
    """Raise ConversionError where a recipe is not meant for such models."""
    preset = plugins.get_recipe(recipe) if isinstance(recipe, str) else recipe
    if isinstance(preset, Recipe) and architecture.target not in preset.targets:
        raise ConversionError(
            f"recipe '{preset.name}' is meant for {', '.join(sorted(preset.targets))}, not for '{architecture.target}'"
        )


def prepare(model: nn.Module, config: ConversionConfig, batches: Sequence[Any] = ()) -> nn.Module:
    """Put the spiking modules of a configuration in place, without calibrating them. Raises as `convert`.

    Args:
        batches: calibration data, for passes that look for something in it.
    """
    model = architecture_of(model).prepare(model, config, batches)
    model.spikeplug_config = config  # type: ignore[assignment]
    return model


def calibrate(model: nn.Module, batches: Iterable[Any], *, watch: Watch = unwatched) -> nn.Module:
    """Run batches through a converted model with its sites as observers, then fit and store every site's parameters.

    Batches and `watch` are those of `convert`. Memory is bounded by `samples` values per site, however many batches
    there are. Nothing that is fitted to them is stored unless every site can be fitted.

    Raises:
        CalibrationError: no batch, a site that no batch reached, or statistics that a code cannot be fitted to.
        NonFiniteError: a site saw NaN or infinity; the message names it.
    """
    return fit(model, observe(model, batches, watch=watch), watch=watch)


def fit(model: nn.Module, observed: Mapping[str, ActivationStats], *, watch: Watch = unwatched) -> nn.Module:
    """Fit and store every site's parameters to statistics that `observe` gave, of this model or one with such sites.

    Raises:
        CalibrationError: a site has no statistics, or some that its code cannot be fitted to.
    """
    _fit_domains(model)
    waiting = {name: site for name, site in sites(model).items() if site.static and site.observes}
    for name in waiting:
        if name not in observed:
            raise CalibrationError(f"there are no statistics of site '{name}': observe a model that has it")
    for name, params in _fit(waiting, observed, watch).items():
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
    config, architecture = config_of(model), architecture_of(model)
    _fit_domains(model)
    observing = {name: site for name, site in sites(model).items() if site.static and site.observes}
    training = {module: module.training for module in model.modules()}
    model.eval()
    for seed, site in enumerate(observing.values()):
        site.observer = Observer(site.channels, config.samples, seed)
    try:
        with torch.no_grad():
            for index, batch in enumerate(batches):
                watch("calibrating", index, len(batches) if isinstance(batches, Sized) else None)
                architecture.feed(model, batch)
        return {name: _stats(site) for name, site in observing.items()}
    finally:
        for module, mode in training.items():
            module.training = mode
        for site in observing.values():
            site.observer = None
            site.forget()


def _stats(site: Coder) -> ActivationStats:
    assert site.observer is not None
    try:
        return site.observer.stats()
    except CalibrationError as error:
        raise CalibrationError(f"site '{site.name}': {error}") from None


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _fit(
    coders: dict[str, Coder], observed: Mapping[str, ActivationStats], watch: Watch
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
            found = together[0].fit_all(together, [observed[name] for name in names])
        except CalibrationError as error:
            raise CalibrationError(f"site '{together[error.index or 0].name}': {error}") from None
        for name, tensors in zip(names, found, strict=True):
            fitted[name] = {key: tensor.to(observed[name].device) for key, tensor in tensors.items()}
    return fitted


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
        if isinstance(site, FlowSite) and execution == "fused":
            raise OptionError(f"execution='fused': trains of '{site.encoder.name}' flow, they run stepped only")
        site.execution = execution
        site.forget()
    config = getattr(model, "spikeplug_config", None)
    if isinstance(config, ConversionConfig):
        model.spikeplug_config = config.model_copy(update={"execution": execution})  # type: ignore[assignment]
    return model


class SpikeCounts:
    """Spikes fired while `count_spikes` was active, by site."""

    def __init__(self, by_site: dict[str, SpikeCount]) -> None:
        self.by_site = by_site

    @property
    def total(self) -> int:
        """Spikes of all sites."""
        return sum(count.spikes for count in self.by_site.values())


@contextlib.contextmanager
def count_spikes(model: nn.Module) -> Iterator[SpikeCounts]:
    """Count the spikes of every forward pass inside the context, in either execution.

    A spike of -1 counts as one. A site that several layers read counts once. Contexts may be nested.
    """
    found = sites(model)
    counts = SpikeCounts({name: SpikeCount() for name in found})
    for name, site in found.items():
        site.forget()
        site.counters.append(counts.by_site[name])
    try:
        yield counts
    finally:
        for name, site in found.items():
            site.forget()
            site.counters.remove(counts.by_site[name])


def report(model: nn.Module) -> ConversionReport:
    """What became of every operation of a converted model. Raises ConversionError when it is not converted."""
    sites(model)
    return architecture_of(model).report(model)


def _refuse_nonfinite(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not parameter.is_meta and not bool(torch.isfinite(parameter).all()):
            raise NonFiniteError(f"parameter '{name}' holds NaN or infinity: the checkpoint is damaged")
