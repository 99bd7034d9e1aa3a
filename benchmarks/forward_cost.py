"""What a spiking forward pass costs beside the dense one: same process, same threads, turn by turn, medians.

    python benchmarks/forward_cost.py [--tokens 512] [--runs 5] [--threads 2]

The dense model runs with transformers' default attention (sdpa), the spiking one fused with 16-step per-tensor BSE.
Prints seconds and the ratio of the medians as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time

import torch

import spikeplug
from spikeplug.cli import language


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--recipe", default="bse")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    opened = language().open(arguments.model, dtype=arguments.dtype, device="cpu")
    dense = opened.model
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, dense.config.vocab_size, (1, arguments.tokens), generator=generator)
    spiking = spikeplug.convert(dense, arguments.recipe, calibration=[ids])
    times: dict[str, list[float]] = {"dense": [], "spiking": [], "spiking, spikes counted": []}
    for run in range(arguments.runs + 1):
        for name, taken in times.items():
            seconds = _counted(spiking, ids) if "counted" in name else _time(dense if name == "dense" else spiking, ids)
            if run:  # the first turn warms up
                taken.append(seconds)
    median = {name: statistics.median(taken) for name, taken in times.items()}
    result = {
        **vars(arguments),
        "torch": torch.__version__,
        "attention": dense.config._attn_implementation,
        "seconds": {name: [round(each, 4) for each in taken] for name, taken in times.items()},
        "median": {name: round(each, 4) for name, each in median.items()},
        "ratio": {name: round(each / median["dense"], 3) for name, each in median.items()},
    }
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


@torch.no_grad()
def _time(model: torch.nn.Module, ids: torch.Tensor) -> float:
    start = time.perf_counter()
    model(ids, use_cache=False)
    return time.perf_counter() - start


def _counted(model: torch.nn.Module, ids: torch.Tensor) -> float:
    with spikeplug.count_spikes(model):
        return _time(model, ids)


if __name__ == "__main__":
    main()
