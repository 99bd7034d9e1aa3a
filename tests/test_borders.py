"""Rules that hold across distributions: who imports whom, one version, no pickle, documented hooks."""

from __future__ import annotations

import ast
import importlib
import re
import tomllib
from pathlib import Path

import pytest

from spikeplug.plugins import CHOOSER, KINDS, hookspecs

ROOT = Path(__file__).parent.parent
PROJECTS = sorted(path for path in ROOT.glob("*/pyproject.toml")) + sorted(ROOT.glob("*/*/pyproject.toml"))
SOURCES = {path.name: sorted(path.rglob("*.py")) for project in PROJECTS for path in (project.parent / "src").iterdir()}

ALLOWED = {
    "spikeplug": {"torch", "numpy", "pluggy", "pydantic", "safetensors", "typer", "rich", "pytest", "hypothesis"},
    "plugin": {"spikeplug", "torch", "safetensors", "typer"},
    "integration": {"spikeplug", "torch", "safetensors", "typer", "rich"}
    | {"transformers", "accelerate", "huggingface_hub", "gguf", "jinja2", "matplotlib", "torchao"}
    | {"torchvision", "timm", "PIL", "spikingjelly", "snntorch", "spikeplug_lava_runtime", "numpy", "nir", "h5py"},
    "runtime": {"numpy", "safetensors", "scipy", "lava", "sanafe"},
    "bench": {"spikeplug", "torch", "numpy", "safetensors", "typer", "rich", "pydantic", "yaml", "jinja2", "matplotlib"}
    | {"lm_eval", "ray", "submitit", "accelerate", "PIL"},
}
"""What each kind of distribution may import besides the standard library and itself."""


def _imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", SOURCES)
def test_imports_stay_within_the_borders(package):
    import sys

    kinds = {"spikeplug": "spikeplug", "spikeplug_bench": "bench", "spikeplug_lava_runtime": "runtime"}
    kind = "plugin" if package.startswith("spike_plugin_") else kinds.get(package, "integration")
    for file in SOURCES[package]:
        foreign = _imports(file) - set(sys.stdlib_module_names) - {package} - ALLOWED[kind]
        assert not foreign, f"{file.relative_to(ROOT)} imports {foreign}"


ROOMS = ("errors", "files", "plugins", "coding", "config", "graph", "conversion", "measure", "cli", "testing")
"""Modules and folders of core, in an order in which nothing imports what comes later, but for types and look-ups."""


def test_nothing_in_core_imports_what_stands_on_it():
    root = ROOT / "core" / "src" / "spikeplug"
    for file in SOURCES["spikeplug"]:
        parts = file.relative_to(root).with_suffix("").parts
        if parts[0] in ("__init__", "__main__") or parts == ("plugins", "builtin"):  # it names parts of all rooms
            continue
        for node in ast.parse(file.read_text()).body:
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for room in (module.split(".")[1] for module in modules if module.startswith("spikeplug.")):
                assert ROOMS.index(room) <= ROOMS.index(parts[0]), f"{file.relative_to(root)} imports {room}"


def test_only_the_kit_imports_test_tools():
    for file in SOURCES["spikeplug"]:
        if "testing" not in file.parts:
            assert not _imports(file) & {"pytest", "hypothesis"}, file


def test_all_distributions_have_one_version():
    projects = [tomllib.loads(path.read_text())["project"] for path in PROJECTS]
    versions = {project["version"] for project in projects}
    assert len(versions) == 1
    for project in projects:
        for need in project["dependencies"]:
            if need.startswith("spikeplug"):
                assert need.split("==")[1] in versions
    assert importlib.import_module("spikeplug").__version__ in versions


def test_nothing_is_pickled():
    banned = re.compile(r"\bpickle\b|torch\.save\(|torch\.load\((?!.*weights_only=True)|joblib|allow_pickle")
    for files in SOURCES.values():
        for file in files:
            assert not banned.search(file.read_text()), file


def test_every_hook_is_a_kind_and_is_documented():
    hooks = {name for name in vars(hookspecs) if name.startswith("spikeplug_")}
    assert hooks == {*KINDS.values(), CHOOSER}
    text = (ROOT / "core/README.md").read_text()
    for hook in hooks:
        assert f"`{hook}`" in text, f"core/README.md does not say what {hook} is for"
        assert getattr(hookspecs, hook).__doc__


@pytest.mark.parametrize("project", PROJECTS, ids=lambda path: path.parent.name)
def test_every_distribution_has_what_it_needs(project):
    folder = project.parent
    assert (folder / "README.md").read_text().count("\n") > 5
    assert next((folder / "src").iterdir()).joinpath("py.typed").exists()
    assert list((folder / "tests").glob("test_*.py"))
