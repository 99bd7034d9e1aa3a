"""Command line `spikeplug-lava`: results on stdout, errors on stderr; exit status 1 where a check fails."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.numpy import save as to_bytes

from spikeplug_lava_runtime.bundle import load, write_file
from spikeplug_lava_runtime.format import Bundle, FormatError
from spikeplug_lava_runtime.interpreter import Result
from spikeplug_lava_runtime.verify import BACKENDS, backend_of, verify


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the console script."""
    parser = argparse.ArgumentParser(prog="spikeplug-lava", description="Integer networks exported by Spikeplug.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    of_file = argparse.ArgumentParser(add_help=False)
    of_file.add_argument("file", type=Path, help="an integer network, .safetensors")
    of_file.add_argument("--json", action="store_true", help="print JSON")
    of_backend = argparse.ArgumentParser(add_help=False)
    of_backend.add_argument("--backend", choices=BACKENDS, default="numpy", help="default: numpy")

    command = commands.add_parser("info", parents=[of_file], help="what a file holds")
    command.set_defaults(call=_info)
    command = commands.add_parser("verify", parents=[of_file, of_backend], help="compare with the golden spikes")
    command.add_argument("--samples", type=int, help="only so many")
    command.set_defaults(call=_verify)
    command = commands.add_parser("run", parents=[of_file, of_backend], help="run spikes of your own")
    command.add_argument(
        "--spikes", type=Path, help="safetensors with int8 `spikes` [T, samples, ...]; default: golden ones"
    )
    command.add_argument("--out", type=Path, help="safetensors to write: logits, and spikes of every population")
    command.set_defaults(call=_run)
    command = commands.add_parser("energy", parents=[of_file], help="estimate by replay in SANA-FE")
    command.add_argument("--samples", type=int, default=4, help="golden samples to replay; default: 4")
    command.set_defaults(call=_energy)
    given = parser.parse_args(arguments)
    try:
        return int(given.call(load(given.file), given))
    except (FormatError, ValueError, ImportError, SafetensorError) as error:
        sys.stderr.write(f"error: {error}\n")
    except OSError as error:
        sys.stderr.write(f"error: {error.filename or given.file}: {error.strerror or error}\n")
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    return 1


def _info(bundle: Bundle, given: argparse.Namespace) -> int:
    rows = [
        {
            "name": each["name"],
            "kind": each["kind"],
            "shape": each["shape"],
            "receives": [e["from"] for e in each["edges"]],
        }
        for each in bundle.populations
    ]
    head = {key: bundle.graph.get(key) for key in ("network", "recipe", "code", "steps", "spec", "producer")}
    golden = bundle.samples if f"golden.{bundle.populations[0]['name']}" in bundle.tensors else 0
    if given.json:
        _print_json({**head, "golden_samples": golden, "populations": rows})
        return 0
    print(f"{head['network']}, recipe {head['recipe']}: code {head['code']}, {head['steps']} steps")
    print(f"{golden} golden samples, version {head['spec']} of the format")
    for row in rows:
        print(
            f"  {row['name']:<24} {row['kind']:<8} {'x'.join(map(str, row['shape'])):<12} {', '.join(row['receives'])}"
        )
    return 0


def _verify(bundle: Bundle, given: argparse.Namespace) -> int:
    verdict = verify(bundle, given.backend, given.samples)
    if given.json:
        _print_json(verdict.to_dict())
    else:
        print(verdict)
    return 0 if verdict.passed else 1


def _run(bundle: Bundle, given: argparse.Namespace) -> int:
    spikes = _spikes(bundle, given.spikes)
    result: Result = backend_of(given.backend)(bundle, spikes)
    if result.overflowing:
        raise ValueError(f"'{result.overflowing[0]}': a state needs more than 24 bits on these samples")
    if given.out is not None:
        tensors = {f"spikes.{name}": np.ascontiguousarray(each) for name, each in result.spikes.items()}
        write_file(given.out, to_bytes({"logits": result.logits, **tensors}))
    predictions = result.logits.reshape(len(result.logits), -1).argmax(1)
    rates = {name: float(np.abs(each).sum() / each[0].size) for name, each in result.spikes.items()}
    if given.json:
        _print_json({"logits": result.logits.tolist(), "predictions": predictions.tolist(), "spikes_per_neuron": rates})
        return 0
    print("predictions", *predictions)
    for name, rate in rates.items():
        print(f"  {name:<24} {rate:.3f} spikes per neuron and sample")
    print(f"ran on: {BACKENDS[given.backend]}. Not run on Loihi 2.")
    return 0


def _energy(bundle: Bundle, given: argparse.Namespace) -> int:
    from spikeplug_lava_runtime.energy import replay

    if given.samples < 1:
        raise ValueError(f"--samples {given.samples}: at least 1 is needed")

    found = replay(bundle, given.samples)
    if given.json:
        _print_json(found)
        return 0
    print(
        "energy per sample  " + ", ".join(f"{name} {1e9 * value:.1f} nJ" for name, value in found["energy_j"].items())
    )
    print("events per sample  " + ", ".join(f"{name} {value:,.1f}" for name, value in found["events"].items()))
    print(f"time per sample    {1e6 * found['time_s']:.1f} us")
    print(f"assumptions        {found['assumptions']}")
    return 0


def _spikes(bundle: Bundle, path: Path | None) -> Any:
    if path is None:
        if f"golden.{bundle.populations[0]['name']}" not in bundle.tensors:
            raise FormatError("the file has no golden spikes: give some with --spikes")
        return bundle.golden(bundle.populations[0]["name"])
    tensors = load_file(path)
    if "spikes" not in tensors:
        raise FormatError(f"{path} has no tensor 'spikes'")
    if not np.isin(tensors["spikes"], (-1, 0, 1)).all():
        raise FormatError(f"{path}: spikes are -1, 0 or 1")
    return tensors["spikes"]


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=2))


if __name__ == "__main__":
    sys.exit(main())
