"""Tables 1 to 6 of LASER on a small language model, beside the paper's figures. Rows 3 to 6: laser_tables.yaml.

    python benchmarks/laser_tables.py TABLE... --calibrate TEXT --ppl TEXT [--tokens 5120] [--calibrate-tokens 8192]

One calibration serves all rows: statistics are those of the dense model, whatever a row converts. Rows that change
the model or its code are calibrated by themselves.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

import spikeplug
from spikeplug.cli import language
from spikeplug.coding.site import sites
from spikeplug.coding.statistics import ActivationStats
from spikeplug.config import ConversionConfig
from spikeplug.conversion.architecture import Opened
from spikeplug.errors import UnknownNameError

LAYER = 15
PAPER_1 = {
    ("rate", 16): "7.70e4", ("rate", 32): "4.46e4", ("ttfs", 16): "3.68e5", ("ttfs", 32): "6.03e4",
    ("ttfs", 1024): "1.03e-9", ("bse", 2): "9.26e4", ("bse", 4): "3.70e-4", ("bse", 8): "1.28e-6",
    ("bse", 16): "1.03e-9", ("bse", 32): "1.33e-14",
}  # fmt: skip
"""Table 1 as printed; several of its powers of ten cannot be right."""


def encodings() -> Iterator[list[str]]:
    """Table 1: reconstruction of 10,000 uniform values in [0, 1], float64, the range known."""
    x = torch.rand(10_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    stats = ActivationStats.of(torch.tensor([0.0, 1.0], dtype=torch.float64), ())
    for (name, steps), paper in PAPER_1.items():
        try:
            code = spikeplug.get_encoder(name, steps=steps)
        except UnknownNameError:
            yield [name, str(steps), "its plugin is not installed", paper]
            continue
        error = (code.fused(x, code.fit(stats)) - x).square()
        yield [name, str(steps), f"{error.mean():.3e} ± {error.std() / 100:.0e}", paper]


def components(opened: Opened) -> Iterator[list[str]]:
    """Table 2: one FFN on 1,024 inputs of N(0, 1), calibrated on others; squared error, and over the output's power."""
    model: Any = opened.model
    x, *others = torch.randn(9, 1024, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    seen = torch.cat(others)
    ffn = model.model.layers[LAYER].mlp
    linear = nn.Sequential(ffn.gate_proj)
    q = torch.fake_quantize_per_tensor_affine(x.double(), float(seen.abs().max()) / 32767, 0, -32768, 32767).float()
    yield ["linear layer, INT16 inputs", *_error(linear(q), linear(x)), "1.12e-9"]

    def spiking(module: nn.Module, recipe: str, given: tuple[Tensor, Tensor], **options: Any) -> list[str]:
        module = module.eval()
        net = spikeplug.convert(copy.deepcopy(module), recipe, calibration=[given[0]], steps=16, **options)
        return _error(net(given[1]), module(given[1]))

    yield ["linear layer, BSE", *spiking(linear, "bse", (seen, x)), "1.45e-9"]
    yield ["SiLU, ASNC, N(0, 1)", *spiking(_Scalar(), "laser", (seen, x), include=["activation"]), "8.73e-7"]
    yield ["whole FFN, BSE and ASNC", *spiking(_Ffn(ffn), "laser", (seen, x)), "9.51e-7"]
    yield ["linear layer, rate", *spiking(linear, "rate", (seen, x)), "4.88e-1"]


class _Scalar(nn.Module):
    """SiLU alone; conversion asks for a layer, so there is one that it leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.unused, self.act = nn.Linear(1, 1), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(x)
        return y


class _Ffn(nn.Module):
    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act = mlp.gate_proj, mlp.up_proj, mlp.down_proj, nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
        return y


def _error(found: Tensor, exact: Tensor) -> list[str]:
    error = (found - exact).double().square().mean()
    return [f"{float(error):.2e}", f"{float(error / exact.double().square().mean()):.2e}"]


class Perplexities:
    """Rows of tables 3 to 6."""

    def __init__(self, opened: Opened, arguments: argparse.Namespace) -> None:
        self.opened, self.arguments, self.architecture = opened, arguments, language()
        self._full: dict[str, dict[str, Tensor]] | None = None
        self._seen: dict[str, dict[str, Any]] = {}

    def dense(self) -> dict[str, Any]:
        """Perplexity and protocol of the dense model."""
        if "dense" not in self._seen:
            self._seen["dense"] = self._measure(self.opened.model)
        return self._seen["dense"]

    def row(self, options: dict[str, Any]) -> float:
        """Perplexity under the options; tables share rows."""
        key = str(options)
        if key not in self._seen:
            self._seen[key] = self._measure(self._converted(**options))
        perplexity: float = self._seen[key]["perplexity"]
        return perplexity

    def _measure(self, model: nn.Module) -> dict[str, Any]:
        opened = Opened(model, self.opened.tokenizer, self.opened.name)
        return self.architecture.perplexity(opened, self.arguments.ppl, seqlen=512, tokens=self.arguments.tokens)

    def _converted(self, activation: str | None = None, **options: Any) -> nn.Module:
        model: Any = copy.deepcopy(self.opened.model)
        if activation:
            model.config.hidden_act = activation
            for layer in model.model.layers:
                layer.mlp.act_fn = {"relu": nn.ReLU}[activation]()
        if activation or "encoder" in options:
            return spikeplug.convert(model, "laser", calibration=self._batches(), **options)
        config = ConversionConfig.resolve("laser", options)
        model = spikeplug.prepare(model, config)
        for name, site in sites(model).items():
            # Layers that read one input share the site of the first of them.
            first = name.replace("k_proj", "q_proj").replace("v_proj", "q_proj").replace("up_proj", "gate_proj")
            site.set_params(self._parameters()[first])
        return model

    def _parameters(self) -> dict[str, dict[str, Tensor]]:
        if self._full is None:
            full = spikeplug.convert(self.opened.model, "laser", calibration=self._batches())
            self._full = {name: dict(site.named_buffers()) for name, site in sites(full).items()}
        return self._full

    def _batches(self) -> Any:
        tokens = self.arguments.calibrate_tokens
        return self.architecture.calibration(self.opened, self.arguments.calibrate, seqlen=512, tokens=tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", type=int, nargs="+", choices=range(1, 7))
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--calibrate", type=Path)
    parser.add_argument("--ppl", type=Path)
    parser.add_argument("--tokens", type=int, default=5120)
    parser.add_argument("--calibrate-tokens", type=int, default=8192)
    arguments = parser.parse_args()
    if max(arguments.table) > 2 and (arguments.calibrate is None or arguments.ppl is None):
        parser.error("tables 3 to 6 need --calibrate and --ppl")
    opened = language().open(arguments.model, dtype="auto", device="cpu")
    perplexities = Perplexities(opened, arguments)
    for number in arguments.table:
        if number == 1:
            show("Table 1: encodings", ["code", "steps", "squared error", "paper"], encodings())
        elif number == 2:
            head = ["component", "squared error", "over the output's power", "paper"]
            with torch.no_grad():
                show("Table 2: components", head, components(opened))
        else:
            table = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())[number]
            head = ["spiking", "perplexity", "change", "paper", "paper's change"]
            show(f"Table {number}: {table['title']}", head, perplexity_rows(perplexities, table["rows"]))
    if max(arguments.table) > 2:
        print("\n" + ", ".join(f"{key} {value}" for key, value in perplexities.dense()["protocol"].items()))


def perplexity_rows(perplexities: Perplexities, rows: list[dict[str, Any]]) -> Iterator[list[str]]:
    """Tables 3 to 6."""
    dense = perplexities.dense()["perplexity"]
    yield ["dense", f"{dense:.3f}", "", "5.12", ""]
    for row in rows:
        name, paper = row.pop("name"), row.pop("paper", None)
        found = perplexities.row(row)
        beside = [str(paper), f"{paper / 5.12 - 1:+.1%}"] if paper else ["", ""]
        yield [name, f"{found:.3f}", f"{found / dense - 1:+.2%}", *beside]


def show(title: str, head: list[str], rows: Iterator[list[str]]) -> None:
    """Print a Markdown table as its rows come."""
    print(f"\n{title}\n\n| {' | '.join(head)} |\n| {' | '.join(['---'] * len(head))} |")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
