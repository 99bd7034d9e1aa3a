"""A stranger's package brings operations, a layer and a family of models; nothing of core is touched."""

from __future__ import annotations

import os
import subprocess
import sys

PLUGIN = '''
"""Operations of a library of their own, and a family of models, in one module."""

import torch
from spikeplug import hookimpl

spikeplug_api = 1


@hookimpl
def spikeplug_operations():
    return {
        "theirs.swish.default": "spike_plugin_theirs:SWISH",
        "theirs.rotate_rows.default": "spikeplug.graph.operations:LINEAR",
        "theirs.project.default": "spike_plugin_theirs:project",
    }


@hookimpl
def spikeplug_architectures():
    return {"theirs": "spike_plugin_theirs_family:Family"}


@hookimpl
def spikeplug_architecture_of(model):
    return "theirs" if type(model).__name__ == "TheirModel" else None


@torch.library.custom_op("theirs::swish", mutates_args=())
def swish(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


swish.register_fake(lambda x: torch.empty_like(x))


@torch.library.custom_op("theirs::rotate_rows", mutates_args=())
def rotate_rows(x: torch.Tensor, by: int) -> torch.Tensor:
    return torch.roll(x, by, -1)


rotate_rows.register_fake(lambda x, by: torch.empty_like(x))


@torch.library.custom_op("theirs::project", mutates_args=())
def project_(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x @ weight


project_.register_fake(lambda x, weight: x.new_empty(*x.shape[:-1], weight.shape[1]))


def project(node):
    from spikeplug.graph.operations import Kind

    return Kind("nonlinear", op="project", elementwise=False)


def __getattr__(name):
    if name == "SWISH":
        from spikeplug.graph.operations import Kind

        return Kind("nonlinear", op="swish")
    raise AttributeError(name)
'''

FAMILY = '''
from spikeplug.conversion.networks import Networks
from spikeplug.conversion.sharing import shared_copy


class Family(Networks):
    """Their models are captured without their head's temperature."""

    def plan(self, model, config, batches):
        model = shared_copy(model)
        model.temperature = 1.0
        return super().plan(model, config, batches)
'''

CODE = """
import torch
from torch import nn
import spikeplug
from spikeplug import plugins
import spike_plugin_theirs


class TheirLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.weight = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 6) / 3)

    def forward(self, x):
        x = torch.ops.theirs.rotate_rows(torch.relu(self.inner(x)), 2)
        return torch.ops.theirs.project(torch.ops.theirs.swish(x), self.weight)


class TheirModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head, self.temperature = TheirLayer(), nn.Linear(6, 3), 2.0

    def forward(self, x):
        return self.head(self.layer(x)) / self.temperature


torch.manual_seed(0)
x = torch.rand(20, 8)
for recipe, steps in (("bse", 16), ("css", 24)):
    net = nn.Sequential(TheirLayer(), nn.Linear(6, 3)).eval()
    spiking = spikeplug.convert(net, recipe, calibration=[x], steps=steps)
    with torch.no_grad():
        dense = net(x)
        assert 0 < (spiking(x) - dense).norm() < 0.01 * dense.norm()
        roles = {op.name: op.role for op in spikeplug.report(spiking).ops}
        assert roles["0.inner"] == roles["1"] == "spiking", roles
        assert roles["0.swish"] == roles["0"] == "dense", roles
        spikeplug.save(spiking, f"net-{recipe}")
        assert torch.equal(spikeplug.load(f"net-{recipe}")(x), spiking(x))
model = TheirModel().eval()
with torch.no_grad():
    dense = model(x)
    spiking = spikeplug.convert(model, "bse", calibration=[x], verify=False)
    assert (spiking(x) - 2 * dense).norm() < 0.01 * dense.norm()
    assert torch.equal(model(x), dense)
assert "theirs.swish.default" in plugins.registry().names("operation")
"""


def test_operations_layers_and_families_of_a_stranger(tmp_path):
    (tmp_path / "spike_plugin_theirs.py").write_text(PLUGIN)
    (tmp_path / "spike_plugin_theirs_family.py").write_text(FAMILY)
    info = tmp_path / "spike_plugin_theirs-0.1.0.dist-info"  # what pip would write for its pyproject.toml
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: spike-plugin-theirs\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[spikeplug]\ntheirs = spike_plugin_theirs\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
