"""Which networks convert: every classifier of torchvision, and one network of each family of timm, at random weights.

    python benchmarks/coverage.py [--sets torchvision timm] [--recipes bse css] [--limit 600] [--threads 2]

Every network is converted in a process of its own, at the smallest image that it takes, and compared with its dense
counterpart. Rows are kept in --store as they come, so that an interrupted run goes on; the table is written to --out.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SIZES = (64, 96, 128, 160, 192, 224, 240, 256, 288, 299, 320, 384, 448, 512)
SMALL = ("atto", "femto", "pico", "nano", "xxs", "tiny", "_t_", "mini", "small", "xs", "_b0", "_s", "18", "26")


def names_of(chosen: str) -> list[str]:
    """Names of the networks of a set; of timm, one that is small by its name for each family."""
    if chosen == "torchvision":
        import torchvision.models

        return [f"torchvision:{name}" for name in torchvision.models.list_models(module=torchvision.models)]
    import timm

    found = []
    for family in timm.list_modules():
        models = timm.list_models(module=family)
        if models:
            first = next((name for word in SMALL for name in models if word in name), models[0])
            found.append(f"timm:{first}")
    return found


def one(name: str, recipe: str) -> dict[str, Any]:
    """Convert one network and compare it with its dense counterpart."""
    import torch

    import spikeplug
    from spikeplug.graph.structure import leaves

    torch.manual_seed(0)
    net = _built(name).eval()
    for parameter in net.parameters():
        if parameter.ndim > 1 and not parameter.any():  # heads that begin at zero would make all networks alike
            torch.nn.init.normal_(parameter, std=0.02)
    size = _smallest(net)
    found: dict[str, Any] = {"size": size, "parameters": sum(each.numel() for each in net.parameters())}
    x = torch.randn(2, 3, size, size)
    start = time.perf_counter()
    with torch.no_grad():
        dense = net(x)
        spiking = spikeplug.convert(net, recipe, calibration=[x])
        found["seconds"] = time.perf_counter() - start
        result = spiking(x)
        unchanged = torch.equal(leaves(net(x))[0], leaves(dense)[0])
    one, other = leaves(dense)[0], leaves(result)[0]
    report = spikeplug.report(spiking)
    return {
        **found,
        "error": float((other - one).norm() / one.norm()),
        "unchanged": unchanged,
        "macs": sum(op.macs or 0 for op in report.ops),
        "shares": {role: report.share(role) for role in ("spiking", "decoded", "dense")},
        "dense": [f"{op.name} ({op.type})" for op in report.ops if op.role == "dense" and op.macs],
        "operations": len(report.ops),
        "delay": report.delay,
    }


def _built(name: str) -> Any:
    library, _, model = name.partition(":")
    if library == "timm":
        import timm

        return timm.create_model(model, pretrained=False)
    import torchvision.models

    return torchvision.models.get_model(model, weights=None)


def _smallest(net: Any) -> int:
    import torch

    said = ""
    for size in SIZES:
        try:
            with torch.no_grad():
                net(torch.randn(2, 3, size, size))
        except Exception as error:  # the network's own code, which may raise anything
            said = str(error)
        else:
            return size
    raise ValueError(f"no image size fits: {said}")


def measure(name: str, recipe: str, limit: float, threads: int) -> dict[str, Any]:
    """The row of a network, from a process of its own."""
    command = [sys.executable, __file__, "--threads", str(threads), "--one", name, recipe]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done in {limit:g} s"}
    if done.returncode:
        ended = f"ended with status {done.returncode} and no message"
        return {"failed": (done.stderr.strip() or ended).splitlines()[-1]}
    row: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return row


def written(rows: dict[str, dict[str, Any]], target: Path) -> None:
    """Write the table."""
    import timm
    import torch
    import torchvision

    import spikeplug

    said = [
        f"spikeplug {spikeplug.__version__}",
        f"torch {torch.__version__}",
        f"torchvision {torchvision.__version__}",
    ]
    versions = ", ".join([*said, f"timm {timm.__version__}", f"Python {platform.python_version()}", platform.machine()])
    lines = ["# Coverage: which networks convert", "", *__doc__.strip().splitlines()[2:3], "", f"{versions}, CPU.", ""]
    lines += [
        "Random weights, two images of random numbers, the smallest image size of a list that the network takes,",
        "recipes with their default options. `error`: norm of the difference to the dense network over its norm; with",
        "random weights and numbers it says that the conversion is right, not how accurate a trained network is.",
        "Weights that begin at zero are drawn too. Rows were measured one by one, while the code went on.",
        "`spiking` and `decoded`: shares of the MACs. `seconds`: of the conversion, calibrated and verified,",
        "beside other work.",
        "",
    ]
    for library in ("torchvision", "timm"):
        for recipe in sorted({key.split()[1] for key in rows}):
            asked = {key.split()[0]: row for key, row in rows.items() if key.endswith(f" {recipe}")}
            chosen = {name: row for name, row in asked.items() if name.startswith(library)}
            if chosen:
                lines += _table(library, recipe, chosen)
                missing = [name for name in names_of(library) if name not in chosen]
                lines += [f"Not measured yet: {len(missing)} networks.", ""] if missing else []
    target.write_text("\n".join(lines) + "\n")


def _table(library: str, recipe: str, rows: dict[str, dict[str, Any]]) -> list[str]:
    whole = [name for name, row in rows.items() if "failed" not in row and not row["dense"]]
    lines = [f"## {library}, `{recipe}`: {len(whole)} of {len(rows)} with no MAC left dense", ""]
    lines += ["| network | image | error | spiking | decoded | steps | seconds | |", "| --- " * 8 + "|"]
    for name, row in sorted(rows.items()):
        short = name.partition(":")[2]
        if "failed" in row:
            lines.append(f"| {short} | | | | | | | {row['failed'][:300]} |")
            continue
        note = "dense: " + ", ".join(row["dense"][:3]) if row["dense"] else ""
        shares = " | ".join(f"{row['shares'][role]:.1%}" for role in ("spiking", "decoded"))
        steps = f"{row['delay']:,} | {row['seconds']:.1f}"
        lines.append(f"| {short} | {row['size']} | {row['error']:.4f} | {shares} | {steps} | {note} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="+", default=["torchvision", "timm"])
    parser.add_argument("--recipes", nargs="+", default=["bse", "css"])
    parser.add_argument("--limit", type=float, default=600, help="seconds for a network")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--store", type=Path, default=Path("docs/results/coverage.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/coverage.md"))
    parser.add_argument("--again", action="store_true", help="measure anew what failed")
    parser.add_argument("--one", nargs=2, metavar=("NETWORK", "RECIPE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        import torch

        torch.set_num_threads(arguments.threads)
        print(json.dumps(one(*arguments.one)))
        return
    rows: dict[str, dict[str, Any]] = {}
    if arguments.store.exists():
        for line in arguments.store.read_text().splitlines():
            rows |= json.loads(line)
    keys = [(name, recipe) for chosen in arguments.sets for name in names_of(chosen) for recipe in arguments.recipes]
    for index, (name, recipe) in enumerate(keys, start=1):
        key = f"{name} {recipe}"
        if key in rows and not (arguments.again and "failed" in rows[key]):
            continue
        rows[key] = measure(name, recipe, arguments.limit, arguments.threads)
        with arguments.store.open("a") as store:
            store.write(json.dumps({key: rows[key]}) + "\n")
        said = rows[key].get("failed") or f"error {rows[key]['error']:.4f}"
        sys.stderr.write(f"{index} of {len(keys)} {key}: {said[:160]}\n")
    written(rows, arguments.out)


if __name__ == "__main__":
    main()
