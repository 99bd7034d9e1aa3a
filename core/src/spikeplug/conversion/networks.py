"""Networks of any kind: captured as a graph, planned, converted, saved with it and loaded without their class."""

from __future__ import annotations

import copyreg
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
import torch
from torch import Tensor, nn

from spikeplug.coding.site import Coder
from spikeplug.config import ConversionConfig
from spikeplug.errors import BundleError, CalibrationError, OptionError
from spikeplug.graph.capture import unwrapped
from spikeplug.graph.network import SpikingGraph, samples_of
from spikeplug.graph.stored import of_json, require_plain, to_json

from .architecture import Architecture
from .plan import Plan, build, plan_network
from .sharing import shared_copy

WEIGHTS = "model.safetensors"
GRAPH = "graph.json"


class Networks(Architecture):
    """Networks that are captured as graphs."""

    target: ClassVar[str] = "module"

    def plan(self, model: nn.Module, config: ConversionConfig, batches: Sequence[Any]) -> Plan:
        """What a conversion would make of the network, the first batch its example. Raises as `plan_network`."""
        if not batches:
            raise CalibrationError(
                f"{type(model).__name__} is captured on an example: give calibration=batches, or example=batch"
            )
        if config.passes:
            model = shared_copy(unwrapped(model))
            config = config.apply_passes(model, batches)
        args, kwargs = as_call(model, batches[0])
        return plan_network(model, config, args, kwargs)

    def prepare(
        self, model: nn.Module, config: ConversionConfig, batches: Sequence[Any] = (), *, inplace: bool = False
    ) -> nn.Module:
        if inplace:
            raise OptionError("inplace=True is for language models: a captured network shares its tensors as it is")
        return self.plan(model, config, batches).apply()

    def feed(self, model: nn.Module, batch: Any) -> Any:
        args, kwargs = as_call(model, batch)
        return model(*args, **kwargs)

    def units(self, batch: Any) -> int:
        return samples_of(batch)

    def save(self, model: nn.Module, folder: Path, **options: Any) -> None:
        assert isinstance(model, SpikingGraph)
        if options:
            raise OptionError(f"unknown option '{next(iter(options))}' of save: a network takes none")
        write_tensors(model, folder / WEIGHTS)
        (folder / GRAPH).write_text(json.dumps(_described(model)))

    def load(self, folder: Path, **options: Any) -> nn.Module:
        config: ConversionConfig = options.pop("config")
        if options:
            raise OptionError(f"unknown option '{next(iter(options))}' of load: a saved network needs none")
        try:
            described = json.loads((folder / GRAPH).read_text())
            # Copies, since in the file's own memory tensors begin where some sums are rounded in another order.
            state = {name: each.clone() for name, each in safetensors.torch.load_file(folder / WEIGHTS).items()}
            aliases = _aliases(folder / WEIGHTS)
            state |= {name: state[kept] for name, kept in aliases.items()}
            for name, order in described["orders"].items():
                state[name] = _ordered(state[name], order)
            model = _rebuilt(described, state, config)
        except (KeyError, ValueError, RuntimeError, AttributeError, TypeError) as error:
            raise BundleError(f"{folder} does not hold what its configuration needs: {error}") from None
        return model.eval()


def _described(model: SpikingGraph) -> dict[str, Any]:
    """What a network is beside its tensors and its configuration, as plain data."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {
        "graph": to_json(model.captured),
        "stored": model.stored,
        "parameters": {
            name: parameters[place].requires_grad for name, place in model.stored.items() if place in parameters
        },
        "orders": {name: order for name, each in model.state_dict().items() if (order := _order(each))},
        "folded": model.conversion.folded,
        "origin": model.conversion.origin,
    }


def _rebuilt(described: Mapping[str, Any], state: Mapping[str, Tensor], config: ConversionConfig) -> SpikingGraph:
    """The network that `_described` says, with tensors by name. Raises as a damaged description happens to."""
    for name in state:
        require_plain(name)
    tensors = {str(name): state[place] for name, place in described["stored"].items()}
    for name, trained in described["parameters"].items():
        # Some kernels round otherwise where no gradient may be asked for.
        tensors[name] = nn.Parameter(tensors[name], requires_grad=trained is True)
    captured = of_json(described["graph"], tensors)
    model = build(captured, {str(key): str(value) for key, value in described["folded"].items()}, config)
    _fill(model, state)
    model.conversion.origin = dict(described.get("origin", {}))
    return model


def _reduced(model: SpikingGraph) -> tuple[Any, ...]:
    state = {name: each.detach() for name, each in model.state_dict().items()}
    return _of_reduced, (_described(model), state, model.conversion.config.model_dump(mode="json"), model.training)


def _of_reduced(described: Any, state: dict[str, Tensor], config: dict[str, Any], training: bool) -> nn.Module:
    from .verbs import set_execution

    model = _rebuilt(described, state, ConversionConfig.model_validate(config))
    return set_execution(model, model.conversion.config.execution).train(training)


# For torch.save and other processes; operations of PyTorch have no such form.
copyreg.dispatch_table[SpikingGraph] = _reduced


def _order(tensor: Tensor) -> list[int]:
    """The order of a tensor's dimensions in memory; empty where it is their own."""
    if tensor.is_contiguous():
        return []
    return sorted(range(tensor.ndim), key=lambda dim: -tensor.stride()[dim])


def _ordered(tensor: Tensor, order: list[int]) -> Tensor:
    """The same values with their dimensions in that order in memory, as transposed weights have them."""
    back = [order.index(dim) for dim in range(tensor.ndim)]
    return tensor.permute(order).contiguous().permute(back)


def write_tensors(model: nn.Module, file: Path) -> None:
    """Write what a model holds; a tensor of several names once, with the others in the file's metadata."""
    kept: dict[str, Tensor] = {}
    named: dict[tuple[Any, ...], str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and place in named:
            aliases[name] = named[place]
        else:
            named[place] = name
            kept[name] = tensor.contiguous().clone()
    safetensors.torch.save_file(kept, file, aliases)


def _aliases(file: Path) -> dict[str, str]:
    """Names of tensors that a file holds once, under another name."""
    with safetensors.safe_open(file, framework="pt") as tensors:
        return dict(tensors.metadata() or {})


def fill_sites(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give sites the parameters of their codes that a state dict holds."""
    for path, module in model.named_modules():
        if isinstance(module, Coder):
            own = {key.removeprefix(f"{path}."): value for key, value in state.items() if key.startswith(f"{path}.")}
            if own:
                module.set_params(own)


def _fill(model: SpikingGraph, state: Mapping[str, Tensor]) -> None:
    """Give a network that was built anew the parameters of its sites, and all else that was saved."""
    fill_sites(model, state)
    wanted = model.state_dict()
    missing = [name for name in wanted if name not in state]
    if missing or set(state) - set(wanted):
        raise KeyError(f"tensors {missing or sorted(set(state) - set(wanted))}")
    for name, tensor in wanted.items():
        if tensor.data_ptr() != state[name].data_ptr():
            with torch.no_grad():
                tensor.copy_(state[name])


def as_call(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How a calibration batch is given to a network.

    A tensor is its one input; a mapping gives inputs by name; a tuple or a list gives them in order, and what comes
    after those that the network needs, such as labels, is left out.

    Raises:
        OptionError: it is none of these.
    """
    if isinstance(batch, Tensor):
        args: tuple[Any, ...] = (batch,)
        kwargs: dict[str, Any] = {}
    elif isinstance(batch, Mapping):
        args, kwargs = (), dict(batch)
    elif isinstance(batch, (tuple, list)) and batch:
        args, kwargs = tuple(batch[: _needed(model, len(batch))]), {}
    else:
        raise OptionError(
            f"a batch of {type(batch).__name__}: give a tensor, a tuple of inputs (and labels, which are left out), or "
            "a dict"
        )
    if "use_cache" in inspect.signature(unwrapped(model).forward).parameters:
        kwargs.setdefault("use_cache", False)  # transformers' networks, whose cache a captured one does not have
    return args, kwargs


def _needed(model: nn.Module, given: int) -> int:
    """How many of the inputs in a tuple a network takes."""
    model = unwrapped(model)
    if isinstance(model, SpikingGraph):
        signature = model.captured.signature
        return given if signature.rest else len(signature.given)
    parameters = inspect.signature(model.forward).parameters.values()
    if any(each.kind is each.VAR_POSITIONAL for each in parameters):
        return given
    positional = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    required = sum(each.default is each.empty for each in positional)
    return max(1, min(required or 1, given))
