"""The tasks: what one cell measures. Each opens the network that the cell names, dense or converted."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import spikeplug
from spikeplug.architecture import Opened, Placement, Watch
from spikeplug.cli import language, vision
from spikeplug.config import ConversionConfig
from spikeplug.errors import OptionError
from spikeplug.stats import ActivationStats

from .identity import canonical, code_digest, digest, inputs, locate, versions
from .spec import DENSE, Accuracy, Cell, Energy, LmEval, Perplexity, Reconstruction, Throughput


@dataclasses.dataclass
class Measured:
    """What a task found: see `store.Row`."""

    metrics: dict[str, Any]
    protocol: dict[str, Any]
    timing: dict[str, Any] = dataclasses.field(default_factory=dict)
    detail: dict[str, Any] = dataclasses.field(default_factory=dict)
    config: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Context:
    """Where a cell runs: the folder of its data, one for what may be kept between cells, and who watches."""

    cell: Cell
    id: str
    data: Path
    cache: Path
    watch: Watch


def measure(context: Context) -> Measured:
    """Run the cell's task. Raises SpikeplugError, or what a framework raises."""
    seed = context.cell.seed
    random.seed(seed)
    torch.manual_seed(seed)
    return _MEASURES[context.cell.task.kind](context, context.cell.task)


# Networks


class _Kept:
    """The last network of this process: cells of one conversion follow one another."""

    key: str = ""
    value: Any = None


def _kept(key: str, make: Callable[[], Any]) -> Any:
    if _Kept.key != key:
        _Kept.key, _Kept.value = "", None  # the old one goes before the new one comes
        _Kept.value = make()
        _Kept.key = key
    return _Kept.value


def _conversion(cell: Cell) -> ConversionConfig | None:
    return None if cell.recipe == DENSE else ConversionConfig.resolve(str(cell.recipe), cell.all_options)


def _key(context: Context) -> str:
    cell = context.cell
    fields = cell.model_dump(
        mode="json", include={"model", "recipe", "steps", "options", "execution", "dtype", "device"}
    )
    return canonical([fields, cell.seed, cell.ranks, *_state(context)])


def _state(context: Context) -> list[Any]:
    """What else a network that is kept depends on: files, versions, source code."""
    return [inputs(context.cell, context.data), versions(context.cell), code_digest()]


def _device(cell: Cell) -> str:
    """The device of this process: ranks of data-parallel cells have one each."""
    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if cell.device == "cuda" and cell.ranks > 1 and rank else cell.device


def _source(context: Context) -> str:
    assert context.cell.model is not None
    path = context.data / context.cell.model.source
    return str(path) if path.exists() else context.cell.model.source


def _text_model(context: Context) -> Opened:
    opened: Opened = _kept(_key(context), lambda: _open_text(context, _conversion(context.cell)))
    return opened


def _open_text(context: Context, config: ConversionConfig | None) -> Opened:
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
        if hasattr(opened.model, "spikeplug_config"):
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
        observed = _observed(context, config) if config.build()[0].static else None
        spikeplug.convert(opened.model, config, calibration=batches, observed=observed, watch=context.watch)
    return opened


def converted_folder(context: Context) -> Path:
    """Where the converted model of a cell is kept, for ranks that hold it together."""
    return context.cache / f"converted-{digest(_key(context))[:16]}"


def convert_for_ranks(context: Context) -> None:
    """Convert the model of such a cell in this process, unless it is kept: a rank sees a part of what sites see."""
    config, folder = _conversion(context.cell), converted_folder(context)
    if config is None or folder.is_dir():
        return
    alone = dataclasses.replace(context, cell=context.cell.model_copy(update={"ranks": 1}))
    opened = _open_text(alone, config)
    context.cache.mkdir(parents=True, exist_ok=True)
    spikeplug.save(opened.model, folder, tokenizer=opened.tokenizer)


def _observed(context: Context, config: ConversionConfig) -> Path:
    """File of what the sites saw, which conversions of the same sites share."""
    same = config.model_dump(
        mode="json",
        include={"passes", "pass_options", "include", "exclude", "approximators", "approximator_options", "samples"},
    )
    cell = context.cell
    assert cell.model is not None
    key = [same, cell.model.model_dump(mode="json"), cell.dtype, cell.device, inputs(cell, context.data), code_digest()]
    context.cache.mkdir(parents=True, exist_ok=True)
    return context.cache / f"observed-{digest(key)[:16]}.safetensors"


def _image_model(context: Context) -> Any:
    return _kept(_key(context), lambda: _open_images(context, _conversion(context.cell)))


def _open_images(context: Context, config: ConversionConfig | None) -> Any:
    cell = context.cell
    assert cell.model is not None
    weights = locate(cell.model.weights, context.data) if cell.model.weights else None
    if config is None:
        dense = vision().open(_source(context), weights)
        if hasattr(dense, "spikeplug_config"):
            raise OptionError(f"model '{cell.name}' is a converted one: its dense network is wanted as the source")
        return dense.to(cell.device)
    given = cell.model.calibration
    if given.images is None:
        raise OptionError(f"model '{cell.name}' has no calibration images: say models.{cell.name}.calibration.images")
    found = vision().convert(
        _source(context), str(cell.recipe), config, locate(given.images, context.data),
        weights=weights, count=given.count, observed=None, watch=context.watch,
    )  # fmt: skip
    if not hasattr(found, "observing"):
        raise OptionError("this network was not traced, so its dense twin is gone: give options: {structure: graph}")
    return found.to(cell.device)


def _described(context: Context, config: ConversionConfig | None, model: Any) -> dict[str, Any]:
    """Protocol that every task of a network has."""
    cell = context.cell
    assert cell.model is not None
    tensors = list(model.parameters())
    dtypes = {str(each.dtype).removeprefix("torch.") for each in tensors}
    found: dict[str, Any] = {
        "device": ", ".join(sorted({str(each.device) for each in tensors})),
        "dtype": ", ".join(sorted(dtypes)),
        "seed": cell.seed,
    }
    if cell.model.device_map is not None:
        found["device_map"] = cell.model.device_map
    if cell.ranks > 1:
        unknown = ", spikes not counted" if _split(cell) else ""
        found["ranks"] = f"{cell.ranks}, {cell.model.parallel} parallel{unknown}"
    if config is not None:
        given = cell.model.calibration
        what = f"{given.tokens} tokens of {given.text}" if given.text else f"{given.count} images of {given.images}"
        encoder, _ = config.build()
        found |= {"calibration": what, "execution": config.execution, "batch_invariant": encoder.static}
        found |= {"code": str(encoder), "steps": encoder.steps}
    return found


def _dumped(config: ConversionConfig | None) -> dict[str, Any]:
    return {} if config is None else config.model_dump(mode="json")


def _split(cell: Cell) -> bool:
    """Whether several ranks hold the model together, each of which sees a part of the spikes."""
    return cell.ranks > 1 and cell.model is not None and cell.model.parallel != "data"


def _figures(found: dict[str, Any], unit: str) -> dict[str, Any]:
    """Spikes and energy as metrics."""
    energy = found.get("energy")
    if energy is None:
        return {}
    return {
        "spikes": energy["spikes"],
        "mj_dense": energy["millijoules"]["dense"],
        "mj": energy["millijoules"]["spiking"],
        "energy_ratio": energy["ratio"],
        "energy_ratio_memory": energy["ratio_with_memory"],
        "unit": unit,
    }


# Tasks


def _perplexity(context: Context, task: Perplexity) -> Measured:
    config, opened = _conversion(context.cell), _text_model(context)
    tokens = task.limit * task.seqlen if task.limit else None
    found = language().perplexity(
        opened, locate(task.text, context.data), seqlen=task.seqlen, tokens=tokens, watch=context.watch
    )
    if _split(context.cell):
        found = {key: value for key, value in found.items() if key != "energy"}
    protocol = {**found["protocol"], **_described(context, config, opened.model), "model": context.cell.name}
    protocol |= {"energy": found["energy"]["assumptions"]} if "energy" in found else {}
    metrics = {"perplexity": found["perplexity"], **_figures(found, "token")}
    timing = {"tokens_per_second": found["tokens_per_second"]}
    return Measured(metrics, protocol, timing, {"report": found.get("report", {})}, _dumped(config))


def _lm_eval(context: Context, task: LmEval) -> Measured:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise OptionError(
            f"the task 'lm-eval' needs a package ({error}): pip install spikeplug-bench[lm-eval]"
        ) from None
    from .zeroshot import local_task

    cell, config, opened = context.cell, _conversion(context.cell), _text_model(context)
    folder = locate(task.local, context.data) if task.local else None
    wanted: list[Any] = [local_task(name, folder) if folder else name for name in task.tasks]
    if opened.tokenizer is None:
        raise OptionError(f"model '{cell.name}' has no tokenizer, which lm-eval needs")
    context.cache.mkdir(parents=True, exist_ok=True)
    context.watch(", ".join(task.tasks), 0, None)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model = _watched(HFLM, context)(pretrained=opened.model, tokenizer=opened.tokenizer, batch_size=task.batch_size)
    # The key of lm-eval's cache of answers names no model, so every cell has a file of its own.
    answers = str(context.cache / f"answers-{context.id[:32]}-{code_digest()[:8]}")
    # Its bootstrap forks this process, which torch's threads do not survive; spreads are computed below.
    found: Any = lm_eval.simple_evaluate(
        model=model, tasks=wanted, num_fewshot=task.fewshot, limit=task.limit, use_cache=answers,
        random_seed=cell.seed, numpy_random_seed=cell.seed, torch_random_seed=cell.seed,
        fewshot_random_seed=cell.seed, bootstrap_iters=0, log_samples=True,
    )  # fmt: skip
    if found is None:  # another rank than the first
        return Measured({}, {})
    metrics, detail = _scores(found)
    where = f"local files of {task.local}" if task.local else "hub"
    protocol = {
        "tasks": where, "items": detail["items"], "fewshot": task.fewshot, "batch_size": task.batch_size,
        "lm_eval": lm_eval.__version__, "task_versions": found["versions"], "bos": _starts_with_bos(opened.tokenizer),
        **_described(context, config, opened.model),
    }  # fmt: skip
    return Measured(metrics, protocol, {}, detail, _dumped(config))


def _scores(found: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metrics and details of what lm-eval found."""
    metrics: dict[str, Any] = {}
    detail: dict[str, Any] = {"stderr": {}, "predictions": {}, "items": {}}
    for name, scores in sorted(found["results"].items()):
        for key, value in scores.items():
            metric, _, _ = key.partition(",")
            if isinstance(value, (int, float)) and metric != "alias" and not metric.endswith("_stderr"):
                metrics[f"{name}.{metric}"] = value
        items = found["samples"].get(name)  # a group of tasks has none of its own
        if items is None:
            continue
        detail["items"][name] = len(items)
        for metric in ("acc", "acc_norm"):
            if f"{name}.{metric}" in metrics:
                detail["stderr"][f"{name}.{metric}"] = _spread(metrics[f"{name}.{metric}"], len(items))
        choices = [_choice(sample) for sample in items]
        if None not in choices:
            detail["predictions"][name] = choices
    accuracies = [metrics[f"{name}.acc"] for name in detail["items"] if f"{name}.acc" in metrics]
    if accuracies:
        metrics["mean_acc"] = sum(accuracies) / len(accuracies)
    return metrics, detail


def _choice(sample: dict[str, Any]) -> int | None:
    """What the model chose; of a single continuation, whether it would have written it; None of what it generated."""
    answers = sample["filtered_resps"]
    if not all(isinstance(answer, (list, tuple)) and len(answer) == 2 for answer in answers):
        return None
    if len(answers) == 1:
        return int(answers[0][1])
    return max(range(len(answers)), key=lambda index: float(answers[index][0]))


def _starts_with_bos(tokenizer: Any) -> bool:
    ids = tokenizer("a").input_ids
    return bool(ids) and ids[0] == tokenizer.bos_token_id


def _spread(share: float, items: int) -> float:
    """Standard error of a share."""
    return math.sqrt(share * (1 - share) / max(1, items - 1))


def _watched(base: Any, context: Context) -> Any:
    """HFLM that says how far it is, and under `torchrun` takes its share of the items.

    Given a model and not a name, lm-eval's own would let every rank take all of them.
    """
    shares = context.cell.ranks > 1 and not _split(context.cell)
    if shares and not torch.cuda.is_available():
        # Without it accelerate takes a CPU rank of torchrun for the only process.
        os.environ["ACCELERATE_USE_CPU"] = "true"

    class Watched(base):  # type: ignore[misc]
        calls = 0

        def __init__(self, **given: Any) -> None:
            super().__init__(**given)
            if shares:
                from accelerate import Accelerator

                self.accelerator = Accelerator()
                self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes

        def _model_call(self, *given: Any, **named: Any) -> Any:
            self.calls += 1
            context.watch("batches", self.calls, None)
            return super()._model_call(*given, **named)

    return Watched


def _accuracy(context: Context, task: Accuracy) -> Measured:
    cell, config, model = context.cell, _conversion(context.cell), _image_model(context)
    path = locate(task.images, context.data)
    found = vision().evaluate(
        model, path, count=task.limit, framework=cell.framework, device=cell.device,
        batch=task.batch_size, watch=context.watch,
    )  # fmt: skip
    mine = found.get("spiking", found["dense"])
    metrics = {"top1": mine["top1"], "top5": mine["top5"]}
    timing = {"ms_per_image_dense": found["dense"]["ms_per_image"]}
    detail: dict[str, Any] = {}
    protocol = {**found["protocol"], **_described(context, config, model), "framework": cell.framework}
    if config is not None:
        metrics |= {"top1_dense": found["dense"]["top1"], "agreement": mine["agreement"]}
        metrics |= {"steps_to_result": mine["steps_to_result"], **_figures(found, "image")}
        timing["ms_per_image"] = mine["ms_per_image"]
        detail["spikes_per_neuron"] = found.get("spikes", {}).get("per_neuron", {})
        protocol |= {"energy": found["energy"]["assumptions"]} if "energy" in found else {}
        if task.diagnose and cell.framework == "torch":
            images = vision().images(path, model, task.diagnose)
            batches = (batch.to(cell.device) for batch in images.batches(4))
            detail["sites"] = [dataclasses.asdict(each) for each in spikeplug.diagnose(model, batches)]
            protocol["diagnosed"] = f"{task.diagnose} images"
    return Measured(metrics, protocol, timing, detail, _dumped(config))


_DRAWS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "uniform": lambda uniform, normal: uniform,
    "normal": lambda uniform, normal: normal,
    "half-normal": lambda uniform, normal: normal.abs(),
    "laplace": lambda uniform, normal: torch.sign(uniform - 0.5) * -torch.log1p(-2 * (uniform - 0.5).abs()),
}
"""Values from uniform ones in [0, 1) and standard normal ones."""


def _reconstruction(context: Context, task: Reconstruction) -> Measured:
    generator = torch.Generator().manual_seed(context.cell.seed)
    uniform = torch.rand(task.limit, dtype=torch.float64, generator=generator)
    normal = torch.randn(task.limit, dtype=torch.float64, generator=generator)
    x = _DRAWS[task.distribution](uniform, normal)
    # Of uniform values the range is known, of others it is that of the values.
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64) if task.distribution == "uniform" else x
    code = spikeplug.get_encoder(task.encoder, **context.cell.all_options)
    params = code.fit(ActivationStats.of(ends, ()))
    error = (code.fused(x, params) - x).square()
    width = float(ends.max() - ends.min())
    metrics: dict[str, Any] = {
        "mse": float(error.mean()),
        "mse_stderr": float(error.std()) / len(x) ** 0.5,
        "spikes": float(code.count(x, params).double().mean()),
        "steps": code.steps,
        # Beyond the digits of float64 there is nothing to compare with.
        "floor_binary": width**2 / (12 * (2.0**code.steps - 1) ** 2) if code.steps <= 52 else None,
        "floor_levels": _nearest_error(code, params, x, ends),
    }
    protocol = {
        "values": f"{task.limit:,} of the {task.distribution} distribution, float64, seed {context.cell.seed}",
        "range": "known, [0, 1]" if task.distribution == "uniform" else "that of the values",
        "floor_binary": "R^2 / (12 (2^T - 1)^2): uniform values of range R on 2^T even levels",
        "floor_levels": "every value at the nearest level that this code has",
        "code": str(code),
    }
    return Measured(metrics, protocol)


GRID = 2**20
"""Points at which the levels of a code are looked for."""


def _nearest_error(code: Any, params: Any, x: Tensor, ends: Tensor) -> float | None:
    """Error of rounding to the nearest level of the code; None where it has too many levels to find them all."""
    grid = torch.linspace(float(ends.min()), float(ends.max()), GRID, dtype=torch.float64)
    levels = code.fused(grid, params).unique()
    if len(levels) > GRID // 8:
        return None
    above = (
        torch.searchsorted(levels, x).clamp(1, max(1, len(levels) - 1))
        if len(levels) > 1
        else torch.zeros_like(x).long()
    )
    below = (above - 1).clamp(min=0)
    nearest = torch.minimum((levels[above] - x).abs(), (levels[below] - x).abs())
    return float(nearest.square().mean())


def _batches(context: Context, task: Throughput | Energy, opened: Any) -> tuple[list[Any], str]:
    """Inputs of a network, and what they are."""
    if task.text is not None:
        path = locate(task.text, context.data)
        tokens = task.limit * task.batch_size * task.seqlen
        rows = language().windows(opened, path, seqlen=task.seqlen, tokens=tokens)
        batches = [torch.cat(list(rows[at : at + task.batch_size])) for at in range(0, len(rows), task.batch_size)]
        return batches, f"{len(rows)} windows of {task.seqlen} tokens of {task.text}"
    assert task.images is not None
    count = task.limit * (task.batch_size if isinstance(task, Throughput) else 1)
    images = vision().images(locate(task.images, context.data), opened, count)
    return list(images.batches(task.batch_size)), images.name


def _model(context: Context, task: Throughput | Energy, config: ConversionConfig | None) -> tuple[Any, Any]:
    """The network, and what `_batches` needs to know of it."""
    _Kept.key, _Kept.value = "", None  # it would only take memory
    if task.text is not None:
        opened = _open_text(context, config)
        return opened.model, opened
    model = _open_images(context, config)
    return model, model


def _throughput(context: Context, task: Throughput) -> Measured:
    config = _conversion(context.cell)
    dense, known = _model(context, task, None)
    batches, what = _batches(context, task, known)
    networks = {"dense": dense}
    if config is not None:
        networks["spiking"] = _model(context, task, config)[0]
    best = dict.fromkeys(networks, float("inf"))
    with torch.inference_mode():
        for turn in range(task.repeats + 1):
            context.watch("timing", turn, task.repeats + 1)
            for name, network in networks.items():
                seconds = _seconds(network, batches, context.cell.device)
                best[name] = min(best[name], seconds) if turn else float("inf")  # the first turn warms up
    units = sum(batch.numel() if task.text else len(batch) for batch in batches)
    unit = "tokens" if task.text else "images"
    timing: dict[str, Any] = {f"{unit}_per_second_{name}": units / seconds for name, seconds in best.items()}
    if config is not None:
        timing["time_ratio"] = best["spiking"] / best["dense"]
    protocol = {
        "inputs": what, "batch_size": task.batch_size, "timed": f"fastest of {task.repeats}, in turn, in one process",
        "threads": torch.get_num_threads(), **_described(context, config, dense),
    }  # fmt: skip
    return Measured({}, protocol, timing, {}, _dumped(config))


def _seconds(network: Any, batches: Sequence[Tensor], device: str) -> float:
    _settle(device)
    start = time.perf_counter()
    for batch in batches:
        network(batch.to(device))
    _settle(device)
    return time.perf_counter() - start


def _settle(device: str) -> None:
    kind = torch.device(device).type
    if kind != "cpu":
        getattr(torch, kind).synchronize()


def _energy(context: Context, task: Energy) -> Measured:
    config = _conversion(context.cell)
    if config is None:
        raise OptionError("the task 'energy' compares a converted network with its dense one: give a recipe")
    model, known = _model(context, task, config)
    batches, what = _batches(context, task, known)
    costs = str(locate(task.costs, context.data)) if task.costs.endswith(".json") else task.costs
    found = spikeplug.energy(model, [batch.to(context.cell.device) for batch in batches], costs)
    summary = found.summary()
    unit = "token" if task.text else "image"
    protocol = {"inputs": what, "assumptions": found.assumptions, **_described(context, config, model)}
    detail = {"ops": [dataclasses.asdict(op) for op in found.ops]}
    counts = {key: summary[key] for key in ("dense_macs", "macs", "acs", "updates")}
    return Measured({**counts, **_figures({"energy": summary}, unit)}, protocol, {}, detail, _dumped(config))


_MEASURES: dict[str, Callable[[Context, Any], Measured]] = {
    "perplexity": _perplexity,
    "lm-eval": _lm_eval,
    "accuracy": _accuracy,
    "reconstruction": _reconstruction,
    "throughput": _throughput,
    "energy": _energy,
}
