"""The networks of cells, dense or converted: opened once for cells that follow one another, and described."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import spikeplug
from spikeplug import plugins
from spikeplug.cli import language, vision
from spikeplug.config import ConversionConfig
from spikeplug.conversion.architecture import Opened, Placement, Watch
from spikeplug.errors import OptionError

from .identity import canonical, code_digest, digest, locate, network_inputs, versions
from .spec import DENSE, Cell


@dataclasses.dataclass(frozen=True)
class Context:
    """Where a cell runs: the folder of its data, one for what may be kept between cells, and who watches."""

    cell: Cell
    id: str
    data: Path
    cache: Path
    watch: Watch


class _Kept:
    """The last network of this process: cells of one conversion follow one another."""

    key: str = ""
    value: Any = None


def _kept(key: str, make: Callable[[], Any]) -> Any:
    if _Kept.key != key:
        forget()  # the old one goes before the new one comes
        _Kept.value = make()
        _Kept.key = key
    return _Kept.value


def forget() -> None:
    """Let go of the network that is kept."""
    _Kept.key, _Kept.value = "", None


def conversion(cell: Cell) -> ConversionConfig | None:
    """The conversion of a cell with every choice resolved, its seed that of passes that draw; None: not converted."""
    if cell.recipe == DENSE:
        return None
    config = ConversionConfig.resolve(str(cell.recipe), cell.all_options)
    drawing = [name for name in config.passes if hasattr(plugins.get_class("pass", name), "seed")]
    seeded = {name: {"seed": cell.seed, **config.pass_options.get(name, {})} for name in drawing}
    return config.model_copy(update={"pass_options": config.pass_options | seeded})


def _key(context: Context) -> str:
    cell = context.cell
    fields = cell.model_dump(
        mode="json", include={"model", "recipe", "steps", "options", "execution", "dtype", "device"}
    )
    return canonical([fields, cell.seed, cell.ranks, *_state(context)])


def _state(context: Context) -> list[Any]:
    """What else a network that is kept depends on: files, versions, source code."""
    # The harness measures networks and makes none.
    known = {name: version for name, version in versions(context.cell).items() if name != "lm_eval"}
    return [network_inputs(context.cell, context.data), known, code_digest()]


def _device(cell: Cell) -> str:
    """The device of this process: ranks of data-parallel cells have one each."""
    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if cell.device == "cuda" and cell.ranks > 1 and rank else cell.device


def _source(context: Context) -> str:
    assert context.cell.model is not None
    path = context.data / context.cell.model.source
    return str(path) if path.exists() else context.cell.model.source


def text_model(context: Context) -> Opened:
    """The language model of a cell, kept for the next one. Raises OptionError, ConversionError."""
    opened: Opened = _kept(_key(context), lambda: open_text(context, conversion(context.cell)))
    return opened


def open_text(context: Context, config: ConversionConfig | None) -> Opened:
    """The language model of a cell, converted where `config` says how. Raises OptionError, ConversionError."""
    cell, architecture = context.cell, language()
    assert cell.model is not None
    how: dict[str, Any] = {"dtype": cell.dtype, "device": _device(cell)}
    if cell.ranks > 1 and cell.model.parallel != "data":
        tensor = cell.model.parallel == "tensor"
        placement = Placement(tensor=cell.ranks) if tensor else Placement(pipeline=cell.ranks)
        source = _source(context) if config is None else str(converted_folder(context))
        return architecture.open(source, **how, placement=placement)
    placement = Placement(device_map=cell.model.device_map)
    if config is None:
        opened = architecture.open(_source(context), **how, placement=placement)
        if hasattr(opened.model, "conversion"):
            raise OptionError(f"model '{cell.name}' is a converted one: its dense network is wanted as the source")
        return opened
    given = cell.model.calibration
    if given.text is None:
        raise OptionError(f"model '{cell.name}' has no calibration text: say models.{cell.name}.calibration.text")
    # What lies on several devices has its spiking modules before it has its weights.
    opened = architecture.open(_source(context), **how, placement=placement, config=config if placement else None)
    text = locate(given.text, context.data)
    batches = architecture.calibration(opened, text, seqlen=given.seqlen, tokens=given.tokens, config=config)
    if placement:
        spikeplug.calibrate(opened.model, batches, watch=context.watch)
    else:
        # Codes whose scales are found at run time observe nothing.
        statistics = _statistics(context, config) if config.build()[0].static else None
        spiking = spikeplug.convert(
            opened.model, config, calibration=batches, statistics=statistics, inplace=True, watch=context.watch
        )
        opened = dataclasses.replace(opened, model=spiking)
    return opened


def converted_folder(context: Context) -> Path:
    """Where the converted model of a cell is kept, for ranks that hold it together."""
    return context.cache / f"converted-{digest(_key(context))[:16]}"


def convert_for_ranks(context: Context) -> None:
    """Convert the model of such a cell in this process, unless it is kept: a rank sees a part of what sites see."""
    config, folder = conversion(context.cell), converted_folder(context)
    if config is None or folder.is_dir():
        return
    alone = dataclasses.replace(context, cell=context.cell.model_copy(update={"ranks": 1}))
    opened = open_text(alone, config)
    context.cache.mkdir(parents=True, exist_ok=True)
    spikeplug.save(opened.model, folder, tokenizer=opened.tokenizer)


def _statistics(context: Context, config: ConversionConfig) -> Path:
    """File of what the sites saw, which conversions of the same sites share."""
    same = config.model_dump(
        mode="json", include={"passes", "pass_options", "include", "exclude", "approximators", "samples"}
    )
    cell = context.cell
    assert cell.model is not None
    # Sites behind an approximator see what it gives: its options count too, also those that follow the encoder's.
    same["built"] = repr(config.build_approximators())
    key = [same, cell.model.model_dump(mode="json"), cell.dtype, cell.device, *_state(context)]
    context.cache.mkdir(parents=True, exist_ok=True)
    return context.cache / f"statistics-{digest(key)[:16]}.safetensors"


def image_model(context: Context) -> Any:
    """The image network of a cell, kept for the next one. Raises OptionError, ConversionError."""
    return _kept(_key(context), lambda: open_images(context, conversion(context.cell)))


def open_images(context: Context, config: ConversionConfig | None) -> Any:
    """The image network of a cell, converted where `config` says how. Raises OptionError, ConversionError."""
    cell = context.cell
    assert cell.model is not None
    weights = locate(cell.model.weights, context.data) if cell.model.weights else None
    if config is None:
        dense = vision().open(_source(context), weights)
        if hasattr(dense, "conversion"):
            raise OptionError(f"model '{cell.name}' is a converted one: its dense network is wanted as the source")
        return dense.to(cell.device)
    given = cell.model.calibration
    if given.images is None:
        raise OptionError(f"model '{cell.name}' has no calibration images: say models.{cell.name}.calibration.images")
    found = vision().convert(
        _source(context), str(cell.recipe), config, locate(given.images, context.data),
        weights=weights, count=given.count, statistics=None, watch=context.watch,
    )  # fmt: skip
    if spikeplug.conversion_of(found).architecture == "layers":
        raise OptionError("this network was converted layer by layer: image tasks run captured networks")
    return found.to(cell.device)


def described(context: Context, config: ConversionConfig | None, model: Any) -> dict[str, Any]:
    """Protocol that every task of a network has."""
    cell = context.cell
    assert cell.model is not None
    tensors = list(model.parameters())
    dtypes = {str(each.dtype).removeprefix("torch.") for each in tensors}
    found: dict[str, Any] = {
        "model": cell.model.source + (f", weights {cell.model.weights}" if cell.model.weights else ""),
        "device": ", ".join(sorted({str(each.device) for each in tensors})),
        "dtype": ", ".join(sorted(dtypes)),
        "seed": cell.seed,
    }
    if cell.model.device_map is not None:
        found["device_map"] = cell.model.device_map
    if cell.ranks > 1:
        unknown = ", spikes not counted" if split(cell) else ""
        found["ranks"] = f"{cell.ranks}, {cell.model.parallel} parallel{unknown}"
    if config is not None:
        given = cell.model.calibration
        what = f"{given.tokens} tokens of {given.text}" if given.text else f"{given.count} images of {given.images}"
        encoder, _ = config.build()
        found |= {"calibration": what, "execution": config.execution, "batch_invariant": encoder.static}
        found |= {"code": str(encoder), "steps": encoder.steps}
    return found


def dumped(config: ConversionConfig | None) -> dict[str, Any]:
    """A conversion as a row keeps it."""
    return {} if config is None else config.model_dump(mode="json")


def split(cell: Cell) -> bool:
    """Whether several ranks hold the model together, each of which sees a part of the spikes."""
    return cell.ranks > 1 and cell.model is not None and cell.model.parallel != "data"
