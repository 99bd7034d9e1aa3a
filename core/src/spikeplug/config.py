"""What a conversion was asked to do, in one validated object that is stored with the result."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pydantic
import torch

from spikeplug import plugins
from spikeplug.coding.statistics import ActivationStats
from spikeplug.coding.types import Approximator, CodeParams, Encoder, Neuron, Pass, Recipe
from spikeplug.errors import OptionError, listed, nearest


class ConversionConfig(pydantic.BaseModel):
    """A recipe with every choice resolved. JSON in and out: `model_dump_json`, `ConversionConfig.from_json`.

    Attributes:
        version: version of this format.
        recipe: the recipe it came from.
        encoder, encoder_options: the code of every site.
        overrides: pattern, as of `include` -> options of the encoder that differ there.
        neuron, neuron_options: the dynamics that make its spikes in stepped execution; None: the code's own `encode`.
        neuron_follows: neuron option -> the encoder option that it takes its value from.
        passes: rewrites applied before the conversion, in order.
        pass_options: pass -> its options.
        approximators: nonlinear operation (or `*`) -> approximator.
        approximator_options: approximator -> its options.
        approximator_follows: approximator option -> the encoder option that it takes its value from.
        include: what is converted: patterns of names, or of those of modules around them (`*.down_proj`), kinds
            (`query`, `silu`) or subsystems (`ffn`, `activation`, `attention`, `embedding`, `norm`).
        exclude: what of that stays dense, in the same words.
        structure: of networks that are no language models. `graph`: they are captured, every operation gets a role, and
            layers that read one activation share its spikes. `layers`, for networks that cannot be captured: every
            linear layer and convolution in the tree of modules codes its own input; what is done between them is dense.
        execution: `fused` or `stepped`, how the model runs after conversion.
        samples: values kept per site while calibrating, for percentiles and for schemes that learn.
    """

    model_config = pydantic.ConfigDict(frozen=True)

    version: Literal[1] = 1
    recipe: str
    encoder: str
    encoder_options: dict[str, Any] = {}
    overrides: dict[str, dict[str, Any]] = {}
    neuron: str | None = None
    neuron_options: dict[str, Any] = {}
    neuron_follows: dict[str, str] = {}
    passes: tuple[str, ...] = ()
    pass_options: dict[str, dict[str, Any]] = {}
    approximators: dict[str, str] = {"*": "exact"}
    approximator_options: dict[str, dict[str, Any]] = {}
    approximator_follows: dict[str, str] = {}
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    structure: Literal["graph", "layers"] = "graph"
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
            preset |= {
                "encoder_options": {},
                "overrides": {},
                "neuron": None,
                "neuron_options": {},
                "neuron_follows": {},
            }
        if own.get("neuron", preset["neuron"]) != preset["neuron"]:
            preset |= {"neuron_options": {}, "neuron_follows": {}}
        config = cls.parse({**preset, **own})
        config = config._with_options(preset["encoder_options"] | own.get("encoder_options", {}), rest)
        if config.build()[0].streams and config.neuron is not None:
            if own.get("execution") == "fused":
                raise OptionError(f"execution='fused': trains of '{config.encoder}' stream, they run stepped only")
            config = config.model_copy(update={"execution": "stepped"})
        for pattern in config.overrides:
            config._built(config.overrides[pattern])
        config.build_approximators()
        config.build_passes()
        return config

    def _with_options(self, of_code: dict[str, Any], options: Mapping[str, Any]) -> ConversionConfig:
        """This configuration with options of the code, else of the neuron, else of the approximators that have them."""
        of_encoder = _fields("encoder", self.encoder)
        of_neuron = _fields("neuron", self.neuron) - set(self.neuron_follows) if self.neuron else set()
        of_others = {name: _fields("approximator", name) for name in set(self.approximators.values())}
        for key in options:
            known = of_encoder.union(of_neuron, *of_others.values())
            if key not in known:
                choices = known | set(type(self).model_fields)
                raise OptionError(
                    f"unknown option '{key}' of recipe '{self.recipe}'{nearest(key, choices)} "
                    f"Options: {listed(known)}; of every recipe: {listed(type(self).model_fields)}."
                )
        approximator_options = {name: dict(given) for name, given in self.approximator_options.items()}
        for name, fields in of_others.items():
            found = {key: value for key, value in options.items() if key in fields - of_encoder - of_neuron}
            if found:
                approximator_options[name] = approximator_options.get(name, {}) | found
        return self.model_copy(
            update={
                "encoder_options": of_code | {key: options[key] for key in options if key in of_encoder},
                "neuron_options": self.neuron_options
                | {key: options[key] for key in options if key in of_neuron - of_encoder},
                "approximator_options": approximator_options,
            }
        )

    def build(self, name: str = "", *labels: str) -> tuple[Encoder, Neuron | None]:
        """The encoder and the neuron of the place of that name, kind and subsystem.

        Raises:
            UnknownNameError: as `resolve`.
            OptionError: as `resolve`; or the neuron does not fire the spikes of the code.
        """
        differing: dict[str, Any] = {}
        for pattern, options in self.overrides.items():
            if _matches((pattern,), name, labels):
                differing |= options
        return self._built(differing)

    def build_shared(self, readers: Sequence[str], *labels: str) -> tuple[Encoder, Neuron | None]:
        """The encoder and the neuron of a site that operations of these names share.

        Raises:
            OptionError: `overrides` gives them different codes; else as `build`.
        """
        built = {name: self.build(name, *labels) for name in readers}
        first = built[readers[0]]
        other = next((name for name, each in built.items() if each != first), None)
        if other is not None:
            raise OptionError(
                f"overrides gives '{other}' another code than '{readers[0]}', and both read one site: name all of "
                f"{listed(readers)} alike"
            )
        return first

    def _built(self, differing: Mapping[str, Any]) -> tuple[Encoder, Neuron | None]:
        encoder = plugins.get_encoder(self.encoder, **{**self.encoder_options, **differing})
        if self.neuron is None:
            return encoder, None
        followed = {key: getattr(encoder, option) for key, option in self.neuron_follows.items()}
        neuron = plugins.get_neuron(self.neuron, **{**followed, **self.neuron_options})
        if not encoder.streams:  # with a streaming code, the neuron answers currents and not an activation
            _check_pair(encoder, neuron)
        return encoder, neuron

    def build_passes(self) -> list[Pass]:
        """The passes, in order. Raises as `resolve`."""
        twice = next((name for name in self.passes if self.passes.count(name) > 1), None)
        if twice is not None:
            raise OptionError(f"passes={list(self.passes)}: '{twice}' is named twice, once is enough")
        return [plugins.get_pass(name, **self.pass_options.get(name, {})) for name in self.passes]

    def apply_passes(self, model: torch.nn.Module, batches: Sequence[Any]) -> ConversionConfig:
        """Rewrite a model in place; return the configuration, with what the passes found among their options.

        Raises:
            SpikeplugError: a pass cannot be applied.
        """
        options = dict(self.pass_options)
        for each in self.build_passes():
            found = each.apply(model, batches)
            if found:
                options[each.name] = {**options.get(each.name, {}), **found}
        return self.model_copy(update={"pass_options": options})

    def build_approximators(self) -> dict[str, Approximator]:
        """The approximators by their name.

        Raises:
            UnknownNameError, OptionError: as `resolve`.
        """
        encoder = plugins.get_encoder(self.encoder, **self.encoder_options)
        followed = {option: getattr(encoder, source, None) for option, source in self.approximator_follows.items()}
        found = {}
        for name in sorted(set(self.approximators.values())):
            fields = _fields("approximator", name)
            options = {key: value for key, value in followed.items() if key in fields and value is not None}
            options |= self.approximator_options.get(name, {})
            found[name] = plugins.get_approximator(name, **options)
        return found

    def approximator(self, op: str) -> str:
        """Name of the approximator of an operation."""
        return self.approximators.get(op, self.approximators.get("*", "exact"))

    def excludes(self, name: str, *labels: str) -> bool:
        """Whether what has that name, kind and subsystem stays dense."""
        return not _matches(self.include, name, labels) or _matches(self.exclude, name, labels)

    def check_patterns(
        self, names: Mapping[str, tuple[str, ...]], uncoded: Mapping[str, tuple[str, ...]] | None = None
    ) -> None:
        """Refuse a pattern that nothing (name -> kind and subsystem) matches.

        Args:
            uncoded: what has no code of its own, so that `overrides` cannot mean it.

        Raises:
            OptionError: the message says the nearest name, kind or subsystem.
        """
        every = {**names, **(uncoded or {})}
        given = (
            ("include", self.include, every),
            ("exclude", self.exclude, every),
            ("overrides", self.overrides, names),
        )
        for key, patterns, names in given:
            words = {label for labels in names.values() for label in labels}
            for pattern in patterns:
                if pattern != "*" and not any(_matches((pattern,), name, labels) for name, labels in names.items()):
                    raise OptionError(
                        f"{key}='{pattern}' matches nothing{nearest(pattern, words | set(names))} "
                        f"Kinds and subsystems: {listed(words)}"
                    )


def _matches(patterns: tuple[str, ...], name: str, labels: tuple[str, ...]) -> bool:
    """Whether a pattern is a label, or matches the name or that of a module which it is a part of."""
    parts = name.split(".")
    names = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    return any(pattern in labels or any(fnmatch.fnmatchcase(each, pattern) for each in names) for pattern in patterns)


def _fields(kind: str, name: str) -> set[str]:
    """Names of the options of a part."""
    cls = plugins.get_class(kind, name)
    return {field.name for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()


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
        "overrides": {pattern: dict(options) for pattern, options in preset.overrides.items()},
        "neuron": preset.neuron,
        "neuron_follows": dict(preset.neuron_options),
        "passes": preset.passes,
        "approximators": {"*": "exact", **preset.approximators},
        "approximator_options": {name: dict(options) for name, options in preset.approximator_options.items()},
        "approximator_follows": dict(preset.approximator_follows),
    }


@functools.lru_cache(maxsize=64)
def _check_pair(encoder: Encoder, neuron: Neuron) -> None:
    """Refuse a neuron that does not fire what the code encodes: stepped execution would be silently wrong."""
    # Models are built on the meta device, where nothing could be compared.
    with torch.device("cpu"):
        x = torch.linspace(-1, 1, 33)
        unit = CodeParams(torch.ones(()), torch.zeros(()))
        p = encoder.fit(ActivationStats.of(x)) if encoder.static else encoder.params(x, unit)
        try:
            fired = torch.stack(list(neuron.bind(p).stream(encoder.drive(x, p)))).to(x.dtype)
        except NotImplementedError as error:
            raise OptionError(f"neuron='{neuron.name}': {error}") from None
        same = torch.equal(fired, encoder.encode(x, p))
    if not same:
        raise OptionError(f"neuron='{neuron.name}': {neuron} does not fire the spikes of {encoder}")


def _keys(cls: type[pydantic.BaseModel]) -> str:
    return f"Keys: {listed(cls.model_fields)}."


def _first(error: pydantic.ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}={first['input']!r}: {message}" if where else message
