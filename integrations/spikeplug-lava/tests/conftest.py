from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest


def _digits():
    spec = importlib.util.spec_from_file_location("spikeplug_lava_digits", Path(__file__).parent / "digits.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def digits():
    """The networks for digits: `digits.py`."""
    return _digits()


@pytest.fixture(scope="session")
def nets(digits):
    """Trained networks by kind and by whether they have activations."""
    return {
        (kind, activation): digits.trained(kind, activation) for kind in ("mlp", "cnn") for activation in (True, False)
    }


@pytest.fixture(scope="session")
def exported(digits, nets, tmp_path_factory):
    """What `Lava(golden=100)` made of a network under a recipe: the converted model, the file, the report."""
    from spikeplug_lava.exporter import Lava

    folder, made = tmp_path_factory.mktemp("exported"), {}

    def make(kind: str, name: str):
        if (kind, name) not in made:
            model = digits.converted(nets[kind, name != "tsa"], name)
            path = folder / f"{kind}-{name}.safetensors"
            made[kind, name] = (model, path, Lava(golden=100).export(model, path, digits.held_out()))
        return made[kind, name]

    return make
