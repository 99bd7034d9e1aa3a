"""Images: folders, CIFAR and ImageNet roots, how they are prepared, and what networks make of them."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

import spikeplug
from spikeplug.coding.site import in_mode
from spikeplug.config import ConversionConfig
from spikeplug.conversion.architecture import Watch, unwatched
from spikeplug.conversion.networks import Networks
from spikeplug.conversion.plan import Plan
from spikeplug.conversion.record import Conversion
from spikeplug.conversion.verbs import architecture_of, refuse_target
from spikeplug.errors import BundleError, ConversionError, OptionError
from spikeplug.graph.network import SpikingGraph
from spikeplug.measure.counting import SpikeCounts
from spikeplug.measure.diagnosis import Diagnosis
from spikeplug.measure.energy import charge
from spikeplug.plugins import get_class

from .models import open_model

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm")
BATCH = 16
"""Images that are read and measured at a time."""


class Images:
    """Images with their labels, prepared for one network.

    Attributes:
        name: what they are, for a protocol.
        labels: of every image; None where a folder has no classes.
    """

    def __init__(
        self, path: Path, preprocess: Mapping[str, Any], *, train: bool = False, count: int | None = None
    ) -> None:
        """Look a source of images up.

        Args:
            path: a folder of images; of one folder for each class, in the order of their names; a root of torchvision's
                CIFAR-10 or CIFAR-100; or an ImageNet root with `train` and `val`.
            preprocess: `size` of the short side, `crop`, `mean`, `std`, `interpolation`.
            train: of the roots, their training images.
            count: only so many, spread evenly.

        Raises:
            OptionError: there are no images.
        """
        from torchvision.transforms import v2
        from torchvision.transforms.functional import InterpolationMode

        how = InterpolationMode(preprocess.get("interpolation", "bilinear"))
        parts = [v2.ToImage(), v2.Resize(preprocess["size"], interpolation=how), v2.CenterCrop(preprocess["crop"])]
        parts += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(preprocess["mean"], preprocess["std"])]
        self._prepare = v2.Compose(parts)
        self._items, self.labels, self.name = _found(path, train)
        if not self._items:
            raise OptionError(f"{path} holds no images ({', '.join(ENDINGS)}), and is no CIFAR or ImageNet root")
        if count is not None and count < len(self._items):
            chosen = [index * len(self._items) // count for index in range(count)]
            self._items = [self._items[index] for index in chosen]
            self.labels = None if self.labels is None else [self.labels[index] for index in chosen]
        self.name += f", {len(self._items)} images"

    def __len__(self) -> int:
        return len(self._items)

    def batches(self, size: int = BATCH) -> Iterator[Tensor]:
        """Batches `[B, 3, H, W]`, float32.

        Raises:
            OptionError: an image cannot be read.
        """
        items = iter(self._items)
        while chunk := list(itertools.islice(items, size)):
            yield torch.stack([self._read(item) for item in chunk])

    def _read(self, item: Any) -> Tensor:
        try:
            image = Image.open(item) if isinstance(item, Path) else Image.fromarray(item)
            prepared: Tensor = self._prepare(image.convert("RGB"))
        except (OSError, UnidentifiedImageError) as error:
            raise OptionError(f"cannot read the image {item}: {error}") from error
        return prepared


def _found(path: Path, train: bool) -> tuple[list[Any], list[int] | None, str]:
    from torchvision import datasets

    if not path.is_dir():
        raise OptionError(f"{path} is no folder of images")
    part = "train" if train else "test"
    for folder, cls in (("cifar-10-batches-py", datasets.CIFAR10), ("cifar-100-python", datasets.CIFAR100)):
        if (path / folder).is_dir():
            try:
                data = cls(str(path), train=train, download=False)
            except RuntimeError as error:
                raise OptionError(f"{path}: {error}") from error
            return list(data.data), [int(label) for label in data.targets], f"{cls.__name__} {part}"
    if (path / "val").is_dir():
        path = path / ("train" if train else "val")
    classes = sorted(child for child in path.iterdir() if child.is_dir())
    if not classes:
        return _files(path), None, path.name
    if all(child.name.isdigit() for child in classes):
        classes.sort(key=lambda child: int(child.name))
        numbered = [(file, int(child.name)) for child in classes for file in _files(child)]
    else:
        numbered = [(file, label) for label, child in enumerate(classes) for file in _files(child)]
    return [file for file, _ in numbered], [label for _, label in numbered], path.name


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in ENDINGS)


class Vision(Networks):
    """Networks of images, as the command line opens, converts and measures them."""

    def open(self, source: str, weights: Path | None = None) -> nn.Module:
        """A network by name or function, or a folder that `spikeplug convert` wrote.

        Raises:
            SpikeplugError: there is none, or it cannot be read.
        """
        if not Path(source).is_dir():
            return open_model(source, weights)
        if weights is not None:
            raise OptionError(f"{source} is a converted network, which has its weights: leave --weights out")
        model = spikeplug.load(source)
        preprocess_of(model)
        return model

    def planned(
        self, source: str, recipe: str, config: ConversionConfig, images: Path, *, weights: Path | None
    ) -> Plan:
        """What a conversion would make of a network, with two images as its example. Raises SpikeplugError."""
        dense = self.open(source, weights)
        refuse_target(recipe, architecture_of(dense))
        (example,) = Images(images, preprocess_of(dense), train=True, count=2).batches()
        found: Plan = spikeplug.plan(dense, config, example)
        return found

    def convert(
        self,
        source: str,
        recipe: str,
        config: ConversionConfig,
        images: Path,
        *,
        weights: Path | None,
        count: int,
        statistics: Path | None,
        watch: Watch = unwatched,
    ) -> nn.Module:
        """Open, convert and calibrate a network. Raises SpikeplugError."""
        dense = self.open(source, weights)
        if isinstance(dense, SpikingGraph):
            raise ConversionError(f"{source} is a converted network already: convert a dense one")
        refuse_target(recipe, architecture_of(dense))
        preprocess = preprocess_of(dense)
        batches = list(Images(images, preprocess, train=True, count=count).batches())
        model = spikeplug.convert(dense, config, calibration=batches, statistics=statistics, watch=watch)
        assert isinstance(model.conversion, Conversion)
        model.conversion.origin = {"model": source, "preprocess": dict(preprocess)}
        return model

    def images(self, path: Path, model: nn.Module, count: int | None = None) -> Images:
        """Images prepared for a network that `open` or `convert` gave. Raises OptionError."""
        return Images(path, preprocess_of(model), count=count)

    def diagnose(self, source: str, path: Path, count: int) -> list[Diagnosis]:
        """Every site of a converted network beside its dense counterpart. Raises SpikeplugError."""
        model = self.open(source)
        found: list[Diagnosis] = spikeplug.diagnose(model, self.images(path, model, count).batches(4))
        return found

    def evaluate(
        self,
        model: nn.Module,
        path: Path,
        *,
        count: int | None,
        framework: str = "torch",
        device: str = "cpu",
        batch: int = BATCH,
        watch: Watch = unwatched,
    ) -> dict[str, Any]:
        """Accuracy of a network, and of a spiking one beside its dense counterpart's on the same images.

        Args:
            framework: `torch`, or one whose plugin is installed, in which the converted network then runs.

        Raises:
            SpikeplugError: images cannot be read, or the framework cannot run the network.
        """
        images = self.images(path, model, count)
        model = model.to(device)
        run = _runner(model, framework)
        dense: list[Tensor] = []
        spiking: list[Tensor] = []
        seconds = [0.0, 0.0]
        counted = isinstance(model, SpikingGraph) and framework == "torch"
        with torch.inference_mode(), spikeplug.count_spikes(model) if counted else contextlib.nullcontext() as counts:
            for index, x in enumerate(images.batches(batch)):
                watch("images", index * batch, len(images))
                x, start = x.to(device), time.perf_counter()
                with in_mode(model, "dense"):
                    dense.append(model(x).cpu())
                middle = time.perf_counter()
                if run is not None:
                    spiking.append(run(x).cpu())
                seconds = [seconds[0] + middle - start, seconds[1] + time.perf_counter() - middle]
        result: dict[str, Any] = {
            "protocol": {"images": images.name, "batch": batch, "device": device, "torch": torch.__version__},
            "dense": _accuracy(torch.cat(dense), images.labels) | {"ms_per_image": 1e3 * seconds[0] / len(images)},
        }
        if run is not None:
            own = _accuracy(torch.cat(spiking), images.labels) | {"ms_per_image": 1e3 * seconds[1] / len(images)}
            agreement = float((torch.cat(spiking).argmax(1) == torch.cat(dense).argmax(1)).double().mean())
            steps = spikeplug.report(model).delay
            result["spiking"] = own | {"agreement": agreement, "framework": framework, "steps_to_result": steps}
        if counts is not None:
            result |= _counted(model, counts, len(images))
        return result


def _counted(model: nn.Module, counts: SpikeCounts, images: int) -> dict[str, Any]:
    """Spikes and energy of a number of images."""
    by_site = {name: found.spikes / max(1, found.neurons) for name, found in counts.by_site.items()}
    return {
        "spikes": {"per_image": counts.total / images, "total": counts.total, "per_neuron": by_site},
        "energy": charge(model, counts, images).summary(),
    }


def preprocess_of(model: nn.Module) -> Mapping[str, Any]:
    """How the images of a network, dense or converted, are prepared.

    Raises:
        BundleError: a converted network does not say it: it was not converted from images.
    """
    conversion = getattr(model, "conversion", None)
    if not isinstance(conversion, Conversion):
        dense: Mapping[str, Any] = model.spikeplug_preprocess  # type: ignore[assignment]
        return dense
    if "preprocess" not in conversion.origin:
        raise BundleError(
            "the network does not say how its images are prepared: it was converted in Python, use it there"
        )
    found: Mapping[str, Any] = conversion.origin["preprocess"]
    return found


def _runner(model: nn.Module, framework: str) -> Callable[[Tensor], Tensor] | None:
    """What runs a batch of images in spikes; None: the network has none."""
    if not isinstance(model, SpikingGraph):
        if framework != "torch":
            raise OptionError(f"--framework {framework}: a dense network has no neurons; convert it first")
        return None
    if framework == "torch":
        return model
    network: Any = get_class("framework", framework)().network(model)

    def run(x: Tensor) -> Tensor:
        _reset(network)
        found: Tensor = network.run(x)
        return found

    return run


def _reset(network: nn.Module) -> None:
    for module in network.modules():
        for name in ("reset", "reset_mem"):
            if callable(getattr(module, name, None)):
                getattr(module, name)()
                break


def _accuracy(logits: Tensor, labels: Sequence[int] | None) -> dict[str, Any]:
    if labels is None:
        return {"top1": None, "top5": None}
    wanted = torch.tensor(labels)
    if int(wanted.max()) >= logits.shape[1]:
        raise OptionError(f"images of {int(wanted.max()) + 1} classes, the network has {logits.shape[1]} outputs")
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices == wanted.unsqueeze(1)
    return {"top1": float(best[:, 0].double().mean()), "top5": float(best.any(1).double().mean())}
