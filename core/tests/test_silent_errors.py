"""What would be another function without a word: each is right here, or refused with what to do."""

from __future__ import annotations

import collections
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import spikeplug
from spikeplug.conversion.bundle import _digest, _sha256
from spikeplug.errors import BundleError, ConversionError, OptionError


def module(function, **layers):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            for name, layer in layers.items():
                setattr(self, name, layer)

    Net.forward = function
    return Net().eval()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def assert_near(net, *given, recipe="rate", limit=0.01, calibration=None, **named):
    with torch.no_grad():
        dense = net(*given, **named)
        batch = calibration if calibration is not None else (dict(named) if named else given)
        spiking = spikeplug.convert(net, recipe, calibration=[batch], steps=1024)
        found = spiking(*given, **named)
    first = found if isinstance(found, torch.Tensor) else found[0]
    wanted = dense if isinstance(dense, torch.Tensor) else dense[0]
    assert (first - wanted).abs().max() < limit * wanted.abs().max()
    return spiking


def test_a_branch_on_sizes_holds_for_sizes_that_take_it():
    def forward(self, x):
        h = torch.relu(self.a(x))
        h = F.max_pool2d(h, 2) if x.shape[-1] > 12 else h
        h = F.pad(h, (0, 1)) if x.shape[-2] % 2 else h
        return self.b(h).mean((2, 3)) * (2 if x.shape[0] > 100 else 1)

    net = module(forward, a=nn.Conv2d(3, 8, 3, padding=1), b=nn.Conv2d(8, 4, 3, padding=1))
    spiking = assert_near(net, torch.rand(2, 3, 16, 16))
    with torch.no_grad():
        for shape in ((1, 3, 16, 16), (5, 3, 20, 14)):
            x = torch.rand(shape)
            torch.testing.assert_close(spiking(x), net(x), rtol=0, atol=0.02)
    for shape in ((2, 3, 16, 8), (2, 3, 15, 16), (101, 3, 16, 16)):
        with pytest.raises(
            OptionError, match=r"branches on sizes, and was converted with such that .*convert it with such an example"
        ):
            spiking(torch.rand(shape))


@pytest.mark.parametrize("squeezed", [lambda h: h.squeeze(), lambda h: h.squeeze(0), lambda h: h.squeeze((0, 2))])
def test_a_squeeze_that_would_leave_out_the_samples_is_refused(squeezed):
    net = module(lambda self, x: squeezed(self.a(x)), a=nn.Linear(3, 2))
    spiking = assert_near(net, torch.rand(2, 4, 3))
    spiking(torch.rand(3, 4, 3))
    with pytest.raises(OptionError, match="is not 1, which squeeze"):
        spiking(torch.rand(1, 4, 3))


def test_a_condition_with_an_unknown_function_holds_for_the_sizes_of_the_example():
    net = module(lambda self, x: self.a(x if x.shape[1] ** 0.5 < 3 else -x), a=nn.Linear(3, 2))
    spiking = assert_near(net, torch.rand(2, 4, 3))
    with pytest.raises(OptionError, match="branches on sizes"):
        spiking(torch.rand(2, 16, 3))


def test_inputs_whose_sizes_were_the_same_stay_so():
    net = module(lambda self, x, t: self.a(x) * t[:, None], a=nn.Linear(3, 2))
    with torch.no_grad():
        x, t = torch.rand(4, 3), torch.rand(4)
        spiking = spikeplug.convert(net, "rate", steps=63, calibration=[(x, t)])
        torch.testing.assert_close(spiking(x[:3], t[:3]), net(x[:3], t[:3]), rtol=0, atol=0.05)
        with pytest.raises(OptionError, match="two sizes are the same"):
            spiking(x, t[:1])


def test_what_has_no_samples_is_counted_whole():
    net = module(lambda self, x, e: self.a(x) @ self.b(e).mT, a=nn.Linear(3, 2), b=nn.Linear(5, 2))
    spiking = spikeplug.convert(net, "rate", steps=15, calibration=[{"x": torch.rand(4, 3), "e": torch.rand(7, 5)}])
    assert {op.name: op.macs for op in spikeplug.report(spiking).ops if op.macs} == {"a": 6, "b": 70, "matmul": 14}


def test_guards_are_saved(tmp_path):
    net = module(lambda self, x: self.a(x if x.shape[-2] > 4 else -x), a=nn.Linear(3, 2))
    spikeplug.save(assert_near(net, torch.rand(2, 6, 3)), tmp_path / "net")
    loaded = spikeplug.load(tmp_path / "net")
    loaded(torch.rand(2, 5, 3))
    with pytest.raises(OptionError, match="branches on sizes"):
        loaded(torch.rand(2, 4, 3))


@torch.no_grad()
@pytest.mark.parametrize("recipe", ["rate", "streaming"])
def test_masks_and_indices_are_made_of_values(recipe, third_party):
    def forward(self, x):
        h = self.a(x)
        return torch.where(h > 0, h, 0.1 * h), h.argmax(-1), torch.relu(h) * (h > 0.2).float()

    net = module(forward, a=nn.Linear(8, 4))
    x = torch.rand(16, 8) * 2 - 1
    spiking = spikeplug.convert(net, recipe, calibration=[x], steps=512)
    for given in (x, x[:1], x[:3]):
        for one, other in zip(net(given), spiking(given), strict=True):
            assert one.shape == other.shape
            assert (one.double() - other.double()).norm() < 0.1 * one.double().norm() + 0.1


@torch.no_grad()
def test_samples_of_large_batches_meet_where_they_do_in_the_dense_network(third_party, monkeypatch):
    monkeypatch.setattr("spikeplug.graph.network.MICRO_BATCH", 4 * 64 * 8)

    def of_largest(self, x, n):
        w = n.float()
        return self.b(torch.relu(self.a(x))) * (w / w.max())[:, None]

    def less_first(self, x, n):
        h = torch.relu(self.a(x))
        return self.b(h) - self.b(h)[torch.zeros(x.shape[0], dtype=torch.long)]

    for forward in (of_largest, less_first):
        net = module(forward, a=nn.Linear(8, 8), b=nn.Linear(8, 4))
        x, n = torch.rand(40, 8), torch.arange(1, 41)
        spiking = spikeplug.convert(net, "streaming", calibration=[(x, n)], steps=256)
        assert (spiking(x, n) - net(x, n)).norm() < 0.05 * net(x, n).norm()


@torch.no_grad()
def test_padding_with_a_value_is_added_once(third_party):
    for pad in (lambda h: torch.constant_pad_nd(h, [0, 2], 1.0), lambda h: F.pad(h, (0, 2), value=1.0)):
        net = module(
            lambda self, x, pad=pad: self.b(pad(torch.relu(self.a(x)))), a=nn.Linear(8, 14), b=nn.Linear(16, 5)
        )
        assert_near(net, torch.rand(16, 8), recipe="streaming", limit=0.05)


@torch.no_grad()
@pytest.mark.parametrize("recipe", ["rate", "streaming"])
def test_constants_join_trains_as_values(recipe, third_party):
    def forward(self, x):
        h = torch.relu(self.a(x))
        h = torch.cat([self.token.expand(x.shape[0], -1, -1), h], 1) + torch.arange(h.shape[1] + 1)[:, None] * 0.1
        return self.b(h) + self.position

    net = module(forward, a=nn.Linear(8, 8), b=nn.Linear(8, 4))
    net.token, net.position = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 6, 4))
    assert_near(net, torch.rand(4, 5, 8), recipe=recipe, limit=0.02)


def test_inputs_by_name_in_any_order():
    net = module(lambda self, x, y: self.a(x - 2 * y), a=nn.Linear(8, 4))
    x, y = torch.rand(16, 8), torch.rand(16, 8)
    spiking = assert_near(net, y=y, x=x)
    with torch.no_grad():
        assert torch.equal(spiking(x, y), spiking(y=y, x=x))
        assert torch.equal(spiking(x, y=y), spiking(y=y, x=x))
    with pytest.raises(OptionError, match="'x' is given twice"):
        spiking(x, x=y)


def test_a_misfit_within_a_nest_is_named():
    net = module(lambda self, x, pair: self.a(x + pair[0]) + pair[1], a=nn.Linear(8, 4))
    given = torch.rand(4, 8), [torch.rand(4, 8), torch.rand(4, 4)]
    spiking = spikeplug.convert(net, "rate", calibration=[given])
    with pytest.raises(OptionError, match=r"input 'pair\[1\]' of Net has shape \[4, 3\], \[B, 4\] is needed"):
        spiking(given[0], [given[1][0], torch.rand(4, 3)])


def test_further_inputs():
    net = module(lambda self, *xs: self.a(sum(xs)), a=nn.Linear(8, 4))
    assert_near(net, torch.rand(4, 8), torch.rand(4, 8))


def test_layers_on_whole_numbers_are_coded_and_counted():
    def forward(self, x, t):
        e = torch.sin(t[:, None].float() * torch.arange(16) * 0.1)
        return self.b(torch.relu(self.a(x) + self.u(F.silu(self.t(e)))))

    net = module(forward, a=nn.Linear(8, 16), b=nn.Linear(16, 4), t=nn.Linear(16, 32), u=nn.Linear(32, 16))
    spiking = assert_near(net, torch.rand(16, 8), torch.randint(0, 50, (16,)))
    assert sum(op.macs for op in spikeplug.report(spiking).ops if op.role == "spiking") == 128 + 64 + 512 + 512
    assert_near(module(lambda self, i: self.a(F.one_hot(i, 6).float()), a=nn.Linear(6, 3)), torch.arange(6))
    assert_near(module(lambda self, x: self.a(x.float() / 255), a=nn.Linear(6, 3)), torch.randint(0, 256, (9, 6)))


def test_results_keep_their_form(tmp_path):
    pair = collections.namedtuple("pair", "logits features")
    named = assert_near(module(lambda self, x: pair(self.a(x), x * 2), a=nn.Linear(8, 4)), torch.rand(3, 8))
    x = torch.rand(3, 8)
    logits, features = named(x)
    assert torch.equal(named(x).logits, logits)
    assert features.shape == (3, 8)
    spikeplug.save(named, tmp_path / "net")
    assert torch.equal(spikeplug.load(tmp_path / "net")(x).logits, logits)
    numbered = spikeplug.convert(
        module(lambda self, x: {0: self.a(x), "b": x}, a=nn.Linear(8, 4)), "rate", calibration=[x]
    )
    assert list(numbered(x)) == [0, "b"]


@torch.no_grad()
def test_views_of_weights_are_saved(tmp_path):
    def tied(self, x):
        return F.linear(torch.relu(F.linear(x, self.w)), self.w.t()) + F.linear(x, self.w[:8])

    def crossed(self, x):
        return self.m(x, x * 2, x * 2)[0]

    tied_net = module(tied)
    tied_net.w = nn.Parameter(torch.randn(16, 8) / 3)
    for index, (net, x) in enumerate([
        (tied_net, torch.rand(9, 8)),
        (module(crossed, m=nn.MultiheadAttention(8, 2, batch_first=True)), torch.rand(3, 5, 8)),
    ]):  # fmt: skip
        spiking = assert_near(net, x, limit=0.05)
        spikeplug.save(spiking, tmp_path / f"{index}")
        assert torch.equal(spikeplug.load(tmp_path / f"{index}")(x), spiking(x))


EINSUMS = {
    "two activations": (lambda self, x: self.b(torch.einsum("bij,bkj->bik", self.a(x), x)), (3, 5, 8)),
    "heads": (
        lambda self, x: self.b(
            torch.einsum("bqhd,bkhd->bhqk", self.a(x).view(-1, 5, 2, 4), x.view(-1, 5, 2, 4)).sum(1)
        ),
        (3, 5, 8),
    ),
    "a matrix": (lambda self, x: torch.einsum("bij,jk->bik", torch.relu(self.a(x)), self.a.weight), (3, 5, 8)),
}


@pytest.mark.parametrize("name", EINSUMS)
def test_einsum(name):
    forward, shape = EINSUMS[name]
    spiking = assert_near(module(forward, a=nn.Linear(8, 8), b=nn.Linear(5, 3)), torch.rand(shape), limit=0.03)
    assert spikeplug.report(spiking).share("dense") == 0


def test_spikes_are_counted_with_gradients():
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5)).eval()
    spiking = spikeplug.set_execution(spikeplug.convert(net, "rate", calibration=[torch.rand(8, 8)]), "stepped")
    with spikeplug.count_spikes(spiking) as counts:
        spiking(torch.rand(2, 8))
    assert counts.total > 0


@torch.no_grad()
def test_odd_shapes_and_dtypes():
    assert_near(
        module(lambda self, x: (h := torch.relu(self.a(x))) @ h.mean(0), a=nn.Linear(8, 4)),
        torch.rand(9, 8),
        limit=0.03,
    )
    mixed = nn.Sequential(nn.Conv2d(3, 4, 3).bfloat16(), nn.BatchNorm2d(4)).eval()
    x = torch.rand(2, 3, 8, 8).bfloat16()
    dense = mixed(x).float()
    assert (
        spikeplug.convert(mixed, "rate", calibration=[x], steps=256)(x).float() - dense
    ).norm() < 0.05 * dense.norm()
    with pytest.raises(OptionError, match=r"calibration is a Tensor: give a list of batches"):
        spikeplug.convert(mixed, "rate", calibration=x)
    with pytest.raises(ConversionError, match="has no shape yet: run the network once"):
        spikeplug.convert(nn.Sequential(nn.LazyLinear(4)), "rate", calibration=[torch.rand(2, 3)])


def test_a_row_that_is_masked_whole():
    def forward(self, x, mask):
        return F.scaled_dot_product_attention(self.a(x), x, x, attn_mask=mask)

    net = module(forward, a=nn.Linear(8, 8))
    mask = torch.ones(2, 5, 5, dtype=torch.bool)
    mask[0, 0] = False
    assert_near(net, torch.rand(2, 5, 8), mask, limit=0.05)


def forged(folder, change):
    """Change the graph of a saved network, and its hashes with it."""
    graph = json.loads((folder / "graph.json").read_text())
    change(graph)
    (folder / "graph.json").write_text(json.dumps(graph))
    manifest = json.loads((folder / "spikeplug.json").read_text())
    manifest["files"]["graph.json"] = _sha256(folder / "graph.json")
    manifest["digest"] = _digest(manifest)
    (folder / "spikeplug.json").write_text(json.dumps(manifest))


def node_of(graph, op, target=""):
    return next(each for each in graph["graph"]["nodes"] if each["op"] == op and target in each["target"])


CODE = "__import__('pathlib').Path('{}').touch()"
FORGERIES = {
    "input": lambda g, code: node_of(g, "placeholder").update(target=f"x={code}"),
    "input's default": lambda g, code: node_of(g, "placeholder").update(args=[code]),
    "argument": lambda g, code: node_of(g, "call_function", "gelu").update(
        kwargs={"**(dict() if " + code + " else dict()), approximate": "none"}
    ),
    "path": lambda g, code: node_of(g, "call_function", "linear")["meta"].update(
        path=f'a")and {code} or getattr(self, "a'
    ),
    "operation": lambda g, code: node_of(g, "call_function", "gelu").update(target="os.system"),
    "file": lambda g, code: node_of(g, "call_function", "gelu").update(
        target="aten.from_file.default", args=["/etc/passwd"]
    ),
    "stored": lambda g, code: g["stored"].update({f'"{code}"': "a.weight"}),
    "results": lambda g, code: g["graph"].update(outputs={"kind": "tuple", "parts": [{"kind": "tensor"}] * 3}),
    "guard": lambda g, code: g["graph"].update(guards=[["s", ["__import__", "os"]]]),
    "structure": lambda g, code: g["graph"].update(outputs={"kind": code}),
    "missing": lambda g, code: g["graph"].pop("nodes"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_nothing_that_a_file_says_is_called(name, tmp_path):
    net = module(lambda self, x: self.b(F.gelu(self.a(x))), a=nn.Linear(4, 4), b=nn.Linear(4, 2))
    spikeplug.save(spikeplug.convert(net, "rate", calibration=[torch.rand(5, 4)]), tmp_path / "net")
    mark = tmp_path / "ran"
    forged(tmp_path / "net", lambda graph: FORGERIES[name](graph, CODE.format(mark)))
    with pytest.raises(BundleError):
        spikeplug.load(tmp_path / "net")(torch.rand(5, 4))
    assert not mark.exists()
