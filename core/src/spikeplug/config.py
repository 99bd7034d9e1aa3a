"""What a conversion was asked to do, in one validated object that is stored with the result."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
from collections.abc import Mapping
from typing import Any, Literal

import pydantic
import torch

from spikeplug import plugins
from spikeplug.errors import OptionError, listed, nearest
from spikeplug.stats import ActivationStats
from spikeplug.types import CodeParams, Encoder, Neuron, Recipe


class ConversionConfig(pydantic.BaseModel):
    """A recipe with every choice resolved. JSON in and out: `model_dump_json`, `ConversionConfig.from_json`.

    Attributes:
        version: version of this format.
        recipe: the recipe it came from.
        encoder, encoder_options: the code of every site.
        neuron, neuron_options: the dynamics that make its spikes in stepped execution; None: the code's own `encode`.
        neuron_follows: neuron option -> the encoder option that it takes its value from.
        passes: rewrites applied before the conversion, in order.
        approximators: nonlinear operation (or `*`) -> approximator.
        exclude: patterns of site names (`*.down_proj`) or kinds (`embedding`) that stay dense.
        execution: `fused` or `stepped`, how the model runs after conversion.
        samples: values kept per site while calibrating, for percentiles and for schemes that learn.
    """

    model_config = pydantic.ConfigDict(frozen=True)

    version: Literal[1] = 1
    recipe: str
    encoder: str
    encoder_options: dict[str, Any] = {}
    neuron: str | None = None
    neuron_options: dict[str, Any] = {}
    neuron_follows: dict[str, str] = {}
    passes: tuple[str, ...] = ()
    approximators: dict[str, str] = {"*": "exact"}
    exclude: tuple[str, ...] = ()
    execution: Literal["fused", "stepped"] = "fused"
    samples: int = pydantic.Field(default=65536, ge=1)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            for key in data:
                if key not in cls.model_fields:
                    raise ValueError(f"unknown key '{key}'{nearest(key, cls.model_fields)} {_keys(cls)}")
        return data

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> ConversionConfig:
        """Validate a mapping.

        Raises:
            OptionError: a key is unknown or a value is not allowed.
        """
        try:
            return cls.model_validate(dict(data))
        except pydantic.ValidationError as error:
            raise OptionError(_first(error)) from None

    @classmethod
    def from_json(cls, text: str) -> ConversionConfig:
        """Validate JSON. Raises OptionError."""
        try:
            return cls.model_validate_json(text)
        except pydantic.ValidationError as error:
            raise OptionError(_first(error)) from None

    @classmethod
    def resolve(cls, recipe: str | Recipe | ConversionConfig, options: Mapping[str, Any]) -> ConversionConfig:
        """A recipe with the user's options, each of which is a key of this class or an option of the code.

        Raises:
            UnknownNameError: no recipe, encoder, neuron, pass or approximator of that name is installed.
            OptionError: an option is unknown or out of range.
        """
        for fixed in ("recipe", "version"):
            if fixed in options:
                raise OptionError(f"'{fixed}' is no option: it names what the other options change")
        preset = _as_recipe(recipe)
        own = {key: options[key] for key in options if key in cls.model_fields}
        rest = {key: options[key] for key in options if key not in cls.model_fields}
        same = own.get("encoder", preset["encoder"]) == preset["encoder"]
        if not same:
            # Options and neuron of the recipe's code mean nothing to another.
            preset |= {"encoder_options": {}, "neuron": None, "neuron_options": {}, "neuron_follows": {}}
        if own.get("neuron", preset["neuron"]) != preset["neuron"]:
            preset |= {"neuron_options": {}, "neuron_follows": {}}
        config = cls.parse({**preset, **own})
        known = {field.name for field in dataclasses.fields(plugins.get_class("encoder", config.encoder))}
        for key in rest:
            if key not in known:
                choices = known | set(cls.model_fields)
                raise OptionError(
                    f"unknown option '{key}' of recipe '{config.recipe}'{nearest(key, choices)} "
                    f"Options: {listed(known)}; of every recipe: {listed(cls.model_fields)}."
                )
        inherited = preset["encoder_options"]
        config = config.model_copy(update={"encoder_options": {**inherited, **own.get("encoder_options", {}), **rest}})
        config.build()
        return config

    def build(self) -> tuple[Encoder, Neuron | None]:
        """The encoder and the neuron. Checks every other name on the way.

        Raises:
            UnknownNameError: as `resolve`.
            OptionError: as `resolve`; or the neuron does not fire the spikes of the code.
        """
        for name in self.passes:
            plugins.registry().find("pass", name)
        for name in self.approximators.values():
            plugins.registry().find("approximator", name)
        encoder = plugins.get_encoder(self.encoder, **self.encoder_options)
        if self.neuron is None:
            return encoder, None
        followed = {key: getattr(encoder, option) for key, option in self.neuron_follows.items()}
        neuron = plugins.get_neuron(self.neuron, **{**followed, **self.neuron_options})
        _check_pair(encoder, neuron)
        return encoder, neuron

    def excludes(self, name: str, kind: str) -> bool:
        """Whether the site of that name and kind stays dense."""
        return any(kind == pattern or fnmatch.fnmatchcase(name, pattern) for pattern in self.exclude)

    def check_exclude(self, names: Mapping[str, str]) -> None:
        """Refuse a pattern of `exclude` that no site (name -> kind) matches.

        Raises:
            OptionError: the message says the nearest name or kind.
        """
        choices = set(names) | set(names.values())
        for pattern in self.exclude:
            if not any(kind == pattern or fnmatch.fnmatchcase(name, pattern) for name, kind in names.items()):
                raise OptionError(
                    f"exclude='{pattern}' matches no site{nearest(pattern, choices)} Kinds: {listed(names.values())}"
                )


def _as_recipe(recipe: str | Recipe | ConversionConfig) -> dict[str, Any]:
    """What a recipe says, as fields of ConversionConfig."""
    if isinstance(recipe, ConversionConfig):
        return recipe.model_dump()
    preset = plugins.get_recipe(recipe) if isinstance(recipe, str) else recipe
    if not isinstance(preset, Recipe):
        raise OptionError(f"recipe={recipe!r}: give a recipe's name, a Recipe or a ConversionConfig")
    return {
        "recipe": preset.name,
        "encoder": preset.encoder,
        "encoder_options": dict(preset.encoder_options),
        "neuron": preset.neuron,
        "neuron_follows": dict(preset.neuron_options),
        "passes": preset.passes,
    }


@functools.lru_cache(maxsize=64)
def _check_pair(encoder: Encoder, neuron: Neuron) -> None:
    """Refuse a neuron that does not fire what the code encodes: stepped execution would be silently wrong."""
    x = torch.linspace(-1, 1, 33)
    unit = CodeParams(torch.ones(()), torch.zeros(()))
    p = encoder.fit(ActivationStats.of(x)) if encoder.static else encoder.params(x, unit)
    try:
        fired = torch.stack(list(neuron.stream(encoder.drive(x, p)))).to(x.dtype)
    except NotImplementedError as error:
        raise OptionError(f"neuron='{neuron.name}': {error}") from None
    if not torch.equal(fired, encoder.encode(x, p)):
        raise OptionError(f"neuron='{neuron.name}': {neuron} does not fire the spikes of {encoder}")


def _keys(cls: type[pydantic.BaseModel]) -> str:
    return f"Keys: {listed(cls.model_fields)}."


def _first(error: pydantic.ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}={first['input']!r}: {message}" if where else message
