"""The cells that a suite spans."""

from __future__ import annotations

import itertools
import json
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pydantic

from spikeplug import plugins
from spikeplug.errors import OptionError, listed, nearest

from .spec import DENSE, TASKS, Accuracy, Cell, Energy, LmEval, Model, Perplexity, Reconstruction, Throughput
from .suite import Axis, Grid, Suite, first_error


def cells(suite: Suite, change: Axis | None = None) -> list[Cell]:
    """Every point of a suite, each once; the dense counterparts of language models are added.

    Args:
        change: axes that replace those of every grid (`overrides`); an axis of tasks, of those that have it.

    Raises:
        OptionError, UnknownNameError: a value is not allowed, or a name is not known.
    """
    change = change or {}
    found: dict[str, Cell] = {}
    for number, grid in enumerate(suite.grids):
        for cell in _points(suite, number, grid, change):
            found.setdefault(cell.model_dump_json(), cell)
    _require_used(change, list(found.values()))
    for cell in list(found.values()):
        if cell.recipe not in (None, DENSE) and isinstance(cell.task, (Perplexity, LmEval)):
            twin = cell.model_copy(update={"recipe": DENSE, "steps": None, "options": {}, "execution": None})
            found.setdefault(twin.model_dump_json(), twin)
    # Cells of one conversion follow one another, which lets a process keep it; the dense ones come first.
    return sorted(found.values(), key=lambda cell: (cell.name, cell.recipe != DENSE, _conversion_key(cell)))


def _conversion_key(cell: Cell) -> tuple[Any, ...]:
    rest = json.dumps([cell.options, cell.seed, cell.dtype, cell.device], sort_keys=True)
    return cell.recipe or "", cell.steps or 0, rest


def _require_used(change: Axis, found: Sequence[Cell]) -> None:
    for key in change:
        if key.startswith("task.") and not any(key[5:] in type(cell.task).model_fields for cell in found):
            raise OptionError(f"'{key}': no task of this suite has '{key[5:]}'")
        if not key.startswith("task.") and all(isinstance(cell.task, Reconstruction) for cell in found):
            of_codes = ("steps", "seed")
            if key not in of_codes and not key.startswith("options."):
                raise OptionError(
                    f"'{key}': this suite is about codes alone, which have {listed(of_codes)} and options"
                )


def _points(suite: Suite, number: int, grid: Grid, change: Axis) -> Iterator[Cell]:
    where = f"suite '{suite.name}', grids.{number}"
    axes: Axis = {}
    for field in Grid.model_fields:
        if field not in ("options", "task"):
            value = getattr(grid, field)
            # A grid about codes has no model and no recipe that could be replaced.
            replaced = change.get(field) if value is not None or field not in ("model", "recipe") else None
            axes[field] = replaced or (value if isinstance(value, list) else [value])
    axes |= {f"options.{key}": value if isinstance(value, list) else [value] for key, value in grid.options.items()}
    axes |= {key: values for key, values in change.items() if key.startswith("options.")}
    try:
        tasks = suite.tasks_of(grid)
    except OptionError as error:
        raise OptionError(f"{where}: {error}") from None
    _require_full(axes, where)
    for point in itertools.product(*axes.values()):
        chosen = dict(zip(axes, point, strict=True))
        options = {key[8:]: chosen.pop(key) for key in list(chosen) if key.startswith("options.")}
        name, recipes = chosen.pop("model"), chosen.pop("recipe")
        if name is not None and (not isinstance(name, str) or name not in suite.models):
            raise OptionError(
                f"{where}: unknown model '{name}'{nearest(str(name), suite.models)} Models: {listed(suite.models)}"
            )
        model = suite.models[name] if name else None
        wanted = [task for given in tasks for task in _tasks(given, change, where)]
        for recipe, task in itertools.product(_recipes(recipes, model), wanted):
            data = {**chosen, "options": options, "task": task, "name": name or "code", "recipe": recipe}
            data["model"] = model
            data |= _nothing_of(data)
            try:
                cell = Cell.model_validate(data)
            except pydantic.ValidationError as error:
                raise OptionError(f"{where}: {first_error(error, Cell)}") from None
            _require_whole(cell, where)
            yield cell


def _nothing_of(point: Mapping[str, Any]) -> dict[str, Any]:
    """Axes that mean nothing to a point, so that equal cells are one: of a dense network, of a code alone."""
    if point["recipe"] == DENSE:
        return {"steps": None, "options": {}, "execution": None}
    if point["task"]["kind"] == "reconstruction":
        return {"device": "cpu", "execution": None}
    return {}


def _recipes(name: Any, model: Model | None) -> list[Any]:
    """`*`: every installed recipe that is meant for such a model."""
    if name == "*":
        target = "lm" if model and model.calibration.text else "module"
        names = plugins.registry().names("recipe")
        return [each for each in names if target in plugins.get_recipe(each).targets]
    if isinstance(name, str) and name != DENSE:
        plugins.registry().find("recipe", name)
    return [name]


def _tasks(given: dict[str, Any], change: Axis, where: str) -> Iterator[dict[str, Any]]:
    kind = given.get("kind")
    if kind not in TASKS:
        raise OptionError(f"{where}: unknown task {kind!r}{nearest(str(kind), TASKS)} Tasks: {listed(TASKS)}")
    fields = TASKS[kind].model_fields
    for key in given:
        if key not in fields:
            raise OptionError(f"{where}: unknown key 'task.{key}'{nearest(key, fields)} Known: {listed(fields)}")
    axes: Axis = {}
    for key, value in {**given, **_of_task(change, fields)}.items():
        plural = typing.get_origin(fields[key].annotation) is tuple
        nested = isinstance(value, list) and (not plural or any(isinstance(each, list) for each in value))
        axes[key] = value if nested else [value]
    if "encoder" in axes:
        axes["encoder"] = [name for value in axes["encoder"] for name in _encoders(value)]
    _require_full(axes, where)
    for point in itertools.product(*axes.values()):
        yield dict(zip(axes, point, strict=True))


def _of_task(change: Axis, fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key[5:]: values for key, values in change.items() if key.startswith("task.") and key[5:] in fields}


def _require_full(axes: Axis, where: str) -> None:
    for key, values in axes.items():
        if not values:
            raise OptionError(f"{where}: the axis '{key}' has no value; a list that is a value stands in another list")


def _encoders(name: Any) -> list[str]:
    if name == "*":
        return list(plugins.registry().names("encoder"))
    if not isinstance(name, str):
        raise OptionError(f"encoder={name!r}: the name of an encoder is needed")
    plugins.registry().find("encoder", name)
    return [name]


def _require_whole(cell: Cell, where: str) -> None:
    about_code = isinstance(cell.task, Reconstruction)
    if about_code and (cell.model or cell.recipe):
        raise OptionError(f"{where}: the task 'reconstruction' is about an encoder: leave model and recipe out")
    if not about_code and (cell.model is None or cell.recipe is None):
        raise OptionError(f"{where}: the task '{cell.task.kind}' needs a model and a recipe")
    if isinstance(cell.task, (Throughput, Energy)) and (cell.task.text is None) == (cell.task.images is None):
        raise OptionError(f"{where}: the task '{cell.task.kind}' needs text or images, one of them")
    if cell.framework != "torch":
        plugins.registry().find("framework", cell.framework)
        if not isinstance(cell.task, Accuracy):
            raise OptionError(f"{where}: framework '{cell.framework}' runs the task 'accuracy' alone")
    if cell.dtype != "auto" and (about_code or getattr(cell.task, "images", None)):
        raise OptionError(f"{where}: dtype '{cell.dtype}' is for language models")
    shares = cell.model is not None and (cell.model.parallel != "data" or isinstance(cell.task, LmEval))
    if cell.ranks > 1 and isinstance(cell.task, Energy):
        raise OptionError(f"{where}: the task 'energy' counts spikes, of which each of {cell.ranks} ranks sees a part")
    if cell.ranks > 1 and not shares:
        raise OptionError(f"{where}: ranks of parallel 'data' share the items of 'lm-eval', not of '{cell.task.kind}'")
