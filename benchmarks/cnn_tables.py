"""CNNs: accuracy of spiking networks beside the dense ones, ablations, cost, and SpikingJelly's own conversion.

    python benchmarks/cnn_tables.py cifar --data DATA [--count 5000] [--network cifar_resnet20]
    python benchmarks/cnn_tables.py ablation --data DATA [--count 1000]
    python benchmarks/cnn_tables.py imagenet --data DATA [--count 200]
    python benchmarks/cnn_tables.py cost --data DATA
    python benchmarks/cnn_tables.py peer --data DATA [--count 256]
    python benchmarks/cnn_tables.py layers --data DATA

DATA holds CIFAR-10 as cifar10/*.npz, ImageNet images as imagenet/*.zip, and models/. All rows of a table are measured
in one process on the same images.
"""

from __future__ import annotations

import argparse
import functools
import io
import itertools
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from cnn_networks import NETWORKS, for_spikingjelly
from PIL import Image
from torch import Tensor, fx, nn

import spikeplug
from spikeplug.graph.capture import capture
from spikeplug.graph.folding import fold
from spikeplug.graph.network import SpikingGraph
from spikeplug_vision.models import CIFAR, CifarResNet

BATCH = 16


def cifar(data: Path, file: str, count: int | None) -> tuple[Tensor, Tensor]:
    """Images `[N, 3, 32, 32]` as the networks take them, and their labels."""
    found = np.load(data / "cifar10" / file)
    raw, offsets = found["webp"].tobytes(), found["offsets"]
    count = min(count or 10**9, len(offsets) - 1)
    pixels = [np.asarray(Image.open(io.BytesIO(raw[offsets[i] : offsets[i + 1]])).convert("RGB")) for i in range(count)]
    x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(CIFAR[key]).reshape(3, 1, 1) for key in ("mean", "std"))
    return (x - mean) / std, torch.from_numpy(found["labels"][:count]).long()


def cifar_network(data: Path, name: str) -> nn.Module:
    net = CifarResNet(int(name.removeprefix("cifar_resnet")))
    state = safetensors.torch.load_file(data / "models" / f"cifar10_{name.removeprefix('cifar_')}.safetensors")
    net.load_state_dict({key.removeprefix("module."): tensor for key, tensor in state.items()})
    return net.eval()


def imagenet(data: Path, file: str, count: int, prepare: Callable[[Any], Tensor]) -> tuple[Tensor, Tensor]:
    """Images spread evenly over the archive, and their labels."""
    with zipfile.ZipFile(data / "imagenet" / file) as archive:
        listing = next(name for name in archive.namelist() if name.endswith("labels.csv"))
        lines = archive.read(listing).decode().split()[1:]
        rows = [line.split(",") for line in lines]
        chosen = [rows[index * len(rows) // count] for index in range(min(count, len(rows)))]
        folder = listing.rpartition("/")[0]
        names = {name.rpartition("/")[2]: name for name in archive.namelist()}
        images = []
        for row in chosen:
            name = names.get(row[0].rpartition("/")[2], f"{folder}/{row[0]}")
            images.append(prepare(Image.open(io.BytesIO(archive.read(name))).convert("RGB")))
    return torch.stack(images), torch.tensor([int(row[1]) for row in chosen])


def run(net: Callable[[Tensor], Tensor], x: Tensor, batch: int = BATCH) -> tuple[Tensor, float]:
    """Outputs, and milliseconds of CPU per image."""
    start = time.process_time()
    with torch.inference_mode():
        found = torch.cat([net(part) for part in x.split(batch)])
    return found, 1e3 * (time.process_time() - start) / len(x)


class Twin:
    """A dense network, its images, and rows of spiking counterparts."""

    def __init__(self, build: Callable[[], nn.Module], calibration: Tensor, x: Tensor, labels: Tensor) -> None:
        self.build, self.calibration, self.x, self.labels = build, calibration, x, labels
        self.dense, self.ms = run(build(), x)

    def convert(self, recipe: str, **options: Any) -> Any:
        return spikeplug.convert(self.build(), recipe, calibration=self.calibration.split(50), **options)

    def row(self, spiking: SpikingGraph) -> list[str]:
        """Accuracy, agreement, error of the logits, delay, spikes a neuron, energy, time."""
        with spikeplug.count_spikes(spiking) as counts:
            found, ms = run(spiking, self.x)
        fired = counts.total / sum(count.neurons for count in counts.by_site.values())
        from spikeplug.measure.energy import charge

        energy = charge(spiking, counts, len(self.x)).summary()
        right = float((found.argmax(1) == self.labels).double().mean())
        agree = float((found.argmax(1) == self.dense.argmax(1)).double().mean())
        error = float((found - self.dense).norm() / self.dense.norm())
        return [
            f"{right:.2%}", f"{agree:.2%}", f"{error:.4f}", str(spikeplug.report(spiking).delay), f"{fired:.2f}",
            f"{energy['ratio']:.3f}, {energy['ratio_with_memory']:.3f}", f"{ms:.1f}",
        ]  # fmt: skip

    def head(self) -> str:
        right = float((self.dense.argmax(1) == self.labels).double().mean())
        return f"{len(self.x)} images, calibrated on {len(self.calibration)}; ANN {right:.2%}, {self.ms:.2f} ms"


COLUMNS = ["top-1", "agree", "logit error", "steps", "spikes a neuron", "energy / dense", "CPU ms"]


def show(head: Sequence[str], rows: Iterator[list[str]]) -> None:
    print(f"| {' | '.join(head)} |\n| {' | '.join(['---'] * len(head))} |")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def cifar_twin(arguments: argparse.Namespace) -> Twin:
    calibration, _ = cifar(arguments.data, "train_shard0of5.npz", 1000)
    x, labels = cifar(arguments.data, "test_public.npz", arguments.count)
    twin = Twin(functools.partial(cifar_network, arguments.data, arguments.network), calibration, x, labels)
    print(f"{arguments.network}, CIFAR-10 test, {twin.head()} of CPU an image\n")
    return twin


MAIN: list[tuple[str, dict[str, Any]]] = [
    ("css", {}),
    ("css", {"percentile": 100.0}),
    ("css-q", {}),
    ("css-q", {"percentile": 100.0}),
    ("css", {"steps": 8}),
    ("bse", {"steps": 8}),
    ("mgpc", {"steps": 8}),
    ("ttfs", {"steps": 64}),
    ("rate", {"steps": 32}),
    ("rate", {"steps": 256}),
]


def main_table(arguments: argparse.Namespace) -> None:
    twin = cifar_twin(arguments)
    rows = ([recipe, _said(options), *twin.row(twin.convert(recipe, **options))] for recipe, options in MAIN)
    show(["recipe", "options", *COLUMNS], rows)


def ablation(arguments: argparse.Namespace) -> None:
    twin = cifar_twin(arguments)
    grid: list[dict[str, Any]] = [{"steps": t, "beta": b} for b in (1.5, 2.0) for t in (4, 6, 8, 10, 12, 16)]
    grid += [{"steps": 12, "beta": b} for b in (1.2, 1.3, 1.4, 1.6, 1.8)]
    grid += [{"steps": t, "silent": s} for t in (8, 12, 16) for s in (0, 2, 3, 4)]
    grid += [{"steps": 12, "silent": s, "negative": False} for s in (0, 1, 2, 3, 4)]
    found: list[tuple[dict[str, Any], float]] = []

    def rows() -> Iterator[list[str]]:
        for options in grid:
            row = twin.row(twin.convert("css", **options))
            found.append((options, float(row[0].rstrip("%"))))
            yield [_said(options), *row]

    show(["css", *COLUMNS], rows())
    if arguments.figure:
        _plot(found, twin, arguments.figure)


def _plot(found: list[tuple[dict[str, Any], float]], twin: Twin, path: Path) -> None:
    """Accuracy by T and by silent steps, spikes by step, what is left (the paper's Figures 2, 4 and 5)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.5), layout="constrained")
    by_steps, by_silence, first, last = figure.subplots(2, 2).flatten()
    for beta in (1.5, 2.0):
        picked = [(o["steps"], a) for o, a in found if o.get("beta") == beta and "silent" not in o]
        by_steps.plot(*zip(*picked, strict=True), "o-", label=f"β = {beta}, L = 1")
    picked = [(o["steps"], a) for o, a in found if o.get("silent") == 0 and "negative" not in o]
    by_steps.plot(*zip(*picked, strict=True), "o--", label="β = 1.5, L = 0")
    by_steps.set(xlabel="T", ylabel="top-1, %")
    for negative, style in ((True, "o-"), (False, "o--")):
        picked = [(o.get("silent", 1), a) for o, a in found if o["steps"] == 12 and o.get("negative", True) is negative]
        picked = [each for each in picked if each[0] != 1 or not negative] + [
            (1, a) for o, a in found if negative and o == {"steps": 12, "beta": 1.5}
        ]
        label = "with" if negative else "without"
        by_silence.plot(*zip(*sorted(picked), strict=True), style, label=f"{label} negative spikes")
    by_silence.set(xlabel="silent steps L, T = 12", ylabel="top-1, %")
    variants = {"L = 1": {}, "L = 0": {"silent": 0}, "L = 0, no negative": {"silent": 0, "negative": False}}
    for label, options in variants.items():
        sites = [each for each in spikeplug.diagnose(twin.convert("css", **options), [twin.x[:64]]) if each.residual]
        for axes, site in ((first, sites[0]), (last, sites[-1])):
            axes.plot(range(1, 13), site.by_step, "o-", label=f"{label}: {site.residual:.2f} left on average")
    for axes, where in ((first, "first"), (last, "last")):
        axes.set(xlabel="step", ylabel="share of spikes", title=f"{where} layer of neurons")
    for axes in (by_steps, by_silence, first, last):
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def imagenet_table(arguments: argparse.Namespace) -> None:
    for name, network in NETWORKS.items():
        if arguments.only and name not in arguments.only:
            continue
        calibration, _ = imagenet(arguments.data, "sample256_public.zip", 64, network.prepare)
        x, labels = imagenet(arguments.data, "val227_public.zip", arguments.count, network.prepare)
        twin = Twin(lambda network=network: network.build(arguments.data), calibration, x, labels)  # type: ignore[misc]
        print(f"\n{name}, val227, {twin.head()} of CPU an image\n")
        variants: list[tuple[str, dict[str, Any]]] = [
            ("css", {"steps": 12}), ("css", {"steps": 16}), ("bse", {"steps": 8}), ("ttfs", {"steps": 64}),
        ]  # fmt: skip
        rows = ([recipe, _said(options), *twin.row(twin.convert(recipe, **options))] for recipe, options in variants)
        show(["recipe", "options", *COLUMNS], rows)


def cost(arguments: argparse.Namespace) -> None:
    """CPU time against the dense network's, and how much of it are the convolutions."""
    arguments.count = arguments.count or 128
    twin = cifar_twin(arguments)
    captured = capture(twin.build(), (twin.x[:2],), {})
    fold(captured)
    folded = fx.GraphModule(dict(captured.tensors), captured.graph)
    dense = min(run(lambda x: folded(x)[0], twin.x)[1] for _ in range(5))

    def rows() -> Iterator[list[str]]:
        for recipe, options in (("css", {}), ("css", {"compiled": True}), ("css-q", {}), ("css-q", {"compiled": True})):
            spiking = twin.convert(recipe, **options)
            run(spiking, twin.x[:BATCH])
            for batch in (1, 8, 16, 32):
                run(spiking, twin.x[:batch], batch)
                own = min(run(spiking, twin.x, batch)[1] for _ in range(3))
                layers = min(_layers_alone(spiking, twin.x[:batch]) for _ in range(5)) / batch
                ratio = f"{own / dense:.1f}"
                yield [recipe, _said(options), str(batch), f"{own:.2f}", ratio, f"{layers / own:.0%}"]

    print(f"dense, folded: {dense:.2f} ms of CPU an image, batch {BATCH}; {torch.get_num_threads()} threads\n")
    show(["recipe", "options", "batch", "CPU ms", "x dense", "of which layers"], rows())


def _layers_alone(spiking: SpikingGraph, x: Tensor) -> float:
    """Milliseconds of CPU that convolutions and linear layers take by themselves, on the inputs that they get."""
    from spikeplug.graph.streaming import StreamingLayer

    inputs: list[tuple[StreamingLayer, Tensor]] = []
    handles = [
        module.register_forward_pre_hook(lambda layer, args: inputs.append((layer, args[0])))
        for module in spiking.modules()
        if isinstance(module, StreamingLayer)
    ]
    with torch.inference_mode():
        spiking(x)
        for handle in handles:
            handle.remove()
        start = time.process_time()
        for layer, given in inputs:
            layer(given)
        return 1e3 * (time.process_time() - start)


def peer(arguments: argparse.Namespace) -> None:
    """SpikingJelly's rate coding, in its default and its best mode, beside css-q and css in one process."""
    arguments.count = arguments.count or 256
    twin = cifar_twin(arguments)
    rows = itertools.chain(_flowing_rows(twin), _rate_rows(twin))
    show(["", "T", "steps to the result", "top-1", "agree", "CPU ms an image"], rows)
    _time_neurons()


def _flowing_rows(twin: Twin) -> Iterator[list[str]]:
    for recipe in ("css-q", "css"):
        for compiled in (False, True):
            spiking = twin.convert(recipe, compiled=compiled)
            run(spiking, twin.x[:BATCH])
            found, ms = run(spiking, twin.x)
            said = f"{recipe}{', compiled' if compiled else ''}"
            delay = str(spikeplug.report(spiking).delay)
            yield [said, str(spiking.stream.steps), delay, *_score(twin, found), f"{ms:.1f}"]


def _rate_rows(twin: Twin) -> Iterator[list[str]]:
    """SpikingJelly's conversion, one step after the other."""
    from spikingjelly.activation_based import functional
    from spikingjelly.activation_based.ann2snn import Converter
    from spikingjelly.activation_based.ann2snn.recipes.rate_coding import RateCodingRecipe

    loader = [(part, 0) for part in twin.calibration.split(50)]
    best = {"channel_wise": True, "half_threshold": True}
    for mode, options in (("default", {}), ("channel-wise, half threshold", best)):
        net = Converter(RateCodingRecipe(loader, **options)).convert(for_spikingjelly(twin.build()))
        functional.set_step_mode(net, "s")
        totals: dict[int, list[Tensor]] = {t: [] for t in (32, 64, 128, 256)}
        seconds = dict.fromkeys(totals, 0.0)
        with torch.inference_mode():
            for part in twin.x.split(BATCH):
                functional.reset_net(net)
                total, start = torch.zeros(()), time.process_time()
                for t in range(1, max(totals) + 1):
                    total = total + net(part)
                    if t in totals:
                        totals[t].append(total.clone())
                        seconds[t] += time.process_time() - start
        for t, parts in totals.items():
            ms = 1e3 * seconds[t] / len(twin.x)
            yield [f"SpikingJelly rate, {mode}", str(t), str(t), *_score(twin, torch.cat(parts)), f"{ms:.1f}"]


def _time_neurons() -> None:
    from spikingjelly.activation_based import neuron

    from spike_plugin_css.neuron import TSAReLU

    xs = torch.rand(8, 16, 16, 32, 32)
    node = neuron.IFNode(v_reset=None, step_mode="m")
    timed: dict[str, Callable[[Tensor], Tensor]] = {"SpikingJelly IFNode, m": node}
    timed |= {"TSA-ReLU": TSAReLU(2.0).window, "TSA-ReLU, compiled": TSAReLU(2.0, compiled=True).window}
    print("\nneurons alone, [8, 16, 16, 32, 32], no gradient, ms of CPU:")
    with torch.inference_mode():
        for name, window in timed.items():
            window(xs)
            best = min(_ms(window, xs, node) for _ in range(7))
            print(f"  {name}: {best:.1f}")


def _ms(window: Callable[[Tensor], Tensor], xs: Tensor, node: Any) -> float:
    node.reset()
    start = time.process_time()
    window(xs)
    return 1e3 * (time.process_time() - start)


def _score(twin: Twin, found: Tensor) -> list[str]:
    right = float((found.argmax(1) == twin.labels).double().mean())
    agree = float((found.argmax(1) == twin.dense.argmax(1)).double().mean())
    return [f"{right:.2%}", f"{agree:.2%}"]


def layers(arguments: argparse.Namespace) -> None:
    """Spikes, negative share, error and what is left, layer by layer."""
    arguments.count = arguments.count or 64
    twin = cifar_twin(arguments)
    head = ["site", "spikes a neuron", "negative", "error", "left, mean", "left, 99.9 %"]
    found = spikeplug.diagnose(twin.convert("css"), [twin.x])
    left = ((each, (each.residual or 0.0, each.residual_999 or 0.0)) for each in found)
    show(
        head,
        (
            [each.site, f"{each.spikes:.2f}", f"{each.negative:.1%}", f"{each.error:.4f}", f"{mean:.3f}", f"{most:.2f}"]
            for each, (mean, most) in left
        ),
    )


def _said(options: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in options.items())


TABLES = {
    "cifar": main_table,
    "ablation": ablation,
    "imagenet": imagenet_table,
    "cost": cost,
    "peer": peer,
    "layers": layers,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--network", default="cifar_resnet20")
    parser.add_argument("--count", type=int)
    parser.add_argument("--only", action="append")
    parser.add_argument("--figure", type=Path, help="where the ablation draws its figures")
    arguments = parser.parse_args()
    if arguments.table == "imagenet":
        arguments.count = arguments.count or 200
    TABLES[arguments.table](arguments)


if __name__ == "__main__":
    main()
