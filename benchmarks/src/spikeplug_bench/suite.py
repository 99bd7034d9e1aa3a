"""A suite: the YAML file that spans cells."""

from __future__ import annotations

import itertools
import json
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml

from spikeplug import plugins
from spikeplug.errors import OptionError, listed, nearest

from .spec import DENSE, TASKS, Accuracy, Cell, Energy, LmEval, Model, Perplexity, Reconstruction, Strict, Throughput

SHIPPED = Path(__file__).parent / "suites"
LARGEST = 2**20
"""Bytes that a suite may have."""

Axis = dict[str, list[Any]]
"""Field of a cell, or `options.NAME`, `task.NAME`, to the values it takes."""


class Suite(Strict):
    """The file.

    Attributes:
        format: version of this format.
        version: of the suite; raised when its cells change.
        models: name in the grids to network.
        tasks: name in the grids to task.
        grids: each a product of axes, where a value or a list of values stands for every field of a cell; `task` is a
            mapping, whose fields are values or lists too, the name of a task, or a list of those.
        compare: figures published elsewhere, shown beside the results and never mixed with them.
    """

    format: Literal[1]
    name: str = pydantic.Field(pattern=r"^[a-z][a-z0-9-]{0,40}$")
    version: int = pydantic.Field(default=1, ge=1)
    title: str
    about: str = ""
    models: dict[str, Model] = pydantic.Field(default_factory=dict)
    tasks: dict[str, dict[str, Any]] = pydantic.Field(default_factory=dict)
    grids: list[Grid] = pydantic.Field(min_length=1)
    compare: list[Published] = pydantic.Field(default_factory=list)

    def tasks_of(self, grid: Grid) -> list[dict[str, Any]]:
        """Tasks of a grid, names resolved. Raises OptionError where there is none of a name."""
        found = []
        for each in grid.task if isinstance(grid.task, list) else [grid.task]:
            if isinstance(each, str) and each not in self.tasks:
                raise OptionError(f"no task '{each}'{nearest(each, self.tasks)} Tasks: {listed(self.tasks)}")
            found.append(self.tasks[each] if isinstance(each, str) else each)
        return found


class Published(Strict):
    """A figure of a paper.

    Attributes:
        metric: the metric of ours that it stands beside.
        source: paper and table; `model` and `label` as the paper calls them.
    """

    label: str
    metric: str
    value: float
    source: str
    model: str = ""
    recipe: str | None = None
    steps: int | None = None
    note: str = ""


class Grid(Strict):
    """A product of axes: each field is a value, or a list of values."""

    model: str | list[str] | None = None
    recipe: str | list[str] | None = None
    steps: int | list[int | None] | None = None
    options: dict[str, Any] = pydantic.Field(default_factory=dict)
    framework: str | list[str] = "torch"
    execution: Literal["fused", "stepped"] | list[Literal["fused", "stepped"] | None] | None = None
    task: str | dict[str, Any] | list[str | dict[str, Any]]
    seed: int | list[int] = 0
    dtype: str | list[str] = "auto"
    device: str | list[str] = "cpu"
    ranks: int | list[int] = 1


Suite.model_rebuild()


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Plain data only: no tags, no anchors (whose aliases can grow without bound), no key twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.composer.ComposerError(None, None, "anchors and aliases are not taken", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key '{key}' stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def shipped() -> list[str]:
    """Names of the suites that come with this package."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def read_suite(source: str | Path) -> Suite:
    """A shipped suite by name, or a YAML file.

    Raises:
        OptionError: there is none, or the file is no suite; the message says where.
    """
    name = str(source)
    path = Path(source)
    if not path.suffix and not path.exists():
        if name not in shipped():
            raise OptionError(
                f"no suite '{name}'{nearest(name, shipped())} Shipped: {listed(shipped())}; or give a file"
            )
        path = SHIPPED / f"{name}.yaml"
    try:
        if path.stat().st_size > LARGEST:
            raise OptionError(f"{path}: a suite has at most {LARGEST:,} bytes")
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"cannot read the suite {path}: {getattr(error, 'strerror', None) or error}") from None
    except RecursionError:
        raise OptionError(f"{path} is no suite: it is nested too deep") from None
    except ValueError as error:
        raise OptionError(f"{path} is no suite: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise OptionError(f"{path}{where}: {getattr(error, 'problem', None) or 'is no YAML'}") from None
    return parse_suite(data, str(path))


def parse_suite(data: Any, where: str = "suite") -> Suite:
    """Validate what a file holds. Raises OptionError."""
    if not isinstance(data, Mapping):
        raise OptionError(f"{where} is no suite: a mapping with format, name, title and grids is needed")
    try:
        suite = Suite.model_validate(data)
    except pydantic.ValidationError as error:
        raise OptionError(f"{where}: {_first(error, Suite)}") from None
    for one, other in itertools.combinations(suite.models, 2):
        if suite.models[one] == suite.models[other]:
            raise OptionError(f"{where}: models '{one}' and '{other}' are the same: their cells would be the same")
    return suite


def _first(error: pydantic.ValidationError, cls: type[pydantic.BaseModel]) -> str:
    """The first thing that is wrong, in one line, with the nearest name for an unknown key."""
    found = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in found["loc"])
    if found["type"] == "extra_forbidden":
        key = str(found["loc"][-1])
        known = _fields_at(cls, found["loc"][:-1])
        return f"unknown key '{place}'{nearest(key, known)} Known: {listed(known)}"
    given = found.get("input")
    said = f" (got {given!r})" if isinstance(given, (str, int, float, bool)) else ""
    return f"{place}: {found['msg']}{said}"


def _fields_at(cls: type[pydantic.BaseModel], path: Sequence[Any]) -> list[str]:
    known: Any = cls
    for part in path:
        fields = getattr(known, "model_fields", {})
        if part in fields:
            known = fields[part].annotation
        elif part in TASKS:
            known = TASKS[part]
        for _ in range(3):  # list[X], dict[str, X], X | None
            inner = [a for a in typing.get_args(known) if isinstance(a, type) and issubclass(a, pydantic.BaseModel)]
            known = inner[0] if inner and not isinstance(known, type(Strict)) else known
    return list(getattr(known, "model_fields", {}))


def json_schema() -> dict[str, Any]:
    """JSON Schema of a suite file, for editors."""
    schema = Suite.model_json_schema()
    tasks = {}
    for kind, cls in TASKS.items():
        tasks[kind] = cls.model_json_schema()
        for field in tasks[kind]["properties"].values():
            if field.get("const") is None:
                axis = {key: field.pop(key) for key in list(field) if key not in ("title", "default", "description")}
                field["anyOf"] = [axis, {"type": "array", "items": axis}]
        tasks[kind]["required"] = ["kind", *tasks[kind].get("required", [])]
    schema["$defs"] |= {cls.__name__: tasks[kind] for kind, cls in TASKS.items()}
    one = {"oneOf": [{"$ref": f"#/$defs/{cls.__name__}"} for cls in TASKS.values()]}
    named = {"anyOf": [{"type": "string"}, one]}
    schema["properties"]["tasks"]["additionalProperties"] = one
    schema["$defs"]["Grid"]["properties"]["task"] = {"anyOf": [named, {"type": "array", "items": named}]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def overrides(words: Sequence[str]) -> Axis:
    """Axes from `key=value,value` words: a value is JSON where it is, else text.

    Raises:
        OptionError: a word is not of that form, or names no axis.
    """
    fields = [name for name in Grid.model_fields if name not in ("options", "task")]
    of_tasks = sorted({f"task.{field}" for cls in TASKS.values() for field in cls.model_fields if field != "kind"})
    found: Axis = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise OptionError(f"'-s {word}': write it as -s key=value, or key=value,value for several")
        if key in found:
            raise OptionError(f"'-s {word}': '{key}' is given twice: write {key}=value,value for several values")
        if key not in fields and key not in of_tasks and not re.fullmatch(r"options\.\w+", key):
            known = [*fields, *of_tasks, "options.NAME"]
            raise OptionError(f"unknown axis '{key}'{nearest(key, known)} Axes: {listed(known)}")
        found[key] = [_value(part) for part in _split(text)]
    return found


def _split(text: str) -> list[str]:
    """Parts between commas that are in no bracket and no quote."""
    parts, depth, quoted = [""], 0, False
    for letter in text:
        quoted ^= letter == '"'
        depth += 0 if quoted else (letter in "[{") - (letter in "]}")
        if letter == "," and not depth and not quoted:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def cells(suite: Suite, change: Axis | None = None) -> list[Cell]:
    """Every point of a suite, each once; the dense twins of language models are added.

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
                raise OptionError(f"{where}: {_first(error, Cell)}") from None
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
