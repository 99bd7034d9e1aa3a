"""Suites: what they span, what two cells have in common, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from spikeplug.errors import OptionError, UnknownNameError
from spikeplug_bench import identity
from spikeplug_bench.cells import cells
from spikeplug_bench.spec import DENSE, Cell
from spikeplug_bench.suite import SHIPPED, json_schema, overrides, parse_suite, read_suite, shipped

TEXT = """
format: 1
name: mine
title: Mine
models:
  net: {source: "m:f", weights: w.safetensors, calibration: {images: train}}
  lm: {source: folder, calibration: {text: t.txt}}
grids:
  - {model: net, recipe: rate, steps: [4, 8], options: {include: [["a", "b"]]},
     task: {kind: accuracy, images: test, limit: [10, 20]}}
  - model: lm
    recipe: [rate]
    task: [{kind: perplexity, text: t.txt}, {kind: lm-eval, tasks: [piqa, boolq], local: z}]
"""


@pytest.fixture
def suite():
    return parse_suite(yaml.safe_load(TEXT))


def test_lists_are_axes_and_lists_in_lists_are_values(suite):
    found = [cell for cell in cells(suite) if cell.name == "net"]
    assert {(cell.steps, cell.task.limit) for cell in found} == {(4, 10), (4, 20), (8, 10), (8, 20)}
    assert all(cell.options == {"include": ["a", "b"]} for cell in found)
    assert found[0].all_options == {"include": ["a", "b"], "steps": found[0].steps}


def test_language_models_get_their_dense_twins_once_and_first(suite):
    found = [cell for cell in cells(suite) if cell.name == "lm"]
    assert [(cell.recipe, cell.task.kind) for cell in found] == [
        (DENSE, "perplexity"), (DENSE, "lm-eval"), ("rate", "perplexity"), ("rate", "lm-eval"),
    ]  # fmt: skip
    assert found[1].task.tasks == ("piqa", "boolq")


def test_overrides_replace_axes_of_every_grid_and_of_tasks_that_have_them(suite):
    change = overrides(["steps=16,32", "task.limit=3", "task.seqlen=64", "options.include=null", "seed=0,1"])
    found = cells(suite, change)
    assert {cell.steps for cell in found if cell.recipe != DENSE} == {16, 32}
    assert {cell.task.limit for cell in found} == {3}
    assert {cell.seed for cell in found} == {0, 1}
    assert next(cell.task.seqlen for cell in found if cell.task.kind == "perplexity") == 64


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("stepps=1", "unknown axis 'stepps', did you mean 'steps'?"),
        ("task.limits=1", "did you mean 'task.limit'?"),
        ("steps", "write it as -s key=value"),
    ],
)
def test_unknown_axes_are_named(word, says):
    with pytest.raises(OptionError, match=says):
        overrides([word])


def test_commas_in_brackets_and_quotes_part_nothing():
    change = overrides(['options.x={"a":{"b":1},"c":{"d":2}},[[1,2],[3]],"p,q",r'])
    assert change["options.x"] == [{"a": {"b": 1}, "c": {"d": 2}}, [[1, 2], [3]], "p,q", "r"]


def test_names_that_are_no_names_are_refused(suite):
    with pytest.raises(OptionError, match="unknown model"):
        cells(suite, {"model": [[1]]})
    with pytest.raises(OptionError, match="encoder=1: the name of an encoder is needed"):
        cells(read_suite("encodings"), {"task.encoder": [1]})


def test_an_axis_of_a_task_that_no_task_has_is_refused(suite):
    with pytest.raises(OptionError, match="no task of this suite has 'distribution'"):
        cells(suite, overrides(["task.distribution=normal"]))


def _changed(path: str, value: object) -> dict:
    data = yaml.safe_load(TEXT)
    *way, last = path.split(".")
    place = data
    for part in way:
        place = place[int(part)] if part.isdigit() else place[part]
    if isinstance(last, str) and last.isdigit():
        last = int(last)
    place[last] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("grid", [], r"unknown key 'grid', did you mean 'grids'\?"),
        ("grids.0.step", 4, r"unknown key 'grids.0.step', did you mean 'steps'\?"),
        ("models.net.weight", "w", r"unknown key 'models.net.weight', did you mean 'weights'\?"),
        ("models.net.calibration.tokns", 1, r"did you mean 'tokens'\?"),
        ("format", 2, "format: Input should be 1"),
        ("name", "No Name", "name: String should match pattern"),
        ("grids", [], "at least 1 item"),
    ],
)
def test_files_that_are_no_suites(path, value, says):
    with pytest.raises(OptionError, match=says):
        parse_suite(_changed(path, value))


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("grids.0.model", "nett", r"unknown model 'nett', did you mean 'net'\?"),
        ("grids.0.recipe", "ratte", r"unknown recipe 'ratte', did you mean 'rate'\?"),
        ("grids.0.task.kind", "accurracy", r"unknown task 'accurracy', did you mean 'accuracy'\?"),
        ("grids.0.task.limits", 3, r"unknown key 'task.limits', did you mean 'limit'\?"),
        ("grids.0.steps", 0, "steps: Input should be greater than or equal to 1"),
        ("grids.0.framework", "torhc", "unknown framework 'torhc'"),
        ("grids.0.dtype", "float8", "dtype: Input should be"),
        ("grids.0.task", {"kind": "throughput"}, "needs text or images"),
        ("grids.0.task", {"kind": "reconstruction", "encoder": "rate"}, "leave model and recipe out"),
        ("grids.0.model", None, "needs a model and a recipe"),
        ("grids.0.steps", [], "the axis 'steps' has no value"),
        ("grids.0.options", {"beta": []}, "the axis 'options.beta' has no value"),
        ("grids.0.dtype", "float16", "dtype 'float16' is for language models"),
        ("grids.0.ranks", 2, "share the items of 'lm-eval', not of 'accuracy'"),
        (
            "models.other",
            {"source": "m:f", "weights": "w.safetensors", "calibration": {"images": "train"}},
            "are the same",
        ),
    ],
)
def test_values_that_are_not_allowed(path, value, says):
    def read() -> None:
        cells(parse_suite(_changed(path, value)))

    with pytest.raises((OptionError, UnknownNameError), match=says):
        read()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: !!python/object/apply:os.system [echo]", "could not determine a constructor"),
        ("a: &x [1]\nb: *x", "anchors and aliases are not taken"),
        ("a: &a [x]\nb: &b [*a, *a]\nc: [*b, *b]", "anchors"),
        ("a: 1\na: 2", "line 1: the key 'a' stands twice"),
        ("a: [1", "line"),
        ("- 1", "is no suite: a mapping"),
        ("", "is no suite: a mapping"),
        ("[" * 5000, "nested too deep|is no YAML|line"),
        ("? [a]\n: 1", "line|is no suite"),
        ("title: 2024-13-45", "is no suite: month must be in"),
    ],
)
def test_hostile_yaml_is_one_line(tmp_path, text, says):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(OptionError, match=says) as caught:
        read_suite(tmp_path / "s.yaml")
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "large.yaml").write_text("#" * (2**20 + 1))
    for name, says in (
        ("b.yaml", "cannot read|is no YAML|special characters"),
        ("large.yaml", "at most"),
        ("no.yaml", "No such file"),
    ):
        with pytest.raises(OptionError, match=says):
            read_suite(tmp_path / name)
    with pytest.raises(OptionError, match=r"no suite 'smok', did you mean 'smoke'\?"):
        read_suite("smok")


@pytest.mark.parametrize("name", shipped())
def test_shipped_suites_span_cells_and_fit_the_schema(name):
    jsonschema.validate(yaml.safe_load((SHIPPED / f"{name}.yaml").read_text()), json_schema())
    suite = read_suite(name)
    assert suite.name == name
    found = cells(suite)
    # Published figures name what the suite measures.
    measured = {cell.recipe or getattr(cell.task, "encoder", None) for cell in found}
    assert {each.recipe for each in suite.compare} - {None} <= measured
    assert {each.metric for each in suite.compare} <= {"mse", "top1", "perplexity"}


def test_the_schema_refuses_what_the_reader_refuses():
    for path, value in (("grids.0.step", 4), ("grids.0.task.limits", 3), ("models.net.weight", "w"), ("format", 2)):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(_changed(path, value), json_schema())
    jsonschema.validate(yaml.safe_load(TEXT), json_schema())


def test_the_published_schema_is_that_of_the_code():
    published = Path(__file__).parents[2] / "docs" / "suite.schema.json"
    assert json.loads(published.read_text()) == json.loads(json.dumps(json_schema()))


# Identity


def _cell(**more) -> Cell:
    return Cell.model_validate({"name": "code", "task": {"kind": "reconstruction", "encoder": "rate"}, **more})


def test_an_id_is_that_of_the_point_the_versions_and_the_files(tmp_path, monkeypatch):
    cell = _cell(steps=4)
    first = identity.cell_id(cell, tmp_path)
    assert first == identity.cell_id(_cell(steps=4, name="other"), tmp_path)  # what a suite calls it is no matter
    assert first != identity.cell_id(_cell(steps=5), tmp_path)
    assert first != identity.cell_id(_cell(steps=4, seed=1), tmp_path)
    monkeypatch.setattr(identity, "_version", lambda name: "9.9")
    assert first != identity.cell_id(cell, tmp_path)
    assert identity.point_of(cell) == identity.point_of(_cell(steps=4))


def test_an_id_changes_with_what_is_in_a_folder_or_in_prices(tmp_path):
    (tmp_path / "images").mkdir()
    task = {"kind": "energy", "images": "images", "costs": "mine.json"}
    cell = Cell.model_validate({"name": "a", "model": {"source": "m:f"}, "recipe": "rate", "task": task})
    found = set()
    for prices, image in (("{}", "one"), ("{ }", "one"), ("{}", "two")):  # of one length
        (tmp_path / "mine.json").write_text(prices)
        (tmp_path / "images" / "a.png").write_text(image)
        identity.fingerprint.cache_clear()
        found.add(identity.digest(identity.inputs(cell, tmp_path)))
    assert len(found) == 3


def test_an_id_changes_with_the_text_that_a_cell_reads(tmp_path):
    cell = Cell.model_validate(
        {"name": "a", "model": {"source": "m"}, "recipe": DENSE, "task": {"kind": "perplexity", "text": "t.txt"}}
    )
    with pytest.raises(OptionError, match=r"'t.txt' is not in the data folder"):
        identity.cell_id(cell, tmp_path)
    found = []
    for text in ("one", "two"):
        (tmp_path / "t.txt").write_text(text)
        identity.fingerprint.cache_clear()
        found.append(identity.cell_id(cell, tmp_path))
    assert found[0] != found[1]


def test_versions_are_those_of_what_parts_lean_on():
    task = {"kind": "perplexity", "text": "t.txt"}
    cell = Cell.model_validate({"name": "a", "model": {"source": "m"}, "recipe": "qc-a2s", "task": task})
    found = identity.versions(cell)
    assert {"spike-plugin-ttfs", "spikeplug-transformers", "torchao"} <= set(found)
    assert "torchao" not in identity.versions(cell.model_copy(update={"recipe": "ttfs"}))


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.none() | st.booleans(), max_size=5))
def test_the_canonical_form_knows_no_order(data):
    assert identity.digest(data) == identity.digest(dict(reversed(list(data.items()))))
    assert json.loads(identity.canonical(data)) == data


def test_a_task_has_a_name():
    data = {
        "format": 1, "name": "named", "title": "t", "tasks": {"code": {"kind": "reconstruction", "encoder": "rate"}},
        "grids": [{"task": ["code", {"kind": "reconstruction", "encoder": "bse"}], "steps": 4}],
    }  # fmt: skip
    assert [cell.task.encoder for cell in cells(parse_suite(data))] == ["rate", "bse"]
    data["grids"][0]["task"] = "cod"
    with pytest.raises(OptionError, match=r"grids.0: no task 'cod', did you mean 'code'\? Tasks: code"):
        cells(parse_suite(data))


def test_axes_that_mean_nothing_make_no_cells():
    """A dense network has no steps and no options, a code alone no device: their cells would be equal."""
    data = yaml.safe_load(TEXT)
    data["grids"] = [
        {"model": "net", "recipe": ["dense", "rate"], "steps": [4, 8], "options": {"percentile": [99.0, 100.0]},
         "task": {"kind": "accuracy", "images": "val"}},
        {"task": {"kind": "reconstruction", "encoder": "rate"}, "device": ["cpu", "cuda"]},
    ]  # fmt: skip
    found = cells(parse_suite(data))
    assert [cell.recipe for cell in found].count(DENSE) == 1
    assert [cell.recipe for cell in found].count("rate") == 4
    assert [cell.device for cell in found if cell.task.kind == "reconstruction"] == ["cpu"]


def test_axes_that_nothing_uses_are_refused(codes):
    for word in ("recipe=bse", "model=net", "device=cuda"):
        with pytest.raises(OptionError, match="this suite is about codes alone"):
            cells(codes, overrides([word]))
    with pytest.raises(OptionError, match=r"'steps' is given twice: write steps=value,value"):
        overrides(["steps=4", "steps=8"])


def test_ranks_that_hold_one_model_count_no_energy():
    model = {"source": "a", "parallel": "tensor", "calibration": {"text": "t.txt"}}
    grid = {"model": "net", "recipe": "rate", "ranks": 2, "task": {"kind": "energy", "text": "t.txt"}}
    suite = parse_suite({"format": 1, "name": "a", "title": "A", "models": {"net": model}, "grids": [grid]})
    with pytest.raises(OptionError, match="counts spikes, of which each of 2 ranks sees a part"):
        cells(suite)


def test_an_id_changes_with_images_behind_a_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "val").symlink_to(tmp_path / "elsewhere")
    found = set()
    for image in ("one", "two"):
        (tmp_path / "elsewhere" / "a.png").write_text(image)
        identity.fingerprint.cache_clear()
        found.add(identity.fingerprint(tmp_path / "images"))
    assert len(found) == 2


def test_cells_of_one_conversion_follow_one_another(codes):
    assert [cell.steps for cell in cells(codes)] == sorted(cell.steps for cell in cells(codes))
