"""The tasks: what one cell measures. Each opens the network that the cell names, dense or converted."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import spikeplug
from spikeplug.cli import language, vision
from spikeplug.coding.statistics import ActivationStats
from spikeplug.config import ConversionConfig
from spikeplug.errors import OptionError

from .harness import lm_eval_scores
from .identity import locate
from .networks import (
    Context,
    conversion,
    described,
    dumped,
    forget,
    image_model,
    open_images,
    open_text,
    split,
    text_model,
)
from .spec import Accuracy, Energy, Perplexity, Reconstruction, Throughput
from .store import Measured


def measure(context: Context) -> Measured:
    """Run the cell's task. Raises SpikeplugError, or what a framework raises."""
    seed = context.cell.seed
    random.seed(seed)
    torch.manual_seed(seed)
    return _MEASURES[context.cell.task.kind](context, context.cell.task)


def _figures(found: dict[str, Any], unit: str) -> dict[str, Any]:
    """Spikes and energy as metrics: `spikes` are all, `spikes_charged` those at which energy is counted."""
    energy = found.get("energy")
    if energy is None:
        return {}
    fired = {"spikes": found["spikes"][f"per_{unit}"]} if "spikes" in found else {}
    return {
        **fired,
        "spikes_charged": energy["spikes"],
        "mj_dense": energy["millijoules"]["dense"],
        "mj": energy["millijoules"]["spiking"],
        "energy_ratio": energy["ratio"],
        "energy_ratio_memory": energy["ratio_with_memory"],
        "unit": unit,
    }


def _perplexity(context: Context, task: Perplexity) -> Measured:
    config, opened = conversion(context.cell), text_model(context)
    tokens = task.limit * task.seqlen if task.limit else None
    found = language().perplexity(
        opened, locate(task.text, context.data), seqlen=task.seqlen, tokens=tokens, watch=context.watch
    )
    if split(context.cell):
        found = {key: value for key, value in found.items() if key != "energy"}
    protocol = {**found["protocol"], **described(context, config, opened.model)}
    protocol |= {"energy": found["energy"]["assumptions"]} if "energy" in found else {}
    metrics = {"perplexity": found["perplexity"], **_figures(found, "token")}
    timing = {"tokens_per_second": found["tokens_per_second"]}
    return Measured(metrics, protocol, timing, {"report": found.get("report", {})}, dumped(config))


def _accuracy(context: Context, task: Accuracy) -> Measured:
    cell, config, model = context.cell, conversion(context.cell), image_model(context)
    path = locate(task.images, context.data)
    found = vision().evaluate(
        model, path, count=task.limit, framework=cell.framework, device=cell.device,
        batch=task.batch_size, watch=context.watch,
    )  # fmt: skip
    mine = found.get("spiking", found["dense"])
    metrics = {"top1": mine["top1"], "top5": mine["top5"]}
    timing = {"ms_per_image_dense": found["dense"]["ms_per_image"]}
    detail: dict[str, Any] = {}
    protocol = {**found["protocol"], **described(context, config, model), "framework": cell.framework}
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
    return Measured(metrics, protocol, timing, detail, dumped(config))


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
    forget()  # it would only take memory
    if task.text is not None:
        opened = open_text(context, config)
        return opened.model, opened
    model = open_images(context, config)
    return model, model


def _throughput(context: Context, task: Throughput) -> Measured:
    config = conversion(context.cell)
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
        "threads": torch.get_num_threads(), **described(context, config, dense),
    }  # fmt: skip
    return Measured({}, protocol, timing, {}, dumped(config))


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
    config = conversion(context.cell)
    if config is None:
        raise OptionError("the task 'energy' compares a converted network with its dense one: give a recipe")
    model, known = _model(context, task, config)
    batches, what = _batches(context, task, known)
    costs = str(locate(task.costs, context.data)) if task.costs.endswith(".json") else task.costs
    found = spikeplug.energy(model, [batch.to(context.cell.device) for batch in batches], costs)
    summary = found.summary()
    unit = "token" if task.text else "image"
    protocol = {"inputs": what, "assumptions": found.assumptions, **described(context, config, model)}
    detail = {"ops": [dataclasses.asdict(op) for op in found.ops]}
    counts = {key: summary[key] for key in ("dense_macs", "macs", "acs", "updates")}
    return Measured({**counts, **_figures({"energy": summary}, unit)}, protocol, {}, detail, dumped(config))


_MEASURES: dict[str, Callable[[Context, Any], Measured]] = {
    "perplexity": _perplexity,
    "lm-eval": lm_eval_scores,
    "accuracy": _accuracy,
    "reconstruction": _reconstruction,
    "throughput": _throughput,
    "energy": _energy,
}
