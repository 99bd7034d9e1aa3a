"""What a model of the LLaMA family consists of, and how its modules become spiking ones."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from spikeplug.coding.layers import CodedEmbedding, SpikingLayer, SpikingLinear, make_spiking
from spikeplug.coding.padding import real_positions
from spikeplug.coding.site import Coder, Site
from spikeplug.config import ConversionConfig
from spikeplug.conversion.plan import Problem, refuse
from spikeplug.conversion.record import Conversion
from spikeplug.conversion.report import ConversionReport, Op, dynamic_note, spiking_op
from spikeplug.errors import ConversionError, listed
from spikeplug.graph.nonlinear import approximate, check_names, within
from spikeplug.graph.operations import labels_of

from . import FAMILY
from .attention import DIVISION, OPERANDS, PREFIX, Softmax, refuse_other_attention

READERS = {
    "self_attn": (("q_proj", "k_proj", "v_proj"), ("o_proj",)),
    "mlp": (("gate_proj", "up_proj"), ("down_proj",)),
}
"""Block -> groups of linear layers; those of one group read the same activation, so they share a site."""

CONTEXT = 512
"""Tokens of context for which the report counts the products of attention."""


@dataclasses.dataclass(frozen=True)
class Place:
    """A site to be: its name and kind, and the modules that read it."""

    name: str
    kind: str
    module: nn.Module
    readers: tuple[str, ...] = ()


def attention_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of every attention block."""
    for name, module in model.named_modules():
        if name.endswith(".self_attn"):
            yield name, module


def places(model: nn.Module) -> Iterator[Place]:
    """Every place of a model that can be coded, in the order of the data."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if isinstance(module, nn.Embedding):
            yield Place(name, "embedding", module)
        elif name.endswith(".self_attn"):
            first, last = READERS["self_attn"]
            yield Place(f"{name}.{first[0]}", "input", module, tuple(f"{name}.{each}" for each in first))
            for operand in OPERANDS:
                yield Place(f"{name}.{operand}", operand, module)
            yield Place(f"{name}.{last[0]}", "input", module, (f"{name}.{last[0]}",))
        elif name.endswith(".mlp"):
            for group in READERS["mlp"]:
                yield Place(f"{name}.{group[0]}", "input", module, tuple(f"{name}.{each}" for each in group))
        elif name == "lm_head":
            yield Place(name, "head", module, (name,))


def strangers(model: nn.Module) -> Iterator[Problem]:
    """Every module with parameters must be one that the conversion knows the role of: those that are not."""
    found = getattr(model.config, "model_type", "?")
    expected = {f"{block}.{name}" for block, groups in READERS.items() for group in groups for name in group}
    if found not in FAMILY or type(model).__name__.removesuffix("ForCausalLM") == type(model).__name__:
        kinds = listed({type(module).__name__ for module in model.modules()})
        reason = f"type '{found}' is not a causal language model of the LLaMA family ({listed(FAMILY)})"
        yield Problem("", "", "", reason, f"give one that is. Its parts: {kinds}")
        return
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is None:
            continue
        place = ".".join(name.split(".")[-2:])
        known = type(module) is nn.Linear and (place in expected or name == "lm_head")
        if not known and type(module) is not nn.Embedding and not type(module).__name__.endswith("RMSNorm"):
            remedy = "convert the model without it, such as one whose adapters are merged"
            yield Problem(name, type(module).__name__, "", "has no known role in this family", remedy)


def refuse_strangers(model: nn.Module) -> None:
    """Raise ConversionError where a module has no known role; the message names all of them."""
    refuse(tuple(strangers(model)), f"{type(model).__name__} is not understood")


def rewritten(model: nn.Module) -> list[str]:
    """Passes whose work is found in a model."""
    names = {name.rpartition(".")[2] for name, _ in itertools.chain(model.named_modules(), model.named_buffers())}
    traces = {"rotate": ROTATION, "prefix": PREFIX[0], "defer-softmax": DIVISION}
    return [each for each, trace in traces.items() if trace in names]


ROTATION = "down_rotation"
"""Module of an MLP block that rotates the input of its last layer (the pass `rotate`)."""


def check(model: nn.Module, config: ConversionConfig) -> None:
    """Everything that can speak against a conversion, before anything is changed.

    Raises:
        ConversionError, OptionError: the model or an exclude pattern does not fit.
    """
    refuse_strangers(model)
    check_options(model, config)


def check_options(model: nn.Module, config: ConversionConfig) -> None:
    """Raises OptionError: a pattern names what is not there, or an option of a pass is wrong."""
    found = list(places(model))
    names = {place.name: place.kind for place in found}
    names |= {reader: place.kind for place in found for reader in place.readers}
    operations = _operations(model)
    check_names(config, operations.values())
    labels = {name: labels_of(op) for name, op in operations.items()}
    config.check_patterns({name: (kind, subsystem(name, kind)) for name, kind in names.items()}, labels)
    for each in config.build_passes():
        checks = getattr(each, "check", None)
        if checks is not None:
            checks(model)


def make_model_spiking(model: nn.Module, config: ConversionConfig) -> None:
    """Put uncalibrated sites in every place that is not excluded, and the record of that on the model.

    Works on a model whose weights are not loaded yet. Raises as `check`.
    """
    check(model, config)
    fill(model, config)
    if needs_our_attention(config):
        for _, block in attention_blocks(model):
            block.register_forward_pre_hook(refuse_other_attention)
    for name in SETTERS:
        for each in (model, model.model):
            setattr(each, name, _refuse_setter)
    model.register_forward_pre_hook(_note_padding, with_kwargs=True)
    model.register_forward_hook(_forget_padding, always_call=True)


def fill(model: nn.Module, config: ConversionConfig) -> Conversion:
    """Put sites and approximated operations in place, and the record of that on the model; return it."""
    modules = dict(model.named_modules())
    for place in list(places(model)):
        _fill(place, config, modules)
    for _, block in attention_blocks(model):
        block.softmax = Softmax()
    replaced = approximate(model, config, _operations(model))
    for name in replaced:
        if name.endswith(("q_norm", "k_norm")):  # they work on heads, [B, S, H, D]
            for each in model.get_submodule(name).modules():
                if isinstance(each, Coder):
                    each.sequence = -3
    report = ConversionReport(config.recipe, tuple(_ops(model, replaced)), f"token at context {CONTEXT}", _delay(model))
    conversion = Conversion(config, report, "transformers")
    model.conversion = conversion  # type: ignore[assignment]
    return conversion


_PADDING: contextvars.ContextVar[tuple[contextlib.ExitStack, ...]] = contextvars.ContextVar("padding", default=())


def _note_padding(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: masked tokens are neither observed nor counted."""
    stack, mask = contextlib.ExitStack(), kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    stack.enter_context(real_positions(mask if isinstance(mask, Tensor) and mask.ndim == 2 else None))
    _PADDING.set((*_PADDING.get(), stack))


def _forget_padding(*_: Any) -> None:
    *before, last = _PADDING.get()
    last.close()
    _PADDING.set(tuple(before))


SETTERS = ("resize_token_embeddings", "set_input_embeddings", "set_output_embeddings")
"""Methods of transformers' models that would put a dense layer in the place of one on spikes."""


def _refuse_setter(*_: Any, **__: Any) -> None:
    raise ConversionError(
        "embeddings and head of a converted model are coded: replacing or resizing them would leave a dense layer. "
        "Resize the dense model, and convert it then"
    )


def subsystem(name: str, kind: str) -> str:
    """The part of the network that a site belongs to, as `include` and `exclude` name it."""
    if kind in ("embedding", "head"):
        return "embedding"
    return "ffn" if ".mlp." in name else "attention"


def _operations(model: nn.Module) -> dict[str, str]:
    """Name of every nonlinear operation -> which it is: norms, activations and the softmax of attention."""
    activation = model.config.hidden_act  # type: ignore[union-attr]
    ops = {name: "rmsnorm" for name, module in model.named_modules() if type(module).__name__.endswith("RMSNorm")}
    ops |= {name: activation for name, _ in model.named_modules() if name.endswith(".mlp.act_fn")}
    return ops | {f"{name}.softmax": "softmax" for name, _ in attention_blocks(model)}


ELSEWHERE = {"input", "embedding", "head", "ffn", "activation", "norm"}
"""Words of `include` that name nothing inside the products of attention."""


def needs_our_attention(config: ConversionConfig) -> bool:
    """Whether attention must go through our implementation: an operand may be coded, or softmax approximated."""
    if {"prefix", "defer-softmax"} & set(config.passes):
        return True
    exact = config.approximator("softmax") == "exact" or "softmax" in config.exclude
    excluded = "attention" in config.exclude or (exact and set(OPERANDS) <= set(config.exclude))
    return not excluded and not set(config.include) <= ELSEWHERE


def _fill(place: Place, config: ConversionConfig, modules: dict[str, nn.Module]) -> None:
    labels = (place.kind, subsystem(place.name, place.kind))
    readers = [name for name in place.readers if not config.excludes(name, *labels)]
    encoder, neuron = config.build_shared(readers or [place.name], *labels)
    if place.readers and readers:
        site = Site(readers[0], place.kind, encoder, neuron, consumers=len(readers))
        for reader in readers:
            make_spiking(modules[reader], site, owner=reader == readers[0])
    elif not place.readers and not config.excludes(place.name, *labels):
        if place.kind == "embedding":
            place.module.__class__ = CodedEmbedding
            place.module.site = Site(place.name, place.kind, encoder, neuron)
        else:
            site = Site(place.name, place.kind, encoder, neuron, OPERANDS[place.kind])
            setattr(place.module, f"{place.kind}_site", site)


PATH = (
    ("input_layernorm",),
    ("self_attn.q_proj",),
    ("self_attn.query_site", "self_attn.key_site"),
    ("self_attn.softmax",),
    ("self_attn.probabilities_site", "self_attn.value_site"),
    ("self_attn.o_proj",),
    ("post_attention_layernorm",),
    ("mlp.gate_proj",),
    ("mlp.act_fn",),
    ("mlp.down_proj",),
)
"""Windows of a layer in the order of the data; those of one group pass at the same time."""


def _delay(model: Any) -> int:
    """Time steps from a token to its logits."""

    def steps(owner: Any, path: str) -> int:
        for name in path.split("."):
            owner = getattr(owner, name, None)
        if isinstance(owner, SpikingLayer):
            owner = owner.source
        return owner.encoder.steps if isinstance(owner, Site) else int(getattr(owner, "delay", 0))

    layers = sum(max(steps(layer, path) for path in group) for layer in model.model.layers for group in PATH)
    ends = (steps(model, "model.embed_tokens.site"), steps(model, "model.norm"), steps(model, "lm_head"))
    return int(layers + sum(ends))


def _ops(model: Any, replaced: dict[str, str]) -> Iterator[Op]:
    for name, module in model.named_modules():
        kind = type(module).__name__
        if within(name, replaced):
            continue
        if name in replaced:
            yield Op(name, replaced[name], "approximated", 0, kind)
        elif isinstance(module, CodedEmbedding):
            yield Op(name, "Embedding", "coded", 0, str(module.site.encoder), dynamic_note(module.site.encoder))
        elif isinstance(module, SpikingLinear):
            yield spiking_op(name, "Linear", module.weight.numel(), module.source)
        elif isinstance(module, nn.Linear):
            yield Op(name, kind, "dense", module.weight.numel())
        elif name.endswith(".self_attn"):
            yield from _products(name, module)
            yield Op(f"{name}.rotary", "rotary embedding of q and k", "dense")
        elif name.endswith(".mlp"):
            yield Op(f"{name}.gate·up", "elementwise product", "dense")
            yield Op(f"{name.removesuffix('.mlp')}.residual", "two additions", "dense")
        elif not isinstance(module, (Coder, SpikingLayer)) and not list(module.children()):
            yield Op(name, kind, "dense", getattr(module, "macs", 0))


def _products(name: str, attention: Any) -> Iterator[Op]:
    macs = attention.q_proj.out_features * CONTEXT
    for product, operands in {"q·k": ("query", "key"), "p·v": ("probabilities", "value")}.items():
        found = [getattr(attention, f"{operand}_site", None) for operand in operands]
        coded = [str(site.encoder) for site in found if site is not None]
        role = "decoded" if len(coded) == len(found) else "dense"
        note = next((dynamic_note(site.encoder) for site in found if site is not None), "")
        if coded and role == "dense":
            note = "one operand is coded, the other excluded: the product counts as dense"
        if product == "p·v" and hasattr(attention, DIVISION):
            note = "; ".join(filter(None, [note, "divided by the sum of its coded weights (defer-softmax)"]))
        yield Op(f"{name}.{product}", "product of activations", role, macs, coded[0] if coded else "", note)
