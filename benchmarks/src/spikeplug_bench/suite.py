"""A suite: the YAML file that spans cells."""

from __future__ import annotations

import itertools
import json
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml

from spikeplug.errors import OptionError, listed, nearest

from .spec import TASKS, Model, Strict

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
        raise OptionError(f"{where}: {first_error(error, Suite)}") from None
    for one, other in itertools.combinations(suite.models, 2):
        if suite.models[one] == suite.models[other]:
            raise OptionError(f"{where}: models '{one}' and '{other}' are the same: their cells would be the same")
    return suite


def first_error(error: pydantic.ValidationError, cls: type[pydantic.BaseModel]) -> str:
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
