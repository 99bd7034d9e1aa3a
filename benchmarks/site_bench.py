"""A language model whose sites are coded anew for every row of a table; one observation serves all rows."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

import spikeplug
from spikeplug.cli import language
from spikeplug.coding.site import Site, sites
from spikeplug.coding.types import Encoder
from spikeplug.config import ConversionConfig
from spikeplug.conversion.architecture import Opened
from spikeplug.conversion.verbs import observe

PREFIXQUANT = ("input", "key", "value", "embedding")
"""Kinds of site that PrefixQuant quantizes; the input of the output layer is not among them."""


class Bench:
    """Opens the model, measures it dense, rewrites it by passes, and observes its sites.

    Attributes:
        dense: measurement of the dense model, with its protocol.
        sites, stats: the sites by name, and what they saw.
    """

    def __init__(self, arguments: argparse.Namespace, recipe: str) -> None:
        self.arguments, self.architecture = arguments, language()
        self.opened = self.architecture.open(arguments.model, dtype="auto", device="cpu")
        self.dense = self.measure()
        passes = ["rotate", "prefix"] if arguments.bits is None else ["rotate", "quantize-weights", "prefix"]
        passes += ["defer-softmax"] if arguments.defer else []
        prefix = {"tokens": arguments.prefix} if arguments.prefix else {}
        options = {
            "prefix": prefix,
            "quantize-weights": {"bits": arguments.bits, "group": 0 if arguments.bits == 8 else 64},
        }
        config = ConversionConfig.resolve(recipe, {"passes": passes, "pass_options": options})
        batches = self.architecture.calibration(
            self.opened, arguments.calibrate, seqlen=512, tokens=arguments.calibrate_tokens, config=config
        )
        self.model: Any = spikeplug.prepare(self.opened.model, config, batches)
        self.sites = {name: site for name, site in sites(self.model).items() if isinstance(site, Site)}
        self.stats = observe(self.model, batches)
        self.leave_dense()

    def code(self, encoder_of: Callable[[Site], Encoder], kinds: Iterable[str] | None = None) -> float:
        """Code the sites of these kinds, by default all, and leave the others dense; return the seconds of fitting."""
        start = time.process_time()
        together: dict[Encoder, list[str]] = {}
        for name, site in self.sites.items():
            together.setdefault(encoder_of(site), []).append(name)
        for encoder, names in together.items():
            for name, p in zip(names, encoder.fit_all([self.stats[name] for name in names]), strict=True):
                self.sites[name].encoder = encoder
                self.sites[name].set_params(p.tensors())
        self.leave_dense()
        for site in self.sites.values():
            if kinds is None or site.kind in kinds:
                site.forward = type(site).forward.__get__(site)  # type: ignore[method-assign]
        return time.process_time() - start

    def leave_dense(self) -> None:
        """Let every site give back what comes in."""
        for site in self.sites.values():
            site.forward = _pass_on  # type: ignore[method-assign]

    def error(self) -> dict[str, float]:
        """Mean squared error of every site on its sample."""
        found = {}
        for name, site in self.sites.items():
            x = self.stats[name].values.double()
            found[name] = float((site.encoder.fused(x, site.params(x)) - x).square().mean())
        return found

    def perplexity(self) -> float:
        found: float = self.measure()["perplexity"]
        return found

    def perplexity_and_energy(self) -> tuple[float, str]:
        """The second: energy against the dense model's, of MAC and AC alone, and with memory and neurons."""
        found = self.measure()
        return found["perplexity"], f"{found['energy']['ratio']:.3f}, {found['energy']['ratio_with_memory']:.3f}"

    def measure(self) -> dict[str, Any]:
        opened = Opened(self.opened.model, self.opened.tokenizer, self.opened.name)
        return self.architecture.perplexity(opened, self.arguments.ppl, seqlen=512, tokens=self.arguments.tokens)

    def change(self, perplexity: float) -> str:
        """A perplexity, and how far it is from the dense model's."""
        return f"{perplexity:.2f} ({perplexity / self.dense['perplexity'] - 1:+.1%})"

    def header(self) -> str:
        """Protocol, prefix and the two perplexities that rows are compared with."""
        protocol = ", ".join(f"{key} {value}" for key, value in self.dense["protocol"].items())
        dense = self.dense["perplexity"]
        tokens = spikeplug.conversion_of(self.model).config.pass_options["prefix"]["tokens"]
        return f"{protocol}\nprefix tokens {tokens}; dense {dense:.3f}, with the passes {self.perplexity():.3f}\n"


def _pass_on(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


def parser(description: str, tables: tuple[str, ...], steps: list[int]) -> argparse.ArgumentParser:
    """The arguments that all tables share."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("table", choices=tables)
    found.add_argument("--calibrate", type=Path, required=True)
    found.add_argument("--ppl", type=Path, required=True)
    found.add_argument("--steps", type=lambda text: [int(each) for each in text.split(",")], default=steps)
    found.add_argument("--only", action="append", help="name of a variant; may be given several times")
    found.add_argument("--bits", type=int, choices=(4, 8), help="quantize the weights first (4 bits: groups of 64)")
    found.add_argument("--defer", action="store_true", help="also apply defer-softmax")
    found.add_argument("--prefix", type=lambda text: [int(each) for each in text.split(",")], help="its tokens")
    found.add_argument("--model", default="smollm2")
    found.add_argument("--tokens", type=int, default=5120)
    found.add_argument("--calibrate-tokens", type=int, default=8192)
    return found


def show(head: list[str], rows: Iterator[list[str]]) -> None:
    """Print a Markdown table as its rows come."""
    print(f"| {' | '.join(head)} |\n| {' | '.join(['---'] * len(head))} |")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)
