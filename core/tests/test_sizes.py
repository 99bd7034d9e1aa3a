"""Networks that choose by sizes, keep things between calls, or have what a capture does not see: right, or refused."""

from __future__ import annotations

import copy
import operator
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import spikeplug
from spikeplug.coding.site import sites
from spikeplug.errors import OptionError

COMPARE = {"==": operator.eq, "!=": operator.ne, "<": operator.lt, ">": operator.gt}


class Net(nn.Module):
    """Two layers with a function in between that a test gives."""

    def __init__(self, between, size=6):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.h = nn.Linear(size, size), nn.Linear(size, 3)
        self.between = between

    def forward(self, x):
        return self.h(self.between(F.relu(self.a(x))))


def dense(spiking, x):
    with torch.no_grad(), spikeplug.in_mode(spiking, "dense"):
        return spiking(x)


@settings(max_examples=8, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    dims=st.lists(st.integers(0, 2), min_size=1, max_size=2, unique=True), compared=st.sampled_from(sorted(COMPARE)),
    limit=st.integers(1, 12), example=st.tuples(st.integers(2, 4), st.integers(1, 4), st.integers(1, 4)),
    others=st.lists(st.tuples(*[st.integers(1, 4)] * 3), min_size=3, max_size=3),
)  # fmt: skip
def test_a_branch_on_sizes_is_followed_or_refused(dims, compared, limit, example, others):
    def between(x):
        product = 1
        for dim in dims:
            product = product * x.shape[dim]
        return x * 3 if COMPARE[compared](product, limit) else x

    net = Net(between).eval()
    spiking = spikeplug.convert(net, "rate", calibration=[torch.randn(*example, 6)], verify=False)
    for shape in (example, *others, (1, 1, 1)):
        x = torch.randn(*shape, 6)
        try:
            found = dense(spiking, x)
        except OptionError:
            continue
        torch.testing.assert_close(found, net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("by", [1.01, 3])
def test_a_branch_on_several_sizes_of_one_is_refused(by):
    def between(x):
        return x * by if x.shape[0] == 1 and x.shape[2] == 1 else x

    net = Net(between).eval()
    spiking = spikeplug.convert(net, "rate", calibration=[torch.randn(3, 4, 5, 6)])
    for shape in ((1, 4, 5), (3, 4, 1), (1, 1, 5)):
        x = torch.randn(*shape, 6)
        torch.testing.assert_close(dense(spiking, x), net(x))
    with pytest.raises(OptionError, match="are not the only sizes of 1"):
        spiking(torch.randn(1, 4, 1, 6))


def test_one_sample_and_one_position_are_taken_where_nothing_depends_on_it():
    net = Net(lambda x: x).eval()
    spiking = spikeplug.convert(net, "rate", calibration=[torch.randn(3, 5, 6)])
    x = torch.randn(1, 1, 6)
    torch.testing.assert_close(dense(spiking, x), net(x))


@pytest.mark.parametrize("between", [
    lambda x: F.pad(x, (0, 0, 0, 0, 1, -1)), lambda x: torch.tril(x[:, 0]), lambda x: torch.roll(x, 1, 0),
    lambda x: x.swapaxes(0, 1), lambda x: F.layer_norm(x, x.shape),
])  # fmt: skip
def test_what_mixes_samples_works_on_values(between, third_party):
    net, x = Net(between, size=5).eval(), torch.randn(5, 5, 5, generator=torch.Generator().manual_seed(0))
    spiking = spikeplug.convert(net, "streaming", calibration=[x], steps=256, verify=False)
    wanted = net(x)
    assert (spiking(x) - wanted).norm() < 0.05 * wanted.norm()


class Keeping(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.h = nn.Linear(6, 6), nn.Linear(6, 3)
        self.seen, self.by_name = [], {}

    def forward(self, x):
        if not hasattr(self, "scale"):
            self.scale = torch.linspace(0, 1, 6)
        self.last = F.relu(self.a(x))
        self.seen.append(self.last)
        self.by_name["last"] = self.last
        return self.h(self.last * self.scale)


def test_planning_leaves_nothing_in_a_network_that_keeps_things():
    net, x = Keeping().eval(), torch.randn(4, 6)
    before = set(vars(net))
    spikeplug.plan(net, "rate", x)
    assert set(vars(net)) == before
    assert (net.seen, net.by_name) == ([], {})
    spiking = spikeplug.convert(net, "rate", calibration=[x], verify=False)
    assert set(vars(net)) == before
    copy.deepcopy(net)
    torch.testing.assert_close(dense(spiking, x), net(x))
    assert type(net(x)) is torch.Tensor


def test_parameters_are_parameters_again_when_loaded(tmp_path):
    net = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.PReLU(4), nn.Linear(4, 3)).eval()
    net[1].weight.requires_grad_(False)
    spiking = spikeplug.convert(net, "rate", calibration=[torch.randn(4, 6)])
    spikeplug.save(spiking, tmp_path / "model")
    loaded = spikeplug.load(tmp_path / "model")
    assert [(name, each.requires_grad) for name, each in loaded.named_parameters()] == [
        (name, each.requires_grad) for name, each in spiking.named_parameters()
    ]


class Slots(nn.Module):
    """Learned queries read a sequence."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.out = nn.Parameter(torch.randn(1, 4, 8)), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        query = self.query.expand(x.shape[0], -1, -1)
        return self.out((query @ self.key(x).mT).softmax(-1) @ x)


@torch.no_grad()
@pytest.mark.parametrize("recipe", ["rate", "streaming"])
def test_products_with_learned_queries_are_coded_and_counted(recipe, third_party):
    torch.manual_seed(0)
    net, x = Slots().eval(), torch.randn(3, 5, 8)
    spiking = spikeplug.convert(net, recipe, calibration=[x], steps=512)
    roles = {op.name: op.role for op in spikeplug.report(spiking).ops if op.macs}
    assert roles == {"key": "spiking", "matmul": "decoded", "matmul_1": "decoded", "out": "spiking"}
    assert sum(op.macs for op in spikeplug.report(spiking).ops) == 5 * 64 + 4 * 5 * 8 + 4 * 5 * 8 + 4 * 24
    assert (spiking(x) - net(x)).norm() < 0.05 * net(x).norm()


@torch.no_grad()
@pytest.mark.parametrize("shapes", [((3, 5, 6), (3, 1, 6)), ((3, 1, 6), (3, 5, 6)), ((3, 5, 6), (1, 5, 6))])
def test_einsum_repeats_sizes_of_one(shapes):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.h = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x, y):
            return self.h(F.relu(torch.einsum("bsd,bsd->bsd", self.a(x), self.b(y))))

    net, batch = Sum().eval(), tuple(map(torch.randn, shapes))
    spiking = spikeplug.convert(net, "rate", calibration=[batch])
    with spikeplug.in_mode(spiking, "dense"):
        torch.testing.assert_close(spiking(*batch), net(*batch))


def test_nodes_and_edges_are_verified_together():
    class Graph(Net):
        def forward(self, x, edges):
            y = F.relu(self.a(x))
            return self.h(y + torch.zeros_like(y).index_add(0, edges[1], y[edges[0]]))

    edges = torch.tensor([[4, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 1]])
    net, x = Graph(None).eval(), torch.randn(5, 6)
    spiking = spikeplug.convert(net, "rate", calibration=[(x, edges)])
    with spikeplug.in_mode(spiking, "dense"):
        torch.testing.assert_close(spiking(x, edges), net(x, edges))


def test_a_dtype_that_does_not_fit_and_a_size_that_depends_on_values_are_said():
    net = nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    with pytest.raises(OptionError, match=r"Sequential does not take a batch of shape \[4, 6\]: .*dtype"):
        spikeplug.plan(net, "rate", torch.randn(4, 6).double())

    class Chosen(Net):
        def forward(self, x, mask):
            return self.h(F.relu(self.a(x))[mask])

    with pytest.raises(spikeplug.SpikeplugError, match="cannot be captured"):
        spikeplug.plan(Chosen(None).eval(), "rate", (torch.randn(4, 6), torch.tensor([True, False, True, True])))


def test_one_site_has_one_code(images, network):
    class Two(Net):
        def __init__(self):
            super().__init__(None)
            self.b = nn.Linear(6, 6)

        def forward(self, x):
            return self.h(self.a(x) + self.b(x))

    x = torch.randn(4, 6)
    with pytest.raises(OptionError, match="overrides gives 'b' another code than 'a', and both read one site"):
        spikeplug.convert(Two().eval(), "rate", calibration=[x], overrides={"b": {"steps": 2}})
    spiking = spikeplug.convert(Two().eval(), "rate", calibration=[x], overrides={"a": {"steps": 2}, "b": {"steps": 2}})
    assert spiking.get_submodule("a").source.encoder.steps == 2


def test_what_is_no_network_or_no_batches_is_said(network, images):
    with pytest.raises(OptionError, match=r"a model of type function: a torch\.nn\.Module is needed"):
        spikeplug.convert(lambda x: x, "rate", calibration=[images])
    with pytest.raises(OptionError, match="calibration is a int: give a list of batches"):
        spikeplug.convert(network(), "rate", calibration=5)
    with pytest.raises(OptionError, match="the example has no samples"):
        spikeplug.convert(network(), "rate", calibration=[images[:0]])
    spiking = spikeplug.convert(network(), "rate", calibration=[images])
    with pytest.raises(spikeplug.SpikeplugError, match="is a part of a converted model"):
        spikeplug.convert(nn.Sequential(spiking, nn.ReLU()), "rate", calibration=[images])


def test_pruned_layers_are_converted_layer_by_layer():
    from torch.nn.utils import prune

    net = Net(lambda x: x)
    prune.l1_unstructured(net.a, "weight", 0.5)
    x = torch.randn(4, 6)
    spiking = spikeplug.convert(net.eval(), "rate", calibration=[x], structure="layers", steps=512)
    assert (spiking(x) - net(x)).norm() < 0.1 * net(x).norm()


def test_modes_and_counts_of_several_threads_leave_nothing_behind(network, images):
    spiking = spikeplug.convert(network(), "rate", calibration=[images])
    interval, failed = sys.getswitchinterval(), []

    def work():
        try:
            for _ in range(50):
                with spikeplug.count_spikes(spiking), spikeplug.in_mode(spiking, "dense"):
                    pass
        except Exception as error:
            failed.append(error)

    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failed
    assert all((site.mode, site.listeners) == ("fused", ()) for site in sites(spiking).values())
